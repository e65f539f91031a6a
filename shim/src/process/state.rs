//! The life of a process, as one table.

use containerd_shim_protos::types::task::Status;

/// Where a process is in its life. States that end in -ing last for as long as the agent is being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The agent is making it.
    Creating,
    /// It is ready to start.
    Created,
    /// The agent is starting it.
    Starting,
    /// It runs.
    Running,
    /// The agent is freezing its container. Only an init process.
    Pausing,
    /// Its container is frozen. Only an init process.
    Paused,
    /// The agent is thawing its container. Only an init process.
    Resuming,
    /// It has ended.
    Stopped,
    /// It is being taken away.
    Deleting,
}

/// What moves a process from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The agent has made it.
    Created,
    /// containerd asks for its start.
    Start,
    /// The agent has started it.
    Started,
    /// containerd asks for a pause.
    Pause,
    /// The agent has frozen the container.
    Paused,
    /// The agent could not freeze the container.
    NotPaused,
    /// containerd asks for a resume.
    Resume,
    /// The agent has thawed the container.
    Resumed,
    /// The agent could not thaw the container.
    NotResumed,
    /// It has ended, or could not be started.
    Exit,
    /// containerd asks for its removal.
    Delete,
    /// The agent could not remove it.
    NotDeleted,
}

impl State {
    /// The state after `step`, or None when the step is not legal. An exit is not legal while a start is
    /// under way: it waits, so that containerd never hears of an end before the beginning.
    pub fn after(self, step: Step) -> Option<Self> {
        Some(match (self, step) {
            (Self::Creating, Step::Created) => Self::Created,
            (Self::Created, Step::Start) => Self::Starting,
            (Self::Starting, Step::Started) => Self::Running,
            (Self::Running, Step::Pause) => Self::Pausing,
            (Self::Pausing, Step::Paused) => Self::Paused,
            (Self::Pausing, Step::NotPaused) => Self::Running,
            (Self::Paused, Step::Resume) => Self::Resuming,
            (Self::Resuming, Step::Resumed) => Self::Running,
            (Self::Resuming, Step::NotResumed) => Self::Paused,
            (Self::Created | Self::Running | Self::Pausing | Self::Paused | Self::Resuming, Step::Exit) => {
                Self::Stopped
            }
            (Self::Created | Self::Stopped, Step::Delete) => Self::Deleting,
            (Self::Deleting, Step::NotDeleted) => Self::Stopped,
            _ => return None,
        })
    }

    /// Whether the process has begun and not ended, or is about to begin.
    pub fn is_alive(self) -> bool {
        !matches!(self, Self::Creating | Self::Created | Self::Stopped | Self::Deleting)
    }

    /// The word for it in a message.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Resuming => "being resumed",
            Self::Stopped => "stopped",
            Self::Deleting => "being deleted",
        }
    }

    /// containerd's idea of it.
    pub fn status(self) -> Status {
        match self {
            Self::Creating | Self::Created | Self::Starting => Status::CREATED,
            Self::Running | Self::Resuming => Status::RUNNING,
            Self::Pausing => Status::PAUSING,
            Self::Paused => Status::PAUSED,
            Self::Stopped | Self::Deleting => Status::STOPPED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use State::{Created, Creating, Deleting, Paused, Pausing, Resuming, Running, Starting, Stopped};

    const STATES: [State; 9] =
        [Creating, Created, Starting, Running, Pausing, Paused, Resuming, Stopped, Deleting];

    fn allowed(step: Step) -> Vec<(State, State)> {
        STATES.into_iter().filter_map(|state| Some((state, state.after(step)?))).collect()
    }

    #[test]
    fn the_whole_table() {
        assert_eq!(allowed(Step::Created), [(Creating, Created)]);
        assert_eq!(allowed(Step::Start), [(Created, Starting)]);
        assert_eq!(allowed(Step::Started), [(Starting, Running)]);
        assert_eq!(allowed(Step::Pause), [(Running, Pausing)]);
        assert_eq!(allowed(Step::Paused), [(Pausing, Paused)]);
        assert_eq!(allowed(Step::NotPaused), [(Pausing, Running)]);
        assert_eq!(allowed(Step::Resume), [(Paused, Resuming)]);
        assert_eq!(allowed(Step::Resumed), [(Resuming, Running)]);
        assert_eq!(allowed(Step::NotResumed), [(Resuming, Paused)]);
        assert_eq!(
            allowed(Step::Exit),
            [Created, Running, Pausing, Paused, Resuming].map(|state| (state, Stopped))
        );
        assert_eq!(allowed(Step::Delete), [(Created, Deleting), (Stopped, Deleting)]);
        assert_eq!(allowed(Step::NotDeleted), [(Deleting, Stopped)]);
    }

    #[test]
    fn an_exit_waits_for_the_end_of_a_start() {
        assert_eq!(Starting.after(Step::Exit), None);
        assert_eq!(Creating.after(Step::Exit), None);
    }
}
