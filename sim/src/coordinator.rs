//! The coordinators' shell: the real `Fleet`, one batch at a time: apply,
//! settle, commit under the term, check every promise, and only then act. It
//! may die or be stopped at each of these steps.

mod leadership;

use muster_core::{
    effect::Effect,
    event::Event,
    fleet::{Fleet, Output},
    host::StartOrder,
    ids::{AttemptId, Epoch, NodeId, SessionId, Term},
    leadership::Leadership,
    limits,
    spec::Delivery,
    time::{Millis, Timestamp},
    timeline::Seen,
};

use crate::{agenda::Action, coverage::event_name, setup::Fault, truth::Violation, world::World};

/// One coordinator process.
#[derive(Debug)]
pub struct Member {
    /// Counts its processes; what an older one planned does not happen.
    pub life: u64,
    pub role: Role,
    clock: Clock,
    /// Its machine's wall clock is off by this much.
    pub wall_offset: i64,
    pub paused_until: Timestamp,

    /// A commit takes until then.
    busy_until: Timestamp,
    /// What the last batch asks for is not carried out yet: the next one waits.
    is_acting: bool,
    /// It does not reach the store before then.
    pub cut_from_store: Timestamp,
    /// What came while it could not look.
    inbox: Vec<Event>,
    wakes_at: Option<Timestamp>,
    /// The highest number of a node that its door did not know.
    pub shown: NodeId,
    /// The leader's row as a standby saw it last, and since when.
    seen: (u64, u64),
    seen_since: Timestamp,
}

#[derive(Debug)]
pub enum Role {
    Down,
    Standby,
    Leads(Box<Leader>),
}

#[derive(Debug)]
pub struct Leader {
    pub fleet: Fleet,
    pub term: u64,
    pub leadership: Leadership,
    /// Of the store, as this leader knows them.
    commits: u64,
}

/// Starts at the wall clock's time or past the last stored one, then runs at its own pace.
#[derive(Clone, Copy, Debug)]
struct Clock {
    base: Timestamp,
    from: Timestamp,
    /// Thousandths that it runs fast.
    drift: i64,
}

impl Clock {
    fn at(self, now: Timestamp) -> Timestamp {
        let passed = now.since(self.from).0.cast_signed();
        Timestamp(self.base.0 + (passed + passed * self.drift / 1_000).cast_unsigned())
    }

    /// When it shows this.
    fn when(self, shown: Timestamp) -> Timestamp {
        let passed = shown.since(self.base).0.cast_signed();
        Timestamp(self.from.0 + (passed * 1_000 / (1_000 + self.drift)).cast_unsigned() + 1)
    }
}

/// Where in a batch the process dies or stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    BeforeCommit,
    AfterCommit,
    AfterEffects(usize),
    Stopped(Millis),
}

impl Member {
    pub fn new(drift: i64) -> Self {
        Self {
            life: 0,
            role: Role::Down,
            clock: Clock { base: Timestamp(0), from: Timestamp(0), drift },
            wall_offset: 0,
            paused_until: Timestamp(0),
            busy_until: Timestamp(0),
            is_acting: false,
            cut_from_store: Timestamp(0),
            inbox: Vec::new(),
            wakes_at: None,
            shown: NodeId(0),
            seen: (0, 0),
            seen_since: Timestamp(0),
        }
    }

    pub fn leader(&self) -> Option<&Leader> {
        match &self.role {
            Role::Leads(leader) => Some(leader),
            Role::Down | Role::Standby => None,
        }
    }

    pub fn fleet(&self) -> Option<&Fleet> {
        self.leader().map(|leader| &leader.fleet)
    }

    pub fn term(&self) -> u64 {
        self.leader().map_or(0, |leader| leader.term)
    }

    /// What it says has been committed.
    pub fn told(&self) -> Seen {
        self.leader().map_or_else(Seen::default, |leader| Seen { term: Term(leader.term), commit: leader.commits })
    }

    /// Its own clock.
    pub fn time(&self, now: Timestamp) -> Timestamp {
        self.clock.at(now)
    }

    /// It is stopped until then.
    pub fn pause(&mut self, until: Timestamp) {
        self.paused_until = self.paused_until.max(until);
    }

    /// A certificate names a node that it does not know.
    pub fn note_shown(&mut self, node: NodeId) {
        self.shown = self.shown.max(node);
    }

    /// It would take a call now.
    pub fn answers(&self, now: Timestamp) -> bool {
        self.leader().is_some() && self.paused_until <= now
    }
}

impl World {
    /// The leader that takes a call now, if there is one.
    pub(crate) fn serving(&self) -> Option<usize> {
        (0..self.members.len()).filter(|member| self.members[*member].answers(self.now)).max_by_key(|member| {
            // A stopped leader that was just continued does not know yet that another leads.
            self.members[*member].term()
        })
    }

    /// The store goes on without its last commits. Whoever wrote to it starts again from its rows.
    pub(crate) fn lose_writes(&mut self) {
        let count = self.rng.between(1, if self.rng.clone().chance(500) { 4 } else { 41 });
        for member in 0..self.members.len() {
            if self.members[member].leader().is_some() {
                self.kill_member(member);
            }
        }
        let lost = self.store.lose(count);
        if self.occurs(Fault::StoreSlow, 500) {
            // The copy that takes over has to warm up: what hosts say meanwhile comes in large batches.
            self.store.slow_until = self.now + Millis(self.rng.between(20_000, 90_000));
            self.lose_sight_of_machines();
        }
        self.note_lost_jobs();
        self.truth.lost_writes(lost, &self.store);
    }

    /// An operator repairs the store while no coordinator runs, and starts one again.
    pub(crate) fn damage_store(&mut self) {
        for member in 0..self.members.len() {
            self.kill_member(member);
        }
        let lost = self.store.damage(&mut self.rng);
        self.note_lost_jobs();
        self.truth.lost_writes(lost, &self.store);
    }

    fn store_latency(&mut self) -> Millis {
        if self.store.slow_until > self.now { Millis(self.rng.between(20, 4_000)) } else { Millis(1) }
    }

    /// Something for this coordinator: now, or with all else that came meanwhile.
    pub(crate) fn tell(&mut self, member: usize, event: Event) -> Result<(), Violation> {
        self.tell_all(member, vec![event])
    }

    /// The same for what belongs into one batch.
    pub(crate) fn tell_all(&mut self, member: usize, events: Vec<Event>) -> Result<(), Violation> {
        let known = &mut self.members[member];
        if known.leader().is_none() {
            return Ok(());
        }
        let free = known.paused_until.max(known.busy_until);
        if free > self.now || known.is_acting {
            known.inbox.extend(events);
            self.wake_member(member, free.max(self.now));
            return Ok(());
        }
        // What came before comes first.
        let mut waiting = std::mem::take(&mut known.inbox);
        waiting.extend(events);
        self.step(member, waiting)
    }

    fn wake_member(&mut self, member: usize, at: Timestamp) {
        let known = &mut self.members[member];
        if known.wakes_at.is_none_or(|wakes| at < wakes || wakes < self.now) {
            known.wakes_at = Some(at);
            let life = known.life;
            self.at(at, Action::MemberWakes { member, life });
        }
    }

    pub(crate) fn wake(&mut self, member: usize, life: u64) -> Result<(), Violation> {
        let known = &mut self.members[member];
        if known.life != life || known.leader().is_none() {
            return Ok(());
        }
        // An earlier wake-up took its place.
        if known.wakes_at.is_none_or(|wakes| wakes > self.now) {
            return Ok(());
        }
        known.wakes_at = None;
        let free = known.paused_until.max(known.busy_until);
        if free > self.now {
            self.wake_member(member, free);
            return Ok(());
        }
        if known.is_acting {
            // Woken again as soon as that is done.
            return Ok(());
        }
        let mut events = std::mem::take(&mut known.inbox);
        events.insert(0, Event::Tick);
        self.step(member, events)
    }

    /// Where this batch is interrupted, if it is.
    fn interruption(&mut self) -> Option<Point> {
        if self.occurs(Fault::DiesBeforeCommit, 1) {
            return Some(Point::BeforeCommit);
        }
        if self.occurs(Fault::DiesAfterCommit, 1) {
            return Some(Point::AfterCommit);
        }
        if self.occurs(Fault::DiesBetweenEffects, 1) {
            return Some(Point::AfterEffects(usize::try_from(self.rng.between(1, 4)).unwrap_or(1)));
        }
        if self.occurs(Fault::PausedAfterCommit, 1) {
            return Some(Point::Stopped(Millis(self.rng.between(500, 40_000))));
        }
        None
    }

    /// The order that every promise stands on: decide, persist, then act.
    pub(crate) fn step(&mut self, member: usize, events: Vec<Event>) -> Result<(), Violation> {
        let interruption = if self.rng.chance(100) { self.interruption() } else { None };
        let time = self.members[member].time(self.now);
        let is_full = self.store.full_until > self.now;
        let Role::Leads(leader) = &mut self.members[member].role else { return Ok(()) };
        // What was due long ago shows that this process was stopped: it knows nothing of what it did not hear.
        let overdue = leader.fleet.next_wake().map_or(Millis(0), |due| time.since(due));
        if overdue >= limits::ABSENCE && leader.term == self.store.leader.term {
            self.truth.awake(self.now);
        }
        let mut out = Output::default();
        self.truth.begin(&leader.fleet);
        for event in events {
            self.coverage.event(event_name(&event));
            // With the reserve alone, ends, cancels and drains are written, and new work is refused at the edge.
            if is_full && matches!(event, Event::Submit { .. }) {
                self.coverage.count("denied", "the store is full");
                continue;
            }
            self.truth.hear(&event, &leader.fleet, self.now);
            leader.fleet.apply(event, time, &mut out);
        }
        leader.fleet.settle(time, &mut out);
        if interruption == Some(Point::BeforeCommit) {
            self.kill_member(member);
            return Ok(());
        }
        let writes = !out.touched.is_empty();
        if writes && (leader.term != self.store.leader.term || self.members[member].cut_from_store > self.now) {
            // The transaction is refused, or its outcome is not known: either way, start again from the rows.
            if self.members.len() > 1 {
                self.step_down(member);
            } else {
                self.kill_member(member);
            }
            return Ok(());
        }
        self.trace_batch(&out);
        let known = &mut self.members[member];
        let Role::Leads(leader) = &mut known.role else { return Ok(()) };
        if writes {
            leader.commits += 1;
            self.truth.committing(&leader.fleet, &out, &self.store, &mut self.coverage)?;
            self.store.commit(&leader.fleet, &out.touched, time, self.now);
            for job in out.touched.accepted.keys() {
                if let Some(row) = self.store.job(*job) {
                    self.jobs.note_poison(*job, &row.key);
                }
            }
        }
        self.truth.check(&leader.fleet, &out, &self.store, &self.hosts, self.now, time)?;
        self.batches += 1;
        if self.batches.is_multiple_of(FULL_CHECK_EVERY) && leader.term == self.store.leader.term {
            muster_core::invariants::check(&leader.fleet)
                .map_err(|broken| Violation::new(broken.promise, broken.detail))?;
            self.store.check_equals(&leader.fleet)?;
        }
        self.follow_up(member, writes, out.effects, interruption)
    }

    fn follow_up(
        &mut self,
        member: usize,
        writes: bool,
        effects: Vec<Effect>,
        interruption: Option<Point>,
    ) -> Result<(), Violation> {
        let life = self.members[member].life;
        let latency = if writes { self.store_latency() } else { Millis(0) };
        let mut at = self.now;
        match interruption {
            Some(Point::AfterCommit) => {
                self.kill_member(member);
                return Ok(());
            }
            Some(Point::AfterEffects(count)) => {
                for effect in effects.into_iter().take(count) {
                    self.carry_out(member, effect)?;
                }
                self.kill_member(member);
                return Ok(());
            }
            Some(Point::Stopped(span)) => {
                self.members[member].pause(self.now + span);
                at = self.now + span;
            }
            Some(Point::BeforeCommit) | None => {}
        }
        if latency > Millis(1) {
            at = at.max(self.now + latency);
        }
        if at > self.now {
            let known = &mut self.members[member];
            (known.busy_until, known.is_acting) = (at, true);
            self.at(at, Action::Effects { member, life, effects });
        } else {
            self.carry_out_all(member, effects)?;
        }
        if let Some(due) = self.members[member].fleet().and_then(Fleet::next_wake) {
            let due = self.members[member].clock.when(due).max(self.now).max(at);
            self.wake_member(member, due);
        }
        Ok(())
    }

    /// What is answered to one of them may bring the next call: it waits until all are out, in their order.
    fn carry_out_all(&mut self, member: usize, effects: Vec<Effect>) -> Result<(), Violation> {
        self.members[member].is_acting = true;
        for effect in effects {
            self.carry_out(member, effect)?;
        }
        self.members[member].is_acting = false;
        Ok(())
    }

    pub(crate) fn carry_out_late(&mut self, member: usize, life: u64, effects: Vec<Effect>) -> Result<(), Violation> {
        if self.members[member].life != life {
            return Ok(());
        }
        self.carry_out_all(member, effects)?;
        let at = self.now;
        self.wake_member(member, at);
        Ok(())
    }

    fn carry_out(&mut self, member: usize, effect: Effect) -> Result<(), Violation> {
        match effect {
            Effect::Reply { request, reply } => return self.answer(request, reply),
            Effect::CreateHost { pool, host, .. } => {
                self.create_host(pool, host);
                return Ok(());
            }
            Effect::WakeHost { pool, host, node } => {
                self.wake_host(pool, host, node);
                return Ok(());
            }
            Effect::DeleteHost { pool, host, .. } => {
                self.delete_host(pool, host);
                return Ok(());
            }
            Effect::AskHost { pool, host } => {
                self.describe_host(pool, host);
                return Ok(());
            }
            Effect::GrantLease { .. } => {
                let time = self.members[member].time(self.now);
                let Some(leader) = self.members[member].leader() else { return Ok(()) };
                if !leader.leadership.holds(time) {
                    self.count("coordinator", "withheld a lease");
                    return Ok(());
                }
                if leader.term != self.store.leader.term {
                    return Err(Violation::new("FL-3", "a lease is granted while another coordinator leads".into()));
                }
            }
            Effect::Welcome { node, session, .. } => self.check_identity(member, node, session)?,
            Effect::Start { .. }
            | Effect::Stop { .. }
            | Effect::Acknowledge { .. }
            | Effect::Recall { .. }
            | Effect::NoticeDrain { .. }
            | Effect::AskDrained { .. }
            | Effect::Release { .. }
            | Effect::Reopen { .. }
            | Effect::CloseSession { .. } => {}
        }
        if let Some((session, message)) = self.message_of(member, effect) {
            self.send(session, message);
        }
        Ok(())
    }

    /// Whoever is welcomed as a node has its key: two machines never answer to one number.
    fn check_identity(&self, member: usize, node: NodeId, session: SessionId) -> Result<(), Violation> {
        let row = self.members[member].fleet().and_then(|fleet| fleet.node(node));
        let Some((row, stream)) = row.zip(self.network.streams.get(&session)) else { return Ok(()) };
        let host = &self.hosts[stream.host];
        if host.key == row.key {
            return Ok(());
        }
        Err(Violation::new("case 24", format!("host {} is welcomed as {node}, which is {}", host.name, row.name)))
    }

    /// What the coordinator's driver adds to the order from the job's body.
    pub(crate) fn order_for(&self, attempt: AttemptId, epoch: Epoch) -> StartOrder {
        let spec = self.store.job(attempt.job).map(|job| &job.spec);
        StartOrder {
            attempt,
            epoch,
            request: spec.map(|spec| spec.request).unwrap_or_default(),
            exclusive: spec.is_some_and(|spec| spec.delivery == Delivery::Exclusive),
        }
    }
}

/// A look at the whole state; between two of them what a batch touched is looked at.
const FULL_CHECK_EVERY: u64 = 512;
