//! The end of all that a job has left, where nothing ends as a whole: a host with neither a PID namespace nor a cgroup
//! for it. Whoever outlives its parent is given to the nearest subreaper (`PR_SET_CHILD_SUBREAPER`), which an init
//! without a PID namespace is; so its children are killed until it has none.

use std::fs;

use nix::errno::Errno;

use super::sys;

/// Kills all children of this process, and theirs as they become its own, and returns when there is none: not before
/// the last of them is gone, however long that takes.
pub fn end_all() {
    loop {
        // Where this is another namespace's /proc, its numbers are other processes'.
        for child in children().into_iter().filter(|child| sys::is_own_child(*child)) {
            // SAFETY: kill(2) takes no memory. It is our unreaped child, so the number is nobody else's.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        match sys::wait_for_any() {
            Ok(()) | Err(Errno::EINTR) => {}
            // ECHILD.
            Err(_) => return,
        }
    }
}

/// Those of this process's one thread; none where the kernel does not list them: then they are waited for.
fn children() -> Vec<i32> {
    let own = std::process::id();
    let list = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sandbox::sys::Cloned;

    /// What left its session and its parent, and ignores every signal that it can.
    #[test]
    fn a_daemon_that_ignores_signals_is_gone_when_it_returns() {
        let folder = tempfile::tempdir().unwrap();
        let (note, flag) = (folder.path().join("pid"), folder.path().join("over"));
        let script =
            format!("trap '' TERM HUP; (trap '' TERM HUP; echo $$ > {0}; exec sleep 600) & wait", note.display());
        // SAFETY: the child makes processes and waits, and leaves by exit_now.
        let pidfd = match unsafe { sys::clone_process(0, None) }.unwrap() {
            Cloned::Child => {
                let set = sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
                let shell = Command::new("setsid").args(["sh", "-c", &script]).spawn();
                while set.is_ok() && shell.is_ok() && !note.exists() {
                    std::thread::yield_now();
                }
                end_all();
                let left = !children().is_empty() || fs::write(&flag, "").is_err();
                sys::exit_now(i32::from(left || set.is_err() || shell.is_err()))
            }
            Cloned::Parent { pidfd, .. } => pidfd,
        };
        let over = loop {
            if let Some(reaped) = sys::wait_pidfd(std::os::fd::AsFd::as_fd(&pidfd), false).unwrap() {
                break reaped;
            }
        };
        assert_eq!(over.raw_status, 0);
        assert!(flag.exists());
    }
}
