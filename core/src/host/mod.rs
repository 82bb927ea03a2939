//! The rules of one host: what starts when, what an end means, what is still
//! owed to the coordinator, and when "drained" is true.
//!
//! ```text
//! queued ──► running ──► sealing ──► reported ──► forgotten
//!    │          └► stopping ─┘  (each new stream reports again)
//!    └► given back (recall, closed for a drain, unknown there)
//! ```
//!
//! As pure as the fleet's rules: `apply(event, now)` returns effects in the
//! order in which the agent must carry them out. The agent's shell and the
//! simulator drive this same code.

mod drain;
mod effect;
mod event;
#[cfg(test)]
mod tests;

use alloc::{
    collections::{BTreeMap, VecDeque},
    vec::Vec,
};

use crate::{
    effect::{StopOrder, StopReason},
    end::{End, NodeLoss},
    event::{Held, HeldPhase},
    ids::{AttemptId, Epoch, Revision},
    mutation::{self, Mutation},
    resources::Resources,
    time::Millis,
};

use drain::Closure;
pub use effect::HostEffect;
pub use event::{Adopted, AdoptedPhase, Boottime, HostEvent, SpawnerId, StartOrder, Verdict};

/// One host as its agent knows it.
#[derive(Clone, Debug)]
pub struct Host {
    capacity: Resources,
    /// Taken by all that runs or is being ended.
    taken: Resources,
    attempts: BTreeMap<AttemptId, Attempt>,
    /// In order of arrival; each is in `attempts` as `Stage::Queued`.
    queue: VecDeque<AttemptId>,
    closure: Closure,
    lease: Lease,
    connected: bool,
    /// Which spawner answers, if one does.
    spawner: Option<SpawnerId>,
}

#[derive(Clone, Debug)]
struct Attempt {
    order: StartOrder,
    stage: Stage,
}

/// How an attempt was told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stop {
    /// The first: a later order may only hurry it.
    reason: StopReason,
    /// As it was ordered last.
    grace: Millis,
    first: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Queued,
    Running,
    Stopping(Stop),
    /// It is over; its outputs and log are being stored.
    Sealing(End),
    /// Owed to the coordinator until it says "stored".
    Owed {
        end: End,
        /// The next heartbeat's number when it was last reported on this stream.
        reported_before: Option<u64>,
    },
}

/// The node's lease, by this host's boot-time clock.
#[derive(Clone, Debug, Default)]
struct Lease {
    /// When the unanswered heartbeats of this stream were sent.
    sent: VecDeque<(u64, Boottime)>,
    next_sequence: u64,
    deadline: Boottime,
}

/// Heartbeats whose answer may still come; older ones grant nothing.
const HEARTBEATS_KEPT: usize = 16;

impl Host {
    /// A host that holds nothing yet. `closed_for` is what an earlier agent persisted.
    #[must_use]
    pub fn new(capacity: Resources, closed_for: Option<Revision>) -> Self {
        Self {
            capacity,
            taken: Resources::default(),
            attempts: BTreeMap::new(),
            queue: VecDeque::new(),
            closure: Closure::restored(closed_for),
            lease: Lease::default(),
            connected: false,
            spawner: None,
        }
    }

    /// Takes in one event; the effects are to be carried out in order.
    #[must_use]
    pub fn apply(&mut self, event: HostEvent, now: Boottime) -> Vec<HostEffect> {
        let mut effects = Vec::new();
        match event {
            HostEvent::Connected { term: _, unknown } => self.on_connected(&unknown, &mut effects),
            HostEvent::Disconnected => self.on_disconnected(),
            HostEvent::HeartbeatSent { sequence } => self.lease.on_sent(sequence, now),
            HostEvent::LeaseGranted { sequence, duration, unknown } => {
                self.on_lease(sequence, duration, &unknown, now, &mut effects);
            }
            HostEvent::StartOrdered(order) => self.on_start_ordered(order, &mut effects),
            HostEvent::StopOrdered(order) => self.on_stop_ordered(&order, &mut effects),
            HostEvent::RecallOrdered { .. } if mutation::is_on(Mutation::RecallIgnored) => {}
            HostEvent::RecallOrdered { count } => self.give_back_newest(count as usize, &mut effects),
            HostEvent::EndsStored { attempts } => self.on_ends_stored(&attempts, &mut effects),
            HostEvent::DrainAsked { revision, refusable } => self.on_drain_asked(revision, refusable, &mut effects),
            HostEvent::ClosurePersisted { revision } => self.closure.on_persisted(revision),
            HostEvent::ReopenOrdered { revision } => self.closure.reopen(revision, &mut effects),
            HostEvent::ReleaseOrdered { revision, then } => self.on_release(revision, then, &mut effects),
            HostEvent::SpawnerListed { spawner, held } => self.on_spawner_listed(spawner, held, now, &mut effects),
            HostEvent::SpawnerGone => self.spawner = None,
            HostEvent::Started { attempt } => self.on_started(attempt, &mut effects),
            HostEvent::Ended { attempt, verdict } => self.on_ended(attempt, verdict, &mut effects),
            HostEvent::Sealed { attempt, output_lost } => self.on_sealed(attempt, output_lost, &mut effects),
        }
        self.start_what_fits(now, &mut effects);
        self.pursue_proof(&mut effects);
        effects
    }

    /// All that this host holds: for Hello and each heartbeat.
    pub fn held(&self) -> impl Iterator<Item = Held> + '_ {
        self.attempts.iter().map(|(attempt, held)| Held {
            attempt: *attempt,
            epoch: held.order.epoch,
            phase: held.stage.phase(),
        })
    }

    /// Attempts whose processes may run.
    pub fn running(&self) -> impl Iterator<Item = AttemptId> + '_ {
        self.attempts.iter().filter(|(_, held)| held.stage.is_live()).map(|(attempt, _)| *attempt)
    }

    /// How many wait here for room.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// What all running attempts take together.
    #[must_use]
    pub const fn taken(&self) -> Resources {
        self.taken
    }

    /// The drain that this host is closed for, on disk or about to be: what its hello says. One that is only
    /// about to be counts too, or the coordinator would never reopen a host that it does not know to be closed.
    #[must_use]
    pub const fn closed_for(&self) -> Option<Revision> {
        self.closure.wanted()
    }

    /// When the lease ends; zero: none was granted yet.
    #[must_use]
    pub const fn lease_deadline(&self) -> Boottime {
        self.lease.deadline
    }

    /// Nothing is queued, runs, or is owed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    fn on_connected(&mut self, unknown: &[AttemptId], effects: &mut Vec<HostEffect>) {
        self.connected = true;
        self.lease.restart();
        for attempt in unknown {
            self.end_unknown(*attempt, effects);
        }
        for (attempt, held) in &mut self.attempts {
            if let Stage::Owed { end, reported_before } = &mut held.stage {
                *reported_before = Some(1);
                effects.push(HostEffect::ReportEnded { attempt: *attempt, epoch: held.order.epoch, end: end.clone() });
            }
        }
    }

    fn on_disconnected(&mut self) {
        self.connected = false;
        self.lease.restart();
        self.closure.forget_question();
        for held in self.attempts.values_mut() {
            if let Stage::Owed { reported_before, .. } = &mut held.stage {
                *reported_before = None;
            }
        }
    }

    fn on_lease(
        &mut self,
        sequence: u64,
        duration: Millis,
        unknown: &[AttemptId],
        now: Boottime,
        effects: &mut Vec<HostEffect>,
    ) {
        let renewed = self.lease.on_granted(sequence, duration, now);
        for attempt in unknown {
            // The coordinator saw our report (it came before that heartbeat on the
            // same stream) and still does not know the attempt: nobody waits for its end.
            let disowned = matches!(
                self.attempts.get(attempt).map(|held| &held.stage),
                Some(Stage::Owed { reported_before: Some(before), .. }) if *before <= sequence
            );
            if disowned {
                self.forget(*attempt, effects);
            } else {
                self.end_unknown(*attempt, effects);
            }
        }
        // After the stops: an agent that dies between must not have let what is to end run on for another lease (FL-3).
        if let Some(deadline) = renewed {
            effects.push(HostEffect::RenewLease { deadline });
        }
    }

    /// What the coordinator does not know has no reason to run; what it left is still reported, as evidence.
    fn end_unknown(&mut self, attempt: AttemptId, effects: &mut Vec<HostEffect>) {
        match self.attempts.get(&attempt).map(|held| &held.stage) {
            Some(Stage::Queued) => self.give_back(&[attempt], effects),
            Some(Stage::Running) => self.stop(attempt, StopReason::Superseded, Millis(0), None, effects),
            // It is being ended: make it quick. The first reason stands.
            Some(Stage::Stopping(stop)) => self.stop(attempt, stop.reason, Millis(0), None, effects),
            Some(Stage::Sealing(_) | Stage::Owed { .. }) | None => {}
        }
    }

    fn on_start_ordered(&mut self, order: StartOrder, effects: &mut Vec<HostEffect>) {
        let attempt = order.attempt;
        if let Some(held) = self.attempts.get(&attempt).filter(|_| !mutation::is_on(Mutation::StartForgotten)) {
            if held.order.epoch == order.epoch {
                effects.push(HostEffect::Ignore { attempt, reason: "it is held here already" });
                return;
            }
            // A store that lost writes has given its number out again. Without a word it would wait for ever: once what
            // is held is over and stored, nobody knows of this order any more.
            effects.push(HostEffect::Ignore { attempt, reason: "it is held here under another epoch" });
            effects.push(HostEffect::GiveBack { attempts: [attempt].into() });
            return;
        }
        if self.newest_epoch_of_task(attempt).is_some_and(|newest| newest > order.epoch) {
            effects.push(HostEffect::Ignore { attempt, reason: "a newer attempt of its task is held here" });
            effects.push(HostEffect::GiveBack { attempts: [attempt].into() });
        } else if self.closure.is_closed() || !order.request.fits_in(&self.capacity) {
            effects.push(HostEffect::GiveBack { attempts: [attempt].into() });
        } else {
            self.attempts.insert(attempt, Attempt { order, stage: Stage::Queued });
            self.queue.push_back(attempt);
        }
    }

    fn newest_epoch_of_task(&self, attempt: AttemptId) -> Option<Epoch> {
        self.of_task(attempt).map(|(_, held)| held.order.epoch).max()
    }

    fn of_task(&self, attempt: AttemptId) -> impl Iterator<Item = (&AttemptId, &Attempt)> {
        let number = |number| AttemptId { number, ..attempt };
        self.attempts.range(number(core::num::NonZeroU32::MIN)..=number(core::num::NonZeroU32::MAX))
    }

    fn on_stop_ordered(&mut self, order: &StopOrder, effects: &mut Vec<HostEffect>) {
        let attempt = order.attempt;
        let Some(held) = self.attempts.get(&attempt).filter(|held| held.order.epoch == order.epoch) else {
            effects.push(HostEffect::Ignore { attempt, reason: "no attempt of that epoch is held here" });
            return;
        };
        match held.stage {
            Stage::Queued => self.give_back(&[attempt], effects),
            Stage::Running if mutation::is_on(Mutation::StopIgnored) => {}
            Stage::Running => self.stop(attempt, order.reason, order.grace, order.first, effects),
            // The first reason stands; a second order may only hurry it.
            Stage::Stopping(stop) => self.stop(attempt, stop.reason, order.grace, order.first, effects),
            // It ended before the order came: its own end stands.
            Stage::Sealing(_) | Stage::Owed { .. } => {}
        }
    }

    fn stop(
        &mut self,
        attempt: AttemptId,
        reason: StopReason,
        grace: Millis,
        first: Option<u8>,
        effects: &mut Vec<HostEffect>,
    ) {
        if let Some(held) = self.attempts.get_mut(&attempt) {
            held.stage = Stage::Stopping(Stop { reason, grace, first });
            effects.push(HostEffect::Stop { attempt, reason, grace, first });
            if mutation::is_on(Mutation::EndBeforeEmpty) {
                self.on_ended(attempt, Verdict::Stopped, effects);
            }
        }
    }

    /// Newest first, so that what waited longest still starts here.
    fn give_back_newest(&mut self, count: usize, effects: &mut Vec<HostEffect>) {
        let attempts: Vec<_> = self.queue.iter().rev().take(count).copied().collect();
        self.give_back(&attempts, effects);
    }

    fn give_back(&mut self, attempts: &[AttemptId], effects: &mut Vec<HostEffect>) {
        if attempts.is_empty() {
            return;
        }
        for attempt in attempts {
            self.attempts.remove(attempt);
        }
        self.queue.retain(|queued| self.attempts.contains_key(queued));
        effects.push(HostEffect::GiveBack { attempts: attempts.to_vec() });
    }

    fn on_ends_stored(&mut self, attempts: &[AttemptId], effects: &mut Vec<HostEffect>) {
        for attempt in attempts {
            if matches!(self.attempts.get(attempt).map(|held| &held.stage), Some(Stage::Owed { .. })) {
                self.forget(*attempt, effects);
            }
        }
    }

    fn forget(&mut self, attempt: AttemptId, effects: &mut Vec<HostEffect>) {
        self.attempts.remove(&attempt);
        effects.push(HostEffect::Forget { attempt });
    }

    fn on_started(&mut self, attempt: AttemptId, effects: &mut Vec<HostEffect>) {
        if let Some(held) = self.attempts.get(&attempt)
            && self.connected
            && held.stage.is_live()
        {
            effects.push(HostEffect::ReportStarted { attempt, epoch: held.order.epoch });
        }
    }

    fn on_ended(&mut self, attempt: AttemptId, verdict: Verdict, effects: &mut Vec<HostEffect>) {
        let Some(held) = self.attempts.get_mut(&attempt) else {
            effects.push(HostEffect::Ignore { attempt, reason: "its end came for an attempt that is not held" });
            return;
        };
        let stopping = match held.stage {
            Stage::Running => None,
            Stage::Stopping(stop) => Some(stop.reason),
            Stage::Queued | Stage::Sealing(_) | Stage::Owed { .. } => {
                effects.push(HostEffect::Ignore { attempt, reason: "its end came while nothing of it runs" });
                return;
            }
        };
        self.taken = self.taken.minus(&held.order.request);
        held.stage = Stage::Sealing(end_of(verdict, stopping));
        effects.push(HostEffect::Seal { attempt });
    }

    fn on_sealed(&mut self, attempt: AttemptId, output_lost: bool, effects: &mut Vec<HostEffect>) {
        let next_sequence = self.lease.next_sequence;
        let Some(held) = self.attempts.get_mut(&attempt) else { return };
        let Stage::Sealing(own) = &held.stage else { return };
        let end = match own {
            // A failure of its own tells more than the loss of its output.
            End::Succeeded if output_lost && !mutation::is_on(Mutation::OutputLossHidden) => End::OutputLost,
            own => own.clone(),
        };
        let reported_before = self.connected.then_some(next_sequence);
        if self.connected {
            effects.push(HostEffect::ReportEnded { attempt, epoch: held.order.epoch, end: end.clone() });
        }
        held.stage = Stage::Owed { end, reported_before };
    }

    /// Adopts what an earlier agent left, and finds what died with an earlier spawner.
    fn on_spawner_listed(
        &mut self,
        spawner: SpawnerId,
        held: Vec<Adopted>,
        now: Boottime,
        effects: &mut Vec<HostEffect>,
    ) {
        self.spawner = Some(spawner);
        self.closure.on_listed(held.is_empty());
        let mut missing: Vec<_> = self.running().collect();
        for adopted in held {
            let attempt = adopted.order.attempt;
            missing.retain(|other| *other != attempt);
            self.adopt(adopted, effects);
        }
        for attempt in missing {
            self.on_ended(attempt, Verdict::Lost, effects);
        }
        // A new one has no lease: an exclusive job that we start under ours would be ended at once under its. One that
        // we come back to is told first what is to end.
        if now < self.lease.deadline {
            effects.push(HostEffect::RenewLease { deadline: self.lease.deadline });
        }
    }

    fn adopt(&mut self, adopted: Adopted, effects: &mut Vec<HostEffect>) {
        let attempt = adopted.order.attempt;
        match self.attempts.get(&attempt).map(|held| held.stage.clone()) {
            None => {
                let reason = adopted.stopping.filter(|_| !mutation::is_on(Mutation::StopForgottenByAgent));
                // How long it was given is known to the spawner alone.
                let noted = |reason| Stage::Stopping(Stop { reason, grace: Millis(0), first: None });
                let stage = reason.map_or(Stage::Running, noted);
                self.taken = self.taken.plus(&adopted.order.request);
                self.attempts.insert(attempt, Attempt { order: adopted.order, stage });
            }
            // The stop was lost with the old connection; one that is under way keeps the time that it has.
            Some(Stage::Stopping(Stop { reason, grace, first }))
                if adopted.phase == AdoptedPhase::Running && !mutation::is_on(Mutation::StopLostWithLink) =>
            {
                effects.push(HostEffect::Stop { attempt, reason, grace, first });
            }
            // Never handed to this spawner, yet it has it: its word counts.
            Some(Stage::Queued) => {
                self.queue.retain(|queued| *queued != attempt);
                self.taken = self.taken.plus(&adopted.order.request);
                if let Some(held) = self.attempts.get_mut(&attempt) {
                    held.stage = Stage::Running;
                }
            }
            Some(Stage::Running | Stage::Stopping(_)) => {}
            Some(Stage::Sealing(_) | Stage::Owed { .. }) => return,
        }
        if let AdoptedPhase::Ended(verdict) = adopted.phase {
            self.on_ended(attempt, verdict, effects);
        }
    }

    /// Strictly in order of arrival: a small one never overtakes a large one, so none starves.
    fn start_what_fits(&mut self, now: Boottime, effects: &mut Vec<HostEffect>) {
        while self.spawner.is_some()
            && let Some(attempt) = self.queue.front().copied()
            && self.may_start(attempt, now)
        {
            self.queue.pop_front();
            if let Some(held) = self.attempts.get_mut(&attempt) {
                held.stage = Stage::Running;
                self.taken = self.taken.plus(&held.order.request);
                effects.push(HostEffect::Start { attempt });
            }
        }
    }

    fn may_start(&self, attempt: AttemptId, now: Boottime) -> bool {
        let Some(held) = self.attempts.get(&attempt) else { return false };
        let fits =
            self.taken.plus(&held.order.request).fits_in(&self.capacity) || mutation::is_on(Mutation::HostOverfull);
        let leased = !held.order.exclusive || now < self.lease.deadline;
        // Another try at the same task that still runs here is being ended (FL-3).
        let alone = !self.of_task(attempt).any(|(_, other)| other.stage.is_live());
        fits && leased && (alone || mutation::is_on(Mutation::TriesTogether))
    }
}

impl Stage {
    const fn phase(&self) -> HeldPhase {
        match self {
            Self::Queued => HeldPhase::Queued,
            Self::Running => HeldPhase::Running,
            Self::Stopping(_) => HeldPhase::Stopping,
            Self::Sealing(_) | Self::Owed { .. } => HeldPhase::Ended,
        }
    }

    const fn is_live(&self) -> bool {
        match self {
            Self::Running | Self::Stopping(_) => true,
            Self::Queued | Self::Sealing(_) | Self::Owed { .. } => false,
        }
    }
}

impl Lease {
    fn restart(&mut self) {
        self.sent.clear();
        self.next_sequence = 1;
    }

    fn on_sent(&mut self, sequence: u64, now: Boottime) {
        if self.sent.len() == HEARTBEATS_KEPT {
            self.sent.pop_front();
        }
        self.sent.push_back((sequence, now));
        self.next_sequence = sequence + 1;
    }

    /// The new deadline, if the grant moves it.
    fn on_granted(&mut self, sequence: u64, duration: Millis, now: Boottime) -> Option<Boottime> {
        let at = self.sent.iter().position(|(sent, _)| *sent == sequence)?;
        let (_, sent) = self.sent[at];
        let sent = if mutation::is_on(Mutation::LeaseFromReceipt) { now } else { sent };
        self.sent.drain(..=at);
        let deadline = Boottime(sent.0.saturating_add(duration.0));
        (deadline > self.deadline).then(|| {
            self.deadline = deadline;
            deadline
        })
    }
}

/// What the spawner's word means for the record.
fn end_of(verdict: Verdict, stopping: Option<StopReason>) -> End {
    match (verdict, stopping) {
        // It ended by itself before our signal reached it: that end stands.
        (Verdict::Own(end), _) => end,
        // The spawner's clock may come before the coordinator's order: it is the same drain.
        (Verdict::Stopped | Verdict::Left, Some(StopReason::Drained)) | (Verdict::Left, None) => End::Drained,
        (Verdict::Stopped | Verdict::Left, Some(StopReason::Preempted)) => End::Preempted,
        (Verdict::Stopped | Verdict::Left, Some(StopReason::Cancelled | StopReason::Superseded)) => End::Cancelled,
        // No order of ours: the spawner itself was stopped, which is the host's doing.
        (Verdict::Stopped, None) | (Verdict::Lost, _) => End::SpawnerLost,
        (Verdict::LeaseEnded, _) => End::NodeLost(NodeLoss::Silent),
        (Verdict::Denied(reason), _) => End::Refused(reason),
    }
}
