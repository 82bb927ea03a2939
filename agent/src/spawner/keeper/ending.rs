//! How attempts run and end: what their inits tell, deadlines, kills, and the proof that nothing is left.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use muster_core::spec::CHECKPOINT_SIGNALS;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{
    Keeper,
    spares::{Folder, ready},
};
use crate::{
    sandbox::{
        cgroup,
        fences::Fence,
        files,
        lease::TERM_MS,
        order,
        status::{self, Failure, Remains, Status, Step},
        sys::{self, Cloned, Reaped},
    },
    spawner::{
        attempt::{Reason, Stage, Word},
        protocol::{AttemptKey, Ended, Event},
        sandbox::{Sandbox, between},
    },
};

/// A killed attempt that is not gone by then is killed again, and the operator told.
const STUCK_US: u64 = 10_000_000;
/// How the names of folders begin that a killed spawner left.
const LEFT: &str = "left-";

/// What is left of a sandbox that is over; dropping it takes it apart.
pub struct Rubbish {
    group: Option<cgroup::Group>,
    _descriptors: (OwnedFd, OwnedFd),
}

impl Drop for Rubbish {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            group.remove();
        }
    }
}

impl Rubbish {
    pub fn of(sandbox: Sandbox) -> Self {
        Self { group: sandbox.group, _descriptors: (sandbox.control, sandbox.pidfd) }
    }
}

impl Keeper {
    /// Something happened to this attempt: reap its init, read what it told, see whether all is gone.
    pub(super) fn look_at(&mut self, key: AttemptKey) {
        self.reap_init(key);
        // After the reaping: what an init that has ended told before is all there by then.
        self.hear_init(key);
        let Some(attempt) = self.attempts.get(&key) else { return };
        let Stage::Live(live) = &attempt.stage else { return };
        let Some(reaped) = live.reaped else { return };
        if live.sandbox.group.as_ref().is_none_or(cgroup::Group::is_empty) {
            let (ended, _) = attempt.conclude(live, reaped);
            self.close(key, ended);
        }
    }

    /// Its init says that the job is over. With nothing running but the init, which is ours, that is the attempt's end:
    /// nobody waits for the init's own. Whether nothing runs is the kernel's word, where there is a group to ask.
    fn hear_end(&mut self, key: AttemptKey, remains: Remains, used: Reaped) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &attempt.stage else { return };
        let alone = live.sandbox.group.as_ref().is_none_or(|group| group.holds_only(live.sandbox.pid));
        // What is being ended is ended to the last process, the init too.
        if remains == Remains::Processes || !alone || live.ending.is_some() || live.reaped.is_some() {
            return;
        }
        let (ended, after) = attempt.conclude(live, used);
        let as_new = remains == Remains::Nothing;
        let over = Stage::Over { ended, folder: None };
        let Stage::Live(live) = std::mem::replace(&mut attempt.stage, over) else { return };
        let mut sandbox = live.sandbox;
        sandbox.before = after;
        if as_new {
            // Nothing is in the folder, so nobody needs it for this attempt any more.
            (sandbox.folder_on_disk, attempt.identity) = (attempt.folder_on_disk.take(), None);
        } else {
            sandbox.identity = None;
            if let Stage::Over { folder, .. } = &mut attempt.stage {
                *folder = sandbox.folder.take();
            }
        }
        let (event, owner) = (attempt.ended_event(), attempt.owner.clone());
        self.tokens.remove(&sandbox.token);
        self.fenced.remove(&key);
        self.retime(key);
        self.take_back(sandbox, owner, as_new);
        if let Some(event) = event {
            self.tell(&event, Vec::new());
        }
    }

    fn reap_init(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        if live.reaped.is_some() {
            return;
        }
        if let Ok(Some(reaped)) = sys::wait_pidfd(live.sandbox.pidfd.as_fd(), true) {
            live.reaped = Some(reaped);
            // A dead process stays readable for ever.
            let _not_watched = self.epoll.delete(live.sandbox.pidfd.as_fd());
            if let Some(group) = live.sandbox.group.as_ref().filter(|group| !group.is_empty()) {
                // Watched only from here on, after a look: before, each birth in it would wake us up for nothing.
                let _watched =
                    self.epoll.add(group.events(), EpollEvent::new(EpollFlags::EPOLLPRI, live.sandbox.token));
                let _already_empty = group.kill();
                let now = sys::boottime_us();
                live.look_again_at_us = live.look_again_at_us.or(Some(now + STUCK_US));
                self.retime(key);
            }
        }
    }

    fn close(&mut self, key: AttemptKey, ended: Ended) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = std::mem::replace(&mut attempt.stage, Stage::Over { ended, folder: None }) else {
            return;
        };
        let mut sandbox = live.sandbox;
        if let Stage::Over { folder, .. } = &mut attempt.stage {
            *folder = sandbox.folder.take();
        }
        let (event, owner) = (attempt.ended_event(), attempt.owner.clone());
        self.tokens.remove(&sandbox.token);
        self.fenced.remove(&key);
        self.retime(key);
        self.unwatch(sandbox.control.as_fd());
        if let Some(group) = sandbox.group.as_ref().filter(|_| live.look_again_at_us.is_some()) {
            self.unwatch(group.events());
        }
        if let Some(network) = sandbox.network.take() {
            self.spares.shelve_network(&owner, network);
        }
        self.rubbish.push(Rubbish::of(sandbox));
        if let Some(event) = event {
            self.tell(&event, Vec::new());
        }
    }

    fn hear_init(&mut self, key: AttemptKey) {
        loop {
            let Some(attempt) = self.attempts.get_mut(&key) else { return };
            let Stage::Live(live) = &mut attempt.stage else { return };
            match status::receive(live.sandbox.control.as_fd()) {
                status::Received::Status(Status::Parked { network_joined, assemble_us }, beside) => {
                    live.sandbox.made.assemble_us = assemble_us;
                    match ready(&self.fences, self.rootless, &mut live.sandbox, network_joined, beside) {
                        Ok(()) => self.hand_over(key),
                        Err(error) => {
                            let errno = error.raw_os_error().unwrap_or(libc::EIO);
                            live.word = Some(Word::Failed(Failure { step: Step::UserMap, errno }));
                            self.kill(key);
                        }
                    }
                }
                status::Received::Status(Status::Started { received_us, inputs_us, started_us }, _) => {
                    live.started_us = Some(started_us);
                    live.phases.handover_us = between(live.sent_us, received_us);
                    live.phases.inputs_us = between(received_us, inputs_us);
                    live.phases.exec_us = between(inputs_us, started_us);
                    let Stage::Live(live) = &attempt.stage else { return };
                    let running = attempt.running(live);
                    let pipes = attempt.pipes.clone();
                    self.tell(&Event::Started { attempt: key, running }, pipes);
                    self.retime(key);
                }
                // The job's own end, told before, stands.
                status::Received::Status(Status::Failed(failure), _) => {
                    live.word = live.word.take().or(Some(Word::Failed(failure)));
                }
                status::Received::Status(
                    Status::Ended { raw_status, told, boottime_us, remains, cpu_us, memory_peak_bytes },
                    _,
                ) => {
                    live.word = Some(Word::Own { raw_status, told });
                    live.ended_us = Some(boottime_us);
                    let cpu_us = live.sandbox.before.cpu_us + cpu_us;
                    self.hear_end(key, remains, Reaped { raw_status, cpu_us, memory_peak_bytes });
                }
                status::Received::Status(Status::LeaseEnded { .. }, _) => {
                    live.ending = live.ending.or(Some(Reason::LeaseEnded));
                }
                status::Received::Status(Status::TimeLimitEnded { .. }, _) => {
                    live.ending = live.ending.or(Some(Reason::TimedOut));
                }
                status::Received::Nothing => return,
                status::Received::Closed => {
                    // A closed one stays readable for ever, and what is left of the job may take its time to die.
                    let _not_watched = self.epoll.delete(live.sandbox.control.as_fd());
                    return;
                }
            }
        }
    }

    /// SIGTERM, the grace, then everything. A second order may only shorten the grace.
    pub(super) fn end(&mut self, key: AttemptKey, reason: Reason, grace_ms: u64) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        let over = time_over_us(attempt.time_limit_ms, attempt.grace_ms, live.started_us);
        let kill_at = sys::boottime_us().saturating_add(grace_ms.saturating_mul(1_000)).min(over);
        live.kill_at_us = Some(live.kill_at_us.map_or(kill_at, |earlier| earlier.min(kill_at)));
        // One that waits for its sandbox never ran: there is nobody to ask.
        let never_ran = live.order.take().is_some();
        // Who was asked to save has no more time for it.
        let was_asked = live.term_at_us.take().is_some();
        if live.ending.is_none() || was_asked {
            live.ending = live.ending.or(Some(reason));
            let _init_is_gone = nix::unistd::write(&live.sandbox.control, &[order::TERMINATE]);
        }
        // It stays fenced until it is over: a grace is no time to run on without a lease (FL-3).
        if grace_ms == 0 || never_ran {
            self.kill(key);
        }
        self.retime(key);
    }

    /// This signal and the grace, then as [`Self::end`]. Repeated it changes nothing.
    pub(super) fn ask_to_save(&mut self, key: AttemptKey, signal: u8, grace_ms: u64) {
        if !CHECKPOINT_SIGNALS.iter().any(|(_, number)| *number == signal) {
            return self.deny(Some(key), format!("a job is not asked by signal {signal}"));
        }
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        if live.ending.is_some() {
            return;
        }
        if live.order.is_some() {
            // It never ran: there is nothing to save.
            return self.end(key, Reason::Stopped, 0);
        }
        let asked = nix::unistd::write(&live.sandbox.control, &[order::SIGNAL, signal]);
        if asked.is_err() {
            return;
        }
        let now = sys::boottime_us();
        let over = time_over_us(attempt.time_limit_ms, attempt.grace_ms, live.started_us);
        live.ending = Some(Reason::Stopped);
        live.term_at_us = Some(now.saturating_add(grace_ms.saturating_mul(1_000)).min(over));
        live.kill_at_us = Some(now.saturating_add(grace_ms.saturating_mul(2_000)).min(over));
        self.retime(key);
    }

    fn kill(&mut self, key: AttemptKey) {
        let Some(attempt) = self.attempts.get_mut(&key) else { return };
        let Stage::Live(live) = &mut attempt.stage else { return };
        live.kill_at_us = None;
        live.look_again_at_us = Some(sys::boottime_us() + STUCK_US);
        let as_a_whole = live.sandbox.group.is_some() || live.sandbox.shape.fences.has(Fence::NsPid);
        // An init of the former program may not know this order.
        if !as_a_whole && live.started_us.is_some() && !live.is_taken_over {
            // It ends all that there is, and only then itself: killed, it would leave what is not gone yet.
            let _gone = sys::signal_pidfd(live.sandbox.pidfd.as_fd(), libc::SIGCONT);
            let _gone = nix::unistd::write(&live.sandbox.control, &[order::KILL]);
            return self.retime(key);
        }
        if let Some(group) = &live.sandbox.group {
            let _empty = group.kill();
        }
        // Pid 1 takes its whole namespace with it.
        let _gone = sys::signal_pidfd(live.sandbox.pidfd.as_fd(), libc::SIGKILL);
        self.retime(key);
    }

    pub(super) fn meet_deadlines(&mut self) {
        let now = sys::boottime_us();
        while let Some((due, key)) = self.timers.first().copied()
            && due <= now
        {
            self.meet_deadline(key, now);
            self.retime(key);
        }
        if self.lease_due_us().is_some_and(|due| due <= now) {
            for key in std::mem::take(&mut self.fenced) {
                self.end(key, Reason::LeaseEnded, TERM_MS);
            }
        }
        self.tidy_spares(now);
    }

    fn meet_deadline(&mut self, key: AttemptKey, now: u64) {
        let Some(attempt) = self.attempts.get(&key) else { return };
        let Stage::Live(live) = &attempt.stage else { return };
        if live.kill_at_us.is_some_and(|at| at <= now) {
            self.kill(key);
        } else if live.look_again_at_us.is_some_and(|at| at <= now) {
            tracing::error!(attempt = ?key, "it does not end after SIGKILL; it is killed again");
            self.tell(&Event::Stuck { attempt: key }, Vec::new());
            self.kill(key);
        } else if live.term_at_us.is_some_and(|at| at <= now) {
            self.end(key, Reason::Stopped, attempt.grace_ms);
        } else {
            self.end(key, Reason::TimedOut, attempt.grace_ms);
        }
    }

    pub(super) fn forget(&mut self, key: AttemptKey) {
        match self.attempts.get(&key).map(|attempt| &attempt.stage) {
            Some(Stage::Over { .. }) => {}
            Some(Stage::Live(_)) => return self.deny(Some(key), "it is not over"),
            None => return,
        }
        let Some(attempt) = self.attempts.remove(&key) else { return };
        let Some(uid) = attempt.identity else { return self.remove_folder(attempt.folder_on_disk.as_deref()) };
        if let (Stage::Over { folder: Some(folder), .. }, Some(path)) = (&attempt.stage, &attempt.folder_on_disk)
            && !self.stopping
            && files::is_as_new(folder.as_fd(), uid)
        {
            let no_room = self.spares.shelve_folder(&attempt.owner, Folder { uid, path: path.clone() });
            if no_room.is_none() {
                return;
            }
        }
        self.uids.give_back(uid);
        self.remove_folder(attempt.folder_on_disk.as_deref());
    }

    pub(super) fn remove_folder(&mut self, folder: Option<&Path>) {
        // Mostly it is empty; only a tree is worth a child.
        if let Some(folder) = folder
            && fs::remove_dir(folder).is_err()
            && let Some(helper) = remove_in_child(folder)
        {
            self.reap_later(helper);
        }
    }
}

/// However long a grace is asked: the time limit holds.
fn time_over_us(limit_ms: u64, grace_ms: u64, started_us: Option<u64>) -> u64 {
    match (limit_ms, started_us) {
        (1.., Some(started)) => started.saturating_add((limit_ms + grace_ms).saturating_mul(1_000)),
        _ => u64::MAX,
    }
}

/// Folders of a spawner that was killed keep no name from the sandboxes of the next, whose names begin anew: they
/// get one of their own, under which they are to be removed. Also what an earlier start did not come to remove.
pub(super) fn set_aside_what_is_left(state: &Path) -> io::Result<Vec<PathBuf>> {
    let aside = state.join(format!("{LEFT}{}", sys::boottime_us()));
    match fs::rename(state.join("work"), aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => (),
    }
    let entries = fs::read_dir(state)?.flatten();
    Ok(entries
        .filter(|entry| entry.file_name().as_bytes().starts_with(LEFT.as_bytes()))
        .map(|entry| entry.path())
        .collect())
}

/// Off the loop: a large tree takes time.
fn remove_in_child(folder: &Path) -> Option<OwnedFd> {
    // SAFETY: one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(0, None) } {
        Ok(Cloned::Child) => sys::exit_now(i32::from(fs::remove_dir_all(folder).is_err())),
        Ok(Cloned::Parent { pidfd, .. }) => Some(pidfd),
        Err(_) => None,
    }
}
