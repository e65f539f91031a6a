//! What a container has to be for the machine to be saved with it.

use super::Container;
use crate::state::State;

impl Container {
    /// What keeps the container, whose init is to be in `state`, from being suspended.
    pub fn obstacle(&self, state: State) -> Option<String> {
        let found = self.init.state();
        if found != state {
            return Some(format!("{} is {found}", self.init));
        }
        if state == State::Paused && !self.init.is_parked() {
            return Some(format!("{} has been resumed meanwhile", self.init));
        }
        if !self.plan.warm {
            return Some(format!("{} was not created as one that may be", self.init));
        }
        let inner = self.inner();
        inner.execs.values().map(|exec| &exec.process).find_map(|process| match process.state() {
            State::Stopped | State::Deleting => {
                process.prints().then(|| format!("somebody may still write the output of {process}"))
            }
            state => Some(format!("{process} is {state}")),
        })
    }
}
