//! What the agent holds of one attempt beside the rules: what to run, its
//! output, its outputs, its usage, and the report of its end.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use muster_core::{
    host::{Boottime, StartOrder},
    ids::AttemptId,
    limits,
};
use muster_proto::v1;
use tokio::{sync::Notify, task::AbortHandle};

use crate::{
    collect::{Found, Stored},
    order::{self, Note},
    output::{BOTH, Moved, Output, WatchedPipe, Which},
    spawner::protocol::{AttemptKey, Collected, Ended, Running, StartPhases},
    state::{StateFolder, key_name},
    usage::AttemptMeter,
};

/// One attempt.
pub struct Job {
    /// The spawner's name of it.
    pub key: AttemptKey,
    /// Its output, shared with the task that watches its pipes.
    pub output: Rc<RefCell<Output>>,
    /// What it uses.
    pub meter: AttemptMeter,
    /// What the spawner said at its start.
    pub running: Option<Running>,
    /// What the spawner said at its end.
    pub ended: Option<Ended>,
    /// How far its order is.
    pub handover: Handover,
    /// How far its pipes are.
    pub pipes: Pipes,
    /// How far its output files are.
    pub collection: Collection,
    /// It is over, and what it left is being stored.
    pub sealing: bool,
    /// Why it was stopped is noted on the disk.
    pub stop_noted: bool,
    /// The report of its end, until it is acknowledged.
    pub report: Option<Box<v1::AttemptEnded>>,
    /// How often its order was sent and not read.
    unread: u32,
    outputs: Vec<Vec<u8>>,
    watch: Option<AbortHandle>,
}

/// An order is sent at most so often without being read.
const UNREAD_MAX: u32 = 16;

/// How far an order is.
pub enum Handover {
    /// Waits for its turn.
    Waiting(Rc<v1::JobBody>, Box<v1::StartAttempt>),
    /// Its inputs are being fetched.
    Fetching(Rc<v1::JobBody>, Box<v1::StartAttempt>, AbortHandle),
    /// Sent to a spawner that has not answered: lost with the connection, or there.
    Sent(Rc<v1::JobBody>, Box<v1::StartAttempt>),
    /// The spawner has it, or had it.
    Done,
}

/// How far the read ends of its pipes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipes {
    /// They come with its start.
    None,
    /// The spawner is asked to hand them out again.
    Asked,
    /// They are here, or there are none.
    Here,
}

/// How far its output files are.
pub enum Collection {
    /// To be asked for when it is over.
    Wanted,
    /// The spawner hands them out.
    Asked(Found),
    /// They are being stored.
    Storing(AbortHandle),
    /// All is stored, or nothing is wanted.
    Done(Stored),
}

impl Job {
    /// A fresh order.
    #[must_use]
    pub fn ordered(state: &StateFolder, order: &StartOrder, body: Rc<v1::JobBody>, start: v1::StartAttempt) -> Self {
        let key = order::key_of(order);
        let note = Note::of(&body);
        let output = Output::fresh(&state.spool(), &key_name(key), note.output_limit);
        Self::new(key, output, note.outputs, Handover::Waiting(body, Box::new(start)))
    }

    /// One that the spawner held when this agent came.
    #[must_use]
    pub fn adopted(state: &StateFolder, key: AttemptKey, note: Note) -> Self {
        let output = Output::adopt(&state.spool(), &key_name(key), note.output_limit);
        let mut job = Self::new(key, output, note.outputs, Handover::Done);
        job.stop_noted = state.noted_stop(key).is_some();
        job
    }

    fn new(key: AttemptKey, output: Output, outputs: Vec<Vec<u8>>, handover: Handover) -> Self {
        let collection = if outputs.is_empty() { Collection::Done(Stored::default()) } else { Collection::Wanted };
        Self {
            key,
            output: Rc::new(RefCell::new(output)),
            meter: AttemptMeter::default(),
            running: None,
            ended: None,
            handover,
            pipes: Pipes::None,
            collection,
            sealing: false,
            stop_noted: false,
            report: None,
            unread: 0,
            outputs,
            watch: None,
        }
    }

    /// The spawner that its order was sent to does not list it, and what a spawner has taken it lists until we forget
    /// it: the order was lost with a connection, as one is that waits there while a spawner is upgraded. False: that has
    /// happened too often; it may be this very order that breaks them.
    pub fn take_back_unread(&mut self) -> bool {
        self.handover = match std::mem::replace(&mut self.handover, Handover::Done) {
            Handover::Sent(body, start) => {
                self.unread += 1;
                Handover::Waiting(body, start)
            }
            other @ (Handover::Waiting(..) | Handover::Fetching(..) | Handover::Done) => other,
        };
        self.unread <= UNREAD_MAX
    }

    /// Did user code ever run?
    #[must_use]
    pub fn ran(&self) -> bool {
        self.running.is_some() || self.ended.as_ref().is_some_and(|ended| ended.start_us > 0)
    }

    /// Takes over its pipes.
    pub fn attach(&mut self, pipes: Vec<OwnedFd>) {
        self.stop_watching();
        self.pipes = Pipes::Here;
        self.output.borrow_mut().attach(pipes);
    }

    /// A task watches its pipes from now on, if it still runs.
    pub fn watch(&mut self, attempt: AttemptId, dirty: &Rc<Dirty>) {
        if self.watch.is_none() && self.ended.is_none() && !self.sealing {
            let task = watch(attempt, Rc::clone(&self.output), Rc::clone(dirty));
            self.watch = Some(tokio::task::spawn_local(task).abort_handle());
        }
    }

    /// Takes what its pipes still hold; nothing more will come.
    pub fn drain(&mut self) {
        self.stop_watching();
        self.output.borrow_mut().drain();
    }

    /// Paths that come back.
    #[must_use]
    pub fn outputs(&self) -> &[Vec<u8>] {
        &self.outputs
    }

    /// None of its output files can be had.
    pub fn skip_outputs(&mut self, reason: &str) {
        let skipped = |path: &Vec<u8>| v1::SkippedOutput { path: path.clone().into(), reason: reason.to_owned() };
        let skipped = self.outputs.iter().map(skipped).collect();
        self.collection = Collection::Done(Stored { outputs: Vec::new(), skipped });
    }

    /// Adds a part of the spawner's answer; true if it was asked.
    pub fn add_outputs(&mut self, files: Vec<(Vec<u8>, Collected)>, descriptors: Vec<OwnedFd>) -> bool {
        if let Collection::Asked(found) = &mut self.collection {
            found.add(files, descriptors);
            true
        } else {
            false
        }
    }

    /// Few enough unstored bytes to travel with the report. What was spooled before a loss is whole, and goes first
    /// too: a longer tail is refused together with the stream that brings it.
    #[must_use]
    pub fn log_fits_report(&self) -> bool {
        self.output.borrow().unstored() <= limits::INLINE_TAIL_BYTES_MAX as u64
    }

    /// The report of its end, but for how it ended; false: output could not be kept.
    #[must_use]
    pub fn make_report(&mut self, now: Boottime) -> bool {
        let output = self.output.borrow();
        let tails = output.tails();
        let kept = tails.is_ok() && !output.is_lost();
        let (wall_ms, fences, usage) = match (&self.ended, &self.running) {
            (Some(ended), _) => {
                (ended.wall_ms, ended.fences.clone(), Some(self.meter.final_usage(ended, Instant::now())))
            }
            // The spawner died with it: our samples are all there is.
            (None, Some(running)) => {
                (now.0.saturating_sub(running.started_boottime_ms), running.fences.clone(), self.meter.usage())
            }
            (None, None) => (0, Vec::new(), None),
        };
        let (start_us, phases) = match (&self.ended, &self.running) {
            (Some(ended), _) => (ended.start_us, ended.phases),
            (None, Some(running)) => (running.start_us, running.phases),
            (None, None) => (0, StartPhases::default()),
        };
        let stored = match &mut self.collection {
            Collection::Done(stored) => std::mem::take(stored),
            Collection::Wanted | Collection::Asked(_) | Collection::Storing(_) => Stored::default(),
        };
        self.report = Some(Box::new(v1::AttemptEnded {
            end: None,
            usage,
            wall_ms,
            tails: tails.unwrap_or_default(),
            outputs: stored.outputs,
            skipped_outputs: stored.skipped,
            fences,
            output_truncated: output.is_truncated(),
            start_us,
            phases: order::phases_to_wire(phases),
        }));
        kept
    }

    fn stop_watching(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.abort();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.stop_watching();
        if let Handover::Fetching(_, _, task) = &self.handover {
            task.abort();
        }
        if let Collection::Storing(task) = &self.collection {
            task.abort();
        }
    }
}

/// Attempts with output that was not handed to the upload yet.
#[derive(Default)]
pub struct Dirty {
    attempts: RefCell<BTreeSet<AttemptId>>,
    /// Wakes the agent's loop.
    pub notify: Notify,
}

impl Dirty {
    /// There is more of it.
    pub fn mark(&self, attempt: AttemptId) {
        if self.attempts.borrow_mut().insert(attempt) {
            self.notify.notify_one();
        }
    }

    /// All of it is on its way.
    pub fn clear(&self, attempt: AttemptId) {
        self.attempts.borrow_mut().remove(&attempt);
    }

    /// Those with more, in order.
    #[must_use]
    pub fn list(&self) -> Vec<AttemptId> {
        self.attempts.borrow().iter().copied().collect()
    }
}

/// A short job's pipes are read once, at its end, and never watched. One that
/// fills its pipe at once waits for no longer than this.
pub const WATCH_AFTER: Duration = Duration::from_millis(5);

async fn watch(attempt: AttemptId, output: Rc<RefCell<Output>>, dirty: Rc<Dirty>) {
    let streams = BOTH.map(|which| watch_stream(attempt, which, &output, &dirty));
    futures_util::future::join_all(streams).await;
}

async fn watch_stream(attempt: AttemptId, which: Which, output: &RefCell<Output>, dirty: &Dirty) {
    let Some(pipe) = output.borrow().pipe(which) else { return };
    let watched = match WatchedPipe::watch(pipe) {
        Ok(watched) => watched,
        Err(error) => {
            // Its bytes are taken at its end; until then it may have to wait.
            tracing::warn!(%attempt, %error, "cannot watch a job's output");
            return;
        }
    };
    while let Ok(mut ready) = watched.readable().await {
        let moved = output.borrow_mut().pull(which);
        match moved {
            Moved::Bytes => {
                dirty.mark(attempt);
                // A job that writes without end must not hold up heartbeats.
                tokio::task::yield_now().await;
            }
            Moved::Nothing => ready.clear_ready(),
            Moved::End => return,
        }
    }
}
