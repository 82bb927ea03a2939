//! The last child to go. It waits for the parent's end, then for the end of
//! all other children, and then removes the run's folder.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use super::{folder, pipes};
use crate::{args::Janitor, exit::Exit};

/// What a child's last breath may still hold in the folder is waited for this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Runs until there is nothing left.
pub fn run(janitor: &Janitor) -> ExitCode {
    let waited = pipes::wait_for_end(janitor.parent_fd).and_then(|()| pipes::wait_for_end(janitor.children_fd));
    if waited.is_err() {
        return Exit::Usage.into();
    }
    let deadline = Instant::now() + PATIENCE;
    while folder::remove(&janitor.folder).is_err() {
        if Instant::now() >= deadline {
            return Exit::Failed.into();
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Exit::Ok.into()
}
