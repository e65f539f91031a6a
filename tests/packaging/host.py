"""A host that is a folder: the programs that mayu-node calls on it, and what they do there.

Each program is a few lines of shell that hand their arguments to this process, where a thread answers them.
"""

import json
import os
import subprocess
import threading
from pathlib import Path

import containerd as model
from project import contents, write

CONFIG = "etc/containerd/config.toml"

CALL = """\
#!/bin/sh
name=${0##*/}
if [ "$MADE_UP_INSIDE" != yes ] && [ "$name" != curl ]; then
    echo "$name: there is no such program in the container" >&2
    exit 127
fi
cd "$MADE_UP_CALLS"
printf '%s\\0' "$$" "$name" "$@" > request
read -r status < answer
if [ "$status" = 0 ]; then cat output; else cat output >&2; fi
exit "$status"
"""

NSENTER = """\
#!/bin/sh
[ "$1 $2 $3 $4" = '--target 1 --mount --' ] || exit 2
shift 4
case $1 in /*) program=$HOST$1; shift; set -- "$program" "$@" ;; esac
export MADE_UP_INSIDE=yes
exec "$@"
"""


class Failed(Exception):
    """The program ends with status 1 and this message."""


class Host:
    """`version` is containerd's, `files` what lies on the host. containerd runs with what they say."""

    def __init__(self, directory: Path, version: str, files: dict[str, str]):
        self.root, self.version = directory / "host", version
        self.troubles: set[str] = set()  # what goes wrong: see the programs
        self.calls: list[str] = []  # what was asked of the host, and changes something or could
        self.running: str | None = None  # the settings that containerd runs with, while it does
        for path in ("etc", "proc", "run", "usr/local/bin"):
            (self.root / path).mkdir(parents=True)
        for path, text in files.items():
            write(self.root / path, text)
        self.programs, self.pipes = directory / "bin", directory / "calls"
        self.pipes.mkdir()
        for name in ("request", "answer"):
            os.mkfifo(self.pipes / name)
        for name in ("containerd", "systemctl", "ctr", "curl", "made-up-mayu"):
            write(self.programs / name, CALL, 0o755)
        write(self.programs / "nsenter", NSENTER, 0o755)
        self.restart_containerd()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            pid, name, *arguments = (self.pipes / "request").read_text().split("\0")[:-1]
            try:
                status, output = 0, self.answer(pid, name, arguments) or ""
            except (Failed, model.Refused) as error:
                status, output = 1, f"{name}: {error}\n"
            except Exception as error:  # of the test's own making: it shows in mayu-node's log
                status, output = 99, f"{name} {arguments}: not expected: {error!r}\n"
            (self.pipes / "output").write_text(output)
            (self.pipes / "answer").write_text(f"{status}\n")

    def answer(self, pid: str, name: str, arguments: list[str]) -> str | None:
        match [name, *arguments]:
            case ["containerd", *arguments]:
                return self.containerd(arguments)
            case ["systemctl", "restart", "containerd.service"]:
                self.calls.append("restart")
                return self.restart_containerd()
            case ["ctr", "plugins", "list"]:
                return self.plugins()
            case ["ctr", "--namespace", "k8s.io", *arguments]:
                return self.ctr(arguments)
            case ["made-up-mayu", "check", *options]:
                return self.check(options)
            case ["curl", *arguments]:
                return self.curl(pid, arguments)
        raise ValueError("no such call")

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    def containerd(self, arguments: list[str]) -> str:
        match arguments:
            case ["--version"]:
                return f"containerd github.com/containerd/containerd{'/v2' * (self.version > '2')} {self.version} 0123abc\n"
            case ["config", "default"]:
                return self.default_settings()
            case ["config", "dump"]:
                return self.settings(f"/{CONFIG}")
            case ["--config", path, "config", "dump"]:
                return self.settings(path)
        raise ValueError("no such command")

    def settings(self, path: str) -> str:
        """What containerd would run with."""
        real = self.real("--config", path, "config", "dump")
        return real or model.dump(model.settings(self.root, self.release, path), self.release[0], [path])

    def default_settings(self) -> str:
        return self.real("config", "default") or model.dump(model.merged([], self.release[0]), self.release[0], [])

    def real(self, *arguments: str) -> str | None:
        """What the real containerd says, if there is one of this release: with the host's /etc in the place of its own."""
        program = os.environ.get(f"CONTAINERD_{self.release[0]}_{self.release[1]}")
        if not program:
            return None
        script = 'mount -t tmpfs none /mnt && cp "$1" /mnt/it && shift && mount --bind "$0" /etc && exec /mnt/it "$@"'
        outcome = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, self.root / "etc", program, *arguments],
            capture_output=True, text=True,
        )
        if outcome.returncode:
            raise model.Refused(outcome.stderr)
        return outcome.stdout

    def restart_containerd(self):
        """Fails as systemd's Type=notify units do where containerd does not start."""
        self.running = None
        has_defaults = self.release[0] == 1 and not (self.root / CONFIG).exists()
        text = self.default_settings() if has_defaults else self.settings(f"/{CONFIG}")
        if "dies" in self.troubles or ("dies with handler" in self.troubles and "runtimes.mayu" in text):
            raise Failed("Job for containerd.service failed because the control process exited with error code.")
        self.running = text

    def cri_is_loaded(self) -> bool:
        if "CRI error" in self.troubles or ("CRI error with handler" in self.troubles and "runtimes.mayu" in self.running):
            return False
        return model.cri_loads(model.tomllib.loads(self.running))

    def plugins(self) -> str:
        if self.running is None:
            raise Failed('failed to dial "/run/containerd/containerd.sock": connection refused')
        return (
            "TYPE                            ID           PLATFORMS      STATUS\n"
            "io.containerd.snapshotter.v1    overlayfs    linux/amd64    ok\n"
            f"io.containerd.grpc.v1           cri          -              {'ok' if self.cri_is_loaded() else 'error'}\n"
        )

    def ctr(self, arguments: list[str]) -> str | None:
        match arguments:
            case ["containers", "list", "--quiet", filters]:
                return "own\n" if 'labels."io.kubernetes.pod.uid"==0001-ab' in filters.split(",") else ""
            case ["containers", "info", "own"]:
                info = {"ID": "own", "Image": "example.org/mayu-node:1", "Snapshotter": "native", "Spec": {}}
                return json.dumps(info, indent=4)
            case [
                "run", "--rm", "--runtime", "io.containerd.mayu.v2", "--snapshotter", "native", "example.org/mayu-node:1",
                name, *command,
            ]:
                self.calls.append(f"run {name} {' '.join(command)}")
                if "no test pod" in self.troubles:
                    raise Failed("failed to create shim task: the guest did not start")
                return f"{os.uname().release if 'host kernel' in self.troubles else '6.12.1-mayu'}\r\n"
            case [("tasks" | "containers"), ("kill" | "delete"), *_, "mayu-node-test"]:
                return None
        raise ValueError("no such command")

    def curl(self, pid: str, arguments: list[str]) -> None:
        options = dict(zip(arguments, arguments[1:]))
        header = Path(options["--config"].replace("/dev", f"/proc/{pid}")).read_text()
        if header != 'header = "Authorization: Bearer secret"\n' or any("secret" in word for word in arguments):
            raise Failed("no token, or one that everybody on the node can see")
        if "API down" in self.troubles:
            raise Failed("(22) The requested URL returned error: 403")
        if arguments[-1] != "https://[fd00::1]:443/api/v1/nodes/node-1" or options["--request"] != "PATCH":
            raise ValueError("not the node")
        self.calls.append(f"label {json.loads(options['--data'])['metadata']['labels']['mayu.io/ready']}")

    def check(self, options: list[str]) -> None:
        self.calls.append(" ".join(["mayu check", *options]))
        if "no KVM" in self.troubles:
            raise Failed("FAIL  kvm                /dev/kvm is missing")
        if not options and "runtimes.mayu" not in self.running:
            raise Failed("FAIL  cri-handler        containerd knows no runtime handler mayu")

    def start_pod(self) -> Path:
        """Gives the link that has to go for the pod to end."""
        (self.root / "proc/4711").mkdir()
        link = self.root / "proc/4711/exe"
        link.symlink_to("/usr/local/bin/containerd-shim-mayu-v2")
        return link

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def parsed(self, path: str) -> dict:
        return model.tomllib.loads(self.read(path))

    def runtimes(self) -> dict:
        """The runtimes that containerd runs with."""
        plugins = model.tomllib.loads(self.running)["plugins"]
        return plugins.get(model.NEW, plugins.get(model.OLD))["containerd"]["runtimes"]

    def files(self) -> dict:
        """What is there and survives a reboot."""
        return {path: data for path, data in contents(self.root).items() if not path.startswith(("run", "proc"))}
