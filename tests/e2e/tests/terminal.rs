//! Containers with a terminal, as a person uses them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;

use mayu_e2e::{BUSYBOX, Container, PATIENCE};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[allow(missing_docs, reason = "the macro makes a public function")]
mod request {
    use super::Winsize;
    nix::ioctl_write_ptr_bad!(set_window_size, nix::libc::TIOCSWINSZ, Winsize);
}

/// A `ctr` on a terminal of ours.
struct Session {
    ctr: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    fn start(command: &mut Command, size: (u16, u16)) -> Self {
        let pty = openpty(Some(&window(size)), None).unwrap();
        let slave = File::from(pty.slave);
        let ctr = command
            .stdin(Stdio::from(slave.try_clone().unwrap()))
            .stdout(Stdio::from(slave.try_clone().unwrap()))
            .stderr(Stdio::from(slave))
            .spawn()
            .unwrap();
        let keyboard = File::from(pty.master);
        let mut master = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The master reports an error when nobody has the terminal any more.
            while let Ok(length @ 1..) = master.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { ctr, keyboard, screen, seen: String::new() }
    }

    fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen shows `text`, after what was waited for before.
    #[track_caller]
    fn expect(&mut self, text: &str) {
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            match self.screen.recv_timeout(PATIENCE) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("the screen never showed {text:?}, but: {:?}", self.seen)
                }
            }
        }
    }

    #[allow(unsafe_code)]
    fn resize(&self, size: (u16, u16)) {
        let window = window(size);
        // SAFETY: the descriptor is a terminal's, and the structure lives across the call.
        unsafe { request::set_window_size(self.keyboard.as_raw_fd(), &raw const window) }.unwrap();
        kill(Pid::from_raw(i32::try_from(self.ctr.id()).unwrap()), Signal::SIGWINCH).unwrap();
    }

    fn end(mut self) -> i32 {
        self.ctr.wait().unwrap().code().unwrap_or(-1)
    }
}

fn window((rows, columns): (u16, u16)) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn a_shell_on_a_terminal_sees_its_size_and_every_change_of_it() {
    let container = Container::unborn();
    let mut session =
        Session::start(&mut container.run_command(&["--rm", "--tty"], BUSYBOX, &["sh"]), (24, 80));

    session.type_in("echo READY $((20+3)); tty\n");
    session.expect("READY 23");
    session.expect("/dev/");
    // ctr sets the size once the task has started; ask until it is there.
    session.type_in("until [ \"$(stty size)\" = '24 80' ]; do :; done; echo FIRST $(stty size)\n");
    session.expect("FIRST 24 80");
    session.resize((50, 132));
    session.type_in("until [ \"$(stty size)\" = '50 132' ]; do :; done; echo SECOND $(stty size)\n");
    session.expect("SECOND 50 132");
    session.type_in("exit 7\n");

    assert_eq!(session.end(), 7);
}

#[test]
fn control_c_interrupts_the_program_in_the_foreground() {
    let container = Container::unborn();
    let script = "trap 'echo CAUGHT; exit 3' INT; echo READY; while :; do sleep 0.1; done";
    let command = ["sh", "-c", script];
    let mut session =
        Session::start(&mut container.run_command(&["--rm", "--tty"], BUSYBOX, &command), (24, 80));

    session.expect("READY");
    session.type_in("\x03");
    session.expect("CAUGHT");

    assert_eq!(session.end(), 3);
}

#[test]
fn an_exec_may_have_a_terminal_too() {
    let container = Container::idle(&[]);
    let mut session = Session::start(&mut container.exec_command(&["--tty"], &["sh"]), (30, 90));
    session.type_in("test -t 0 && test -t 1 && echo IS A TERMINAL $((40+2))\n");
    session.expect("IS A TERMINAL 42");
    session.type_in("exit\n");
    assert_eq!(session.end(), 0);
}

#[test]
fn one_can_attach_to_a_detached_container() {
    let container = Container::unborn();
    // ctr wants a terminal of its own for a container with one, even if it does not stay.
    let run = Session::start(&mut container.run_command(&["--detach", "--tty"], BUSYBOX, &["sh"]), (24, 80));
    assert_eq!(run.end(), 0);
    let mut session = Session::start(mayu_e2e::ctr(["task", "attach"]).arg(container.id()), (24, 80));
    session.type_in("echo ATTACHED $((40+2))\n");
    session.expect("ATTACHED 42");
    session.type_in("exit 5\n");
    assert_eq!(session.end(), 5);
}
