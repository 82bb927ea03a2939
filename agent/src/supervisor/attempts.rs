//! What becomes of one attempt: handed to the spawner, watched, sealed,
//! reported, forgotten.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::OwnedFd,
    rc::Rc,
    time::Instant,
};

use muster_core::{
    effect::StopReason,
    end::End,
    host::{Adopted, AdoptedPhase, HostEvent, Verdict},
    ids::{AttemptId, Epoch},
    limits,
};
use muster_proto::{convert, v1};
use nix::errno::Errno;

use super::{Notice, Supervisor, word_of};
use crate::{
    chain, clock,
    collect::{COLLECTED_AT_ONCE_MAX, Found, PATHS_AT_ONCE_MAX, Stored},
    inputs::{self, InputError, Inputs},
    job::{Collection, Handover, Job, Pipes, WATCH_AFTER},
    order::{self, Note},
    output::key_of,
    spawner::protocol::{AttemptKey, Event, NOTE_BYTES_MAX, Phase, Request},
    spawner_link::{Greeting, LinkError},
    state::key_name,
    uploads::{self, Upload, UploadNotice},
};

impl Supervisor {
    /// Adopts what the spawner holds, and finds what it lost. `is_new`: it is not the one that we spoke with before.
    pub(super) fn take_over(&mut self, greeting: Greeting, is_new: bool) {
        let (mut held, mut unsendable) = (Vec::new(), Vec::new());
        let mut listed = BTreeSet::new();
        for one in greeting.held {
            let note = Note::decode(&one.note);
            let Ok(order) = note.start_order(one.attempt) else {
                tracing::error!(attempt = ?one.attempt, "the spawner holds an attempt with an impossible name");
                continue;
            };
            let attempt = order.attempt;
            listed.insert(attempt);
            let phase = self.adopt(attempt, one.attempt, note, one.phase);
            held.push(Adopted { order, phase, stopping: self.state.noted_stop(one.attempt) });
        }
        for (attempt, job) in &mut self.jobs {
            if !is_new && !listed.contains(attempt) && !job.take_back_unread() {
                unsendable.push(*attempt);
            }
            let unsent = match &job.handover {
                Handover::Waiting(body, start) | Handover::Fetching(body, start, _) => {
                    order::start_order(body, start).ok()
                }
                Handover::Sent(..) | Handover::Done => None,
            };
            match unsent {
                // Its inputs are being fetched, or it is handed over again below: held here, not there yet.
                Some(order) if self.host.running().any(|running| running == *attempt) => {
                    held.push(Adopted { order, phase: AdoptedPhase::Running, stopping: None });
                }
                Some(_) => {}
                None if !listed.contains(attempt) => {
                    // Its sandbox is gone: what we hold of its output is all there is.
                    job.pipes = Pipes::Here;
                    if !matches!(job.collection, Collection::Done(_) | Collection::Storing(_)) {
                        job.skip_outputs("the spawner lost it");
                    }
                }
                None => {}
            }
        }
        self.tell(HostEvent::SpawnerListed { spawner: greeting.spawner_id, held });
        self.settle();
        for attempt in unsendable {
            self.fail_start(attempt, "order", Errno::EIO);
        }
        let is_unsent = |job: &Job| matches!(job.handover, Handover::Waiting(..));
        let unsent: Vec<_> =
            self.host.running().filter(|attempt| self.jobs.get(attempt).is_some_and(is_unsent)).collect();
        for attempt in unsent {
            self.start(attempt);
        }
        let sealing: Vec<_> = self.jobs.iter().filter(|(_, job)| job.sealing).map(|(attempt, _)| *attempt).collect();
        for attempt in sealing {
            self.seal(attempt);
        }
    }

    fn adopt(&mut self, attempt: AttemptId, key: AttemptKey, note: Note, phase: Phase) -> AdoptedPhase {
        let job = self.jobs.entry(attempt).or_insert_with(|| {
            tracing::info!(%attempt, "adopted");
            Job::adopted(&self.state, key, note)
        });
        job.handover = Handover::Done;
        if let Collection::Asked(_) = job.collection {
            // The answer went to the old connection.
            job.collection = Collection::Wanted;
        }
        let ask = job.pipes != Pipes::Here;
        if ask {
            job.pipes = Pipes::Asked;
        }
        let phase = match phase {
            Phase::Running(running) => {
                job.running = Some(running);
                AdoptedPhase::Running
            }
            Phase::Stopping(running) => {
                job.running = Some(running);
                AdoptedPhase::Stopping
            }
            Phase::Ended(ended) => {
                let verdict = order::verdict_of(&ended.verdict);
                job.ended = Some(ended);
                AdoptedPhase::Ended(verdict)
            }
        };
        if ask {
            self.ask_spawner(&Request::Attach { attempt: key });
        }
        phase
    }

    /// Spool files and stop notes of attempts that the spawner does not hold are of a host that is gone.
    pub(super) fn sweep_spool(&self, greeting: &Greeting) {
        let held: BTreeSet<String> = greeting.held.iter().map(|held| key_name(held.attempt)).collect();
        for folder in [self.state.spool(), self.state.root().join("stops")] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let key = key_of(&name);
                if !held.contains(key) {
                    // What stays behind is tried again at the next start.
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
    }

    pub(super) fn on_spawner_event(&mut self, event: Event, descriptors: Vec<OwnedFd>) {
        match event {
            Event::Started { attempt, running } => {
                if let Some((attempt, job)) = job_of(&mut self.jobs, attempt) {
                    job.handover = Handover::Done;
                    job.running = Some(running);
                    job.attach(descriptors);
                    self.unwatched.push_back((Instant::now() + WATCH_AFTER, attempt));
                    self.tell(HostEvent::Started { attempt });
                }
            }
            Event::Attached { attempt } => {
                if let Some((attempt, job)) = job_of(&mut self.jobs, attempt) {
                    job.attach(descriptors);
                    self.unwatched.push_back((Instant::now(), attempt));
                    self.seal(attempt);
                }
            }
            Event::Ended { attempt, end } => {
                let leaves = self.spawner_waits();
                if let Some((attempt, job)) = job_of(&mut self.jobs, attempt) {
                    let verdict = match order::verdict_of(&end.verdict) {
                        Verdict::Stopped if leaves => Verdict::Left,
                        other => other,
                    };
                    job.handover = Handover::Done;
                    job.ended = Some(end);
                    self.tell(HostEvent::Ended { attempt, verdict });
                }
            }
            Event::Outputs { attempt, files, last } => {
                if let Some((attempt, job)) = job_of(&mut self.jobs, attempt)
                    && job.add_outputs(files, descriptors)
                    && last
                {
                    self.store_outputs(attempt);
                }
            }
            Event::Stuck { attempt } => self.tell_stuck(attempt),
            Event::Denied { attempt, reason } => self.on_denied(attempt, reason),
            Event::Leaving { within_ms } => self.on_leaving(within_ms),
            Event::Welcome { .. } | Event::Held { .. } | Event::HeldAll => {
                self.on_link_failed(&LinkError::OutOfOrder("a greeting"));
            }
        }
    }

    pub(super) fn watch_those_that_still_run(&mut self, now: Instant) {
        while let Some((at, attempt)) = self.unwatched.front().copied()
            && at <= now
        {
            self.unwatched.pop_front();
            if let Some(job) = self.jobs.get_mut(&attempt) {
                job.watch(attempt, &self.dirty);
            }
        }
    }

    fn tell_stuck(&mut self, key: AttemptKey) {
        let Ok(attempt) = order::attempt_of(key) else { return };
        tracing::error!(%attempt, "it does not end after SIGKILL; this host asks for no more work");
        self.say(v1::agent_message::Message::Stuck(v1::Stuck { attempt: Some(attempt.into()) }));
    }

    fn on_denied(&mut self, key: Option<AttemptKey>, reason: String) {
        tracing::warn!(attempt = ?key, reason, "the spawner denied a request");
        let Some((attempt, job)) = key.and_then(|key| job_of(&mut self.jobs, key)) else { return };
        job.handover = Handover::Done;
        if let Collection::Asked(_) = job.collection {
            job.skip_outputs(&reason);
            self.seal(attempt);
            self.collect_next();
        } else if job.pipes == Pipes::Asked {
            job.pipes = Pipes::Here;
            self.seal(attempt);
        } else if job.running.is_none() && job.ended.is_none() {
            self.tell(HostEvent::Ended { attempt, verdict: Verdict::Denied(reason) });
        }
    }

    pub(super) fn start(&mut self, attempt: AttemptId) {
        let Some(job) = self.jobs.get_mut(&attempt) else { return };
        let Handover::Waiting(body, start) = std::mem::replace(&mut job.handover, Handover::Done) else { return };
        if !inputs::need_blobs(&body, &start) {
            let packed = inputs::pack(&body, &start, &BTreeMap::new());
            self.hand_over(attempt, body, start, packed);
            return;
        }
        let (cache, inbox) = (self.cache.clone(), self.inbox.clone());
        let mut channels = self.channel.subscribe();
        let (wanted, order) = (Rc::clone(&body), start.clone());
        let task = tokio::task::spawn_local(async move {
            let inputs = inputs::fetch_and_pack(&wanted, &order, &cache, &mut channels).await;
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Fetched { attempt, inputs }).await;
        });
        job.handover = Handover::Fetching(body, start, task.abort_handle());
    }

    pub(super) fn on_fetched(&mut self, attempt: AttemptId, inputs: Result<Inputs, InputError>) {
        let Some(job) = self.jobs.get_mut(&attempt) else { return };
        match std::mem::replace(&mut job.handover, Handover::Done) {
            Handover::Fetching(body, start, _) => self.hand_over(attempt, body, start, inputs),
            // It was stopped meanwhile.
            other @ (Handover::Waiting(..) | Handover::Sent(..) | Handover::Done) => job.handover = other,
        }
    }

    fn hand_over(
        &mut self,
        attempt: AttemptId,
        body: Rc<v1::JobBody>,
        ordered: Box<v1::StartAttempt>,
        inputs: Result<Inputs, InputError>,
    ) {
        let Some(job) = self.jobs.get_mut(&attempt) else { return };
        let mut inputs = match inputs {
            Ok(inputs) => inputs,
            Err(error) => {
                tracing::warn!(%attempt, "its inputs cannot be had: {}", chain(&error));
                return self.fail_start(attempt, error.step(), error.errno());
            }
        };
        let note = Note::of(&body).encode();
        if note.len() > NOTE_BYTES_MAX {
            return self.fail_start(attempt, "note", Errno::E2BIG);
        }
        let Some(link) = &mut self.link else {
            // Handed over when there is one again.
            job.handover = Handover::Waiting(body, ordered);
            return;
        };
        let start = Box::new(order::start_of(job.key, &body, &ordered, note, &mut inputs));
        job.handover = Handover::Sent(body, ordered);
        match link.send_start(start, inputs.descriptors) {
            Ok(()) => {}
            Err(error @ LinkError::TooLarge { .. }) => {
                tracing::warn!(%attempt, "{error}");
                job.handover = Handover::Done;
                self.fail_start(attempt, "order", Errno::E2BIG);
            }
            Err(error) => self.on_link_failed(&error),
        }
    }

    fn fail_start(&mut self, attempt: AttemptId, step: &str, errno: Errno) {
        let end = End::StartFailed { step: step.to_owned(), errno: errno as i32 };
        self.tell(HostEvent::Ended { attempt, verdict: Verdict::Own(end) });
    }

    pub(super) fn stop(&mut self, attempt: AttemptId, reason: StopReason, grace_ms: u64, first: Option<u8>) {
        let Some(job) = self.jobs.get_mut(&attempt) else { return };
        tracing::debug!(%attempt, reason = word_of(reason), "stopping");
        if let Handover::Waiting(..) | Handover::Fetching(..) = job.handover {
            if let Handover::Fetching(_, _, task) = std::mem::replace(&mut job.handover, Handover::Done) {
                task.abort();
            }
            self.tell(HostEvent::Ended { attempt, verdict: Verdict::Stopped });
            return;
        }
        let key = job.key;
        job.stop_noted = true;
        if let Err(error) = self.state.note_stop(key, reason) {
            // Only an agent that restarts before the end would miss it.
            tracing::warn!("{}", chain(&error));
        }
        self.ask_spawner(&match first {
            Some(signal) => Request::Checkpoint { attempt: key, signal, grace_ms },
            None => Request::Stop { attempt: key, grace_ms },
        });
    }

    pub(super) fn begin_sealing(&mut self, attempt: AttemptId) {
        if let Some(job) = self.jobs.get_mut(&attempt) {
            job.sealing = true;
            if !job.ran() && !matches!(job.collection, Collection::Done(_)) {
                job.skip_outputs("it never ran");
            }
            self.seal(attempt);
        }
    }

    /// Moves the storing of what an ended attempt left one step on; it ends with `Sealed`.
    fn seal(&mut self, attempt: AttemptId) {
        let may_collect = self.may_collect(attempt);
        let Some(job) = self.jobs.get_mut(&attempt).filter(|job| job.sealing) else { return };
        if job.pipes == Pipes::Asked {
            return;
        }
        job.drain();
        match &job.collection {
            // The next that is stored makes room.
            Collection::Wanted if !may_collect => {}
            Collection::Wanted => {
                let request = Request::Collect {
                    attempt: job.key,
                    paths: job.outputs().to_vec(),
                    file_bytes_max: limits::BLOB_BYTES_MAX,
                };
                job.collection = Collection::Asked(Found::default());
                self.ask_spawner(&request);
            }
            Collection::Asked(_) | Collection::Storing(_) => {}
            Collection::Done(_) if job.log_fits_report() => {
                let kept = job.make_report(clock::boottime());
                job.sealing = false;
                self.dirty.clear(attempt);
                self.tell(HostEvent::Sealed { attempt, output_lost: !kept });
            }
            Collection::Done(_) => {
                self.dirty.mark(attempt);
                self.pump_uploads();
            }
        }
    }

    /// Is there room for the descriptors of its files? One alone always has it.
    fn may_collect(&self, attempt: AttemptId) -> bool {
        let Some(job) = self.jobs.get(&attempt).filter(|job| matches!(job.collection, Collection::Wanted)) else {
            return false;
        };
        let under_way = |job: &&Job| matches!(job.collection, Collection::Asked(_) | Collection::Storing(_));
        let (attempts, paths) = self
            .jobs
            .values()
            .filter(under_way)
            .fold((0, 0), |(attempts, paths), job| (attempts + 1, paths + job.outputs().len()));
        attempts == 0 || attempts < COLLECTED_AT_ONCE_MAX && paths + job.outputs().len() <= PATHS_AT_ONCE_MAX
    }

    fn collect_next(&mut self) {
        let waits = |job: &Job| job.sealing && matches!(job.collection, Collection::Wanted);
        let waiting: Vec<_> = self.jobs.iter().filter(|(_, job)| waits(job)).map(|(attempt, _)| *attempt).collect();
        for attempt in waiting {
            self.seal(attempt);
        }
    }

    fn store_outputs(&mut self, attempt: AttemptId) {
        let Some(job) = self.jobs.get_mut(&attempt) else { return };
        let Collection::Asked(found) = &mut job.collection else { return };
        let (found, inbox, channels) = (std::mem::take(found), self.inbox.clone(), self.channel.subscribe());
        let task = tokio::task::spawn_local(async move {
            let stored = found.store(channels).await;
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Collected { attempt, stored }).await;
        });
        job.collection = Collection::Storing(task.abort_handle());
    }

    pub(super) fn on_collected(&mut self, attempt: AttemptId, stored: Stored) {
        if let Some(job) = self.jobs.get_mut(&attempt) {
            job.collection = Collection::Done(stored);
            self.seal(attempt);
        }
        self.collect_next();
    }

    pub(super) fn report_started(&mut self, attempt: AttemptId, epoch: Epoch) {
        let Some(running) = self.jobs.get(&attempt).and_then(|job| job.running.as_ref()) else { return };
        let started = v1::AttemptStarted {
            fences: running.fences.clone(),
            start_us: running.start_us,
            phases: order::phases_to_wire(running.phases),
        };
        let change = Some(v1::attempt_report::Change::Started(started));
        self.report_start(v1::AttemptReport { attempt: Some(attempt.into()), epoch: Some(epoch.into()), change });
    }

    pub(super) fn report_ended(&mut self, attempt: AttemptId, epoch: Epoch, end: &End) {
        let report = self.jobs.get(&attempt).and_then(|job| job.report.as_deref()).cloned().unwrap_or_default();
        let ended = v1::AttemptEnded { end: Some(convert::end_to_wire(end)), ..report };
        let change = Some(v1::attempt_report::Change::Ended(ended));
        self.report_end(v1::AttemptReport { attempt: Some(attempt.into()), epoch: Some(epoch.into()), change });
    }

    /// The coordinator has it for good: the spawner may drop it, and so do we.
    pub(super) fn forget(&mut self, attempt: AttemptId) {
        let Some(job) = self.jobs.remove(&attempt) else { return };
        self.dirty.clear(attempt);
        self.in_flight = self.in_flight.saturating_sub(job.output.borrow().in_flight());
        job.output.borrow().remove();
        if job.stop_noted {
            self.state.forget_stop(job.key);
        }
        self.ask_spawner(&Request::Forget { attempt: job.key });
    }

    pub(super) fn give_back(&mut self, attempts: &[AttemptId]) {
        for attempt in attempts {
            // A refused order may name what is held under another epoch.
            if self.jobs.get(attempt).is_some_and(|job| matches!(job.handover, Handover::Waiting(..))) {
                self.jobs.remove(attempt);
            }
        }
        let attempts = attempts.iter().map(|attempt| (*attempt).into()).collect();
        self.say(v1::agent_message::Message::GivenBack(v1::GivenBack { attempts }));
    }

    /// Output moved: a whole chunk goes at once, less after a quiet moment.
    pub(super) fn on_dirty(&mut self) {
        if self.upload_at.is_none() {
            self.upload_at = Some(Instant::now() + uploads::QUIET);
        }
        let full = |job: &Job| job.output.borrow().unsent() >= uploads::CHUNK_BYTES as u64;
        if self.dirty.list().iter().any(|attempt| self.jobs.get(attempt).is_some_and(full)) {
            self.pump_uploads();
        }
    }

    pub(super) fn on_upload_due(&mut self) {
        self.upload_at = None;
        self.pump_uploads();
    }

    /// Hands waiting log bytes to the upload stream, as far as it takes them.
    pub(super) fn pump_uploads(&mut self) {
        if self.live.is_none() {
            return;
        }
        for attempt in self.dirty.list() {
            let Some(job) = self.jobs.get(&attempt) else {
                self.dirty.clear(attempt);
                continue;
            };
            let mut output = job.output.borrow_mut();
            let mut broken = false;
            while output.unsent() > 0 {
                if self.in_flight >= uploads::WINDOW_BYTES || self.upload.as_ref().is_some_and(|open| !open.has_room())
                {
                    // The next acknowledgement makes room.
                    return;
                }
                match output.next_chunk(uploads::CHUNK_BYTES) {
                    Ok(Some((which, offset, data))) => {
                        self.in_flight += data.len() as u64;
                        let upload = self.upload.get_or_insert_with(|| open_upload(&self.channel, &self.inbox));
                        upload.send(attempt, which, offset, data);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%attempt, %error, "output is lost: cannot read the spool");
                        self.in_flight = self.in_flight.saturating_sub(output.in_flight());
                        output.give_up_unstored();
                        broken = true;
                    }
                }
            }
            drop(output);
            self.dirty.clear(attempt);
            if broken {
                // Nothing is left to wait for.
                self.seal(attempt);
            }
        }
    }

    pub(super) fn on_upload(&mut self, notice: UploadNotice) {
        match notice {
            UploadNotice::Stored { attempt, which, offset } => {
                let Some(job) = self.jobs.get(&attempt) else { return };
                let before = job.output.borrow().in_flight();
                job.output.borrow_mut().on_stored(which, offset);
                let after = job.output.borrow().in_flight();
                if job.output.borrow().unsent() > 0 {
                    self.dirty.mark(attempt);
                }
                self.in_flight = self.in_flight.saturating_sub(before.saturating_sub(after));
                self.seal(attempt);
                if self.upload_at.is_none() {
                    self.pump_uploads();
                }
            }
            UploadNotice::Broken(status) => {
                tracing::warn!("the log upload broke: {}; trying again", status.message());
                self.close_upload();
                self.upload_at = Some(Instant::now() + uploads::AGAIN);
            }
        }
    }

    /// What was on its way and not acknowledged goes again on the next stream.
    pub(super) fn close_upload(&mut self) {
        self.upload = None;
        self.in_flight = 0;
        for (attempt, job) in &self.jobs {
            let mut output = job.output.borrow_mut();
            if output.in_flight() > 0 {
                output.rewind();
                self.dirty.mark(*attempt);
            }
        }
    }
}

fn open_upload(
    channel: &tokio::sync::watch::Sender<Option<tonic::transport::Channel>>,
    inbox: &tokio::sync::mpsc::Sender<Notice>,
) -> Upload {
    let channel = channel.borrow().clone().expect("a live stream has its channel");
    let inbox = inbox.clone();
    Upload::open(channel, move |notice| {
        let inbox = inbox.clone();
        async move {
            // The loop is gone only if the agent leaves.
            let _ = inbox.send(Notice::Upload(notice)).await;
        }
    })
}

/// The held attempt of this name; an older epoch's packet names none.
fn job_of(jobs: &mut BTreeMap<AttemptId, Job>, key: AttemptKey) -> Option<(AttemptId, &mut Job)> {
    let attempt = order::attempt_of(key).ok()?;
    jobs.get_mut(&attempt).filter(|job| job.key == key).map(|job| (attempt, job))
}
