//! The life of one process, a container's init or an exec: its states, and what each state allows.

use std::fmt;

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its container is being set up.
    Creating,
    /// Known, but not running its program yet.
    Created,
    /// On its way to its program.
    Starting,
    /// Running its program.
    Running,
    /// Frozen, with the rest of its container.
    Paused,
    /// Ended.
    Stopped,
    /// Being removed.
    Deleting,
}

/// What is done to a process, or happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Its container has been set up.
    FinishCreate,
    /// The caller wants it to run.
    Start,
    /// It runs its program.
    FinishStart,
    /// The caller wants another process beside it.
    Exec,
    /// The caller wants another container in its PID namespace.
    Join,
    /// The caller wants it frozen.
    Pause,
    /// The caller wants it thawed.
    Resume,
    /// The caller makes it, suspended, that of another container, which is started again.
    Adopt,
    /// The caller sends a signal.
    Kill,
    /// The caller changes its terminal's size.
    Resize,
    /// The caller changes its limits or asks for figures.
    Inspect,
    /// It ended.
    Exit,
    /// The caller wants it forgotten.
    Delete,
    /// Forgetting it failed, and may be tried again.
    AbandonDelete,
}

impl State {
    /// The transition table: the state after `action`, or nothing where the action is not allowed.
    pub fn after(self, action: Action) -> Option<Self> {
        use Action::*;
        use State::*;
        match (self, action) {
            (Creating, FinishCreate) => Some(Created),
            (Created, Start) => Some(Starting),
            (Starting, FinishStart) => Some(Running),
            (Running, Pause) => Some(Paused),
            (Paused, Resume) => Some(Running),
            (Paused, Adopt) => Some(Created),
            (Running, Exec) => Some(Running),
            (Running | Paused, Join) => Some(self),
            (Created | Starting | Running | Paused, Kill | Resize | Inspect) => Some(self),
            (Creating | Created | Starting | Running | Paused, Exit) => Some(Stopped),
            (Created | Stopped, Delete) => Some(Deleting),
            (Deleting, AbandonDelete) => Some(Stopped),
            _ => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "being created",
            Self::Created => "created but not started",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FinishCreate => "create",
            Self::Start | Self::FinishStart => "start",
            Self::Exec => "exec in",
            Self::Join => "join the PID namespace of",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Adopt => "adopt",
            Self::Kill => "kill",
            Self::Resize => "resize the terminal of",
            Self::Inspect => "inspect",
            Self::Exit => "end",
            Self::Delete | Self::AbandonDelete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Action::*;
    use super::State::*;
    use super::*;

    const STATES: [State; 7] = [Creating, Created, Starting, Running, Paused, Stopped, Deleting];
    const ACTIONS: [Action; 14] = [
        FinishCreate,
        Start,
        FinishStart,
        Exec,
        Join,
        Pause,
        Resume,
        Adopt,
        Kill,
        Resize,
        Inspect,
        Exit,
        Delete,
        AbandonDelete,
    ];

    fn allowed(state: State) -> Vec<Action> {
        ACTIONS.into_iter().filter(|action| state.after(*action).is_some()).collect()
    }

    #[test]
    fn each_state_allows_what_it_should_and_no_more() {
        assert_eq!(allowed(Creating), [FinishCreate, Exit]);
        assert_eq!(allowed(Created), [Start, Kill, Resize, Inspect, Exit, Delete]);
        assert_eq!(allowed(Starting), [FinishStart, Kill, Resize, Inspect, Exit]);
        assert_eq!(allowed(Running), [Exec, Join, Pause, Kill, Resize, Inspect, Exit]);
        assert_eq!(allowed(Paused), [Join, Resume, Adopt, Kill, Resize, Inspect, Exit]);
        assert_eq!(allowed(Stopped), [Delete]);
        assert_eq!(allowed(Deleting), [AbandonDelete]);
    }

    #[test]
    fn a_life_leads_through_the_states() {
        let life = [FinishCreate, Start, FinishStart, Exec, Pause, Kill, Resume, Exit, Delete];

        let states = life.iter().scan(Creating, |state, action| {
            *state = state.after(*action)?;
            Some(*state)
        });

        let expected = [Created, Starting, Running, Running, Paused, Paused, Running, Stopped, Deleting];
        assert_eq!(states.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_suspended_process_starts_again() {
        let life = [Pause, Adopt, Start, FinishStart];

        let states = life.iter().scan(Running, |state, action| {
            *state = state.after(*action)?;
            Some(*state)
        });

        assert_eq!(states.collect::<Vec<_>>(), [Paused, Created, Starting, Running]);
    }

    #[test]
    fn nothing_but_an_abandoned_delete_returns_from_the_end() {
        for state in STATES {
            for action in ACTIONS.into_iter().filter(|action| *action != AbandonDelete) {
                let after = state.after(action);
                let ended = matches!(state, Stopped | Deleting);
                assert!(!ended || after.is_none() || after == Some(Deleting), "{state} {action}");
            }
        }
    }
}
