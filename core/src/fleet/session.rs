//! Nodes come, speak, fall silent and return.
//!
//! The running set is compared both ways: what a host holds and we do not
//! know is ended there; what we know and the host no longer holds is taken
//! back if it provably never started, else presumed lost with its spawner.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use super::{Fleet, Output, Timer, draining::notice_of, record};
use crate::{
    denied::Denied,
    effect::{Effect, Reply, StopReason, Subject},
    end::{End, NodeLoss},
    event::{Held, HeldPhase, Hello, HostSample},
    ids::{AttemptId, Epoch, HostRequestId, Incarnation, NodeId, PoolName, Revision, SessionId},
    lease, limits,
    mutation::{self, Mutation},
    node::{Duty, Hold, Liveness, Node, NodeRecord},
    pool::{Host, Made},
    resources::Resources,
    time::{Millis, Timestamp},
};

impl Fleet {
    pub(super) fn enroll(
        &mut self,
        name: String,
        pool: PoolName,
        host: Option<HostRequestId>,
        key: [u8; 32],
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        if let Some(id) = self.names.get(&name).copied() {
            let Some(node) = self.nodes.get(&id) else { return Err(Denied::NameTaken { name }) };
            if node.record.key == key {
                return Ok(Reply::Enrolled { node: id });
            }
            match node.record.liveness {
                Liveness::Lost(_) | Liveness::Gone(_) => {
                    record(
                        out,
                        now,
                        Subject::Node(id),
                        "removed",
                        format!("its name `{name}` enrolled with another key"),
                        None,
                    );
                    self.forget_node(id, out);
                }
                Liveness::Joining | Liveness::Live | Liveness::Silent(_) => return Err(Denied::NameTaken { name }),
            }
        }
        if self.nodes.len() >= limits::NODES_MAX {
            return Err(Denied::LimitReached { limit: format!("{} nodes in one fleet", limits::NODES_MAX) });
        }
        let id = self.meta.next_node;
        self.meta.next_node = id.next();
        if let Some(host) = host.filter(|host| *host >= self.meta.next_host) {
            // Asked for by writes that the store has lost: its number is not given out again.
            self.meta.next_host = host.next();
        }
        record(out, now, Subject::Node(id), "enrolled", format!("`{name}` joined pool `{pool}`"), None);
        self.names.insert(name.clone(), id);
        self.nodes.insert(id, Node::new(new_record(name, pool, host, key, now), now));
        out.touched.meta = true;
        out.touched.nodes.insert(id);
        Ok(Reply::Enrolled { node: id })
    }

    pub(super) fn node_connected(
        &mut self,
        id: NodeId,
        key: &[u8; 32],
        session: SessionId,
        hello: Hello,
        now: Timestamp,
        out: &mut Output,
    ) {
        self.pass_by_node(id, out);
        let Some(node) = self.nodes.get_mut(&id) else {
            let reason = String::from("this node is not known here; enrol it again with a token");
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        };
        if node.record.key != *key {
            // A store that has lost an enrolment gave its number out again. What this host holds is not that node's.
            let reason = format!("the number {id} belongs to `{}` by now; enrol again with a token", node.record.name);
            record(out, now, Subject::Node(id), "claimed_twice", reason.clone(), None);
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        }
        // A node that is gone has given its name back: two with one name would contradict each other in the store.
        if self.names.get(&node.record.name).is_some_and(|owner| *owner != id) {
            let reason = format!("the name `{}` belongs to another node by now; enrol again", node.record.name);
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        }
        let is_same_host = node.record.boot_id == hello.boot_id && node.record.instance == hello.instance;
        if is_same_host && is_late(node, &hello) {
            let reason = String::from("a newer agent of this host, or a newer stream of it, has spoken since");
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        }
        if let Some(reason) = second_claimant(node, &hello, now) {
            record(out, now, Subject::Node(id), "claimed_twice", reason.clone(), None);
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        }
        if self.is_being_deleted(id, &hello) {
            let reason = String::from("the provider was told to end this host: it gets no more work");
            out.effects.push(Effect::CloseSession { node: id, session, reason });
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Some(old) = node.session.filter(|old| *old != session) {
            let reason = String::from("a newer connection of this node replaced this one");
            out.effects.push(Effect::CloseSession { node: id, session: old, reason });
        }
        let rebooted = !node.record.boot_id.is_empty() && node.record.boot_id != hello.boot_id;
        let returned = matches!(node.record.liveness, Liveness::Lost(_) | Liveness::Gone(_) | Liveness::Joining);
        if rebooted || returned {
            node.record.incarnation = Incarnation(node.record.incarnation.0 + 1);
        }
        let restarted = node.record.agent_start != hello.agent_start;
        if rebooted && !mutation::is_on(Mutation::RebootIgnored) {
            // Before its new lease begins: a copied disk looks like a reboot, and the original may
            // run what is exclusive for as long as its own lease lasts (FL-3).
            self.give_up_attempts(id, &End::NodeLost(NodeLoss::Rebooted), now, out);
        }
        self.adopt(id, session, &hello, rebooted, now);
        self.reconcile(id, &hello.held, now, out);
        self.pass_by_held(&hello.held, out);
        self.note_running(id, &hello.held, now, out);
        self.compare_at_hello(id, &hello.held, restarted, now, out);
        self.welcome(id, session, &hello.held, now, out);
        if rebooted || restarted {
            self.end_own_drain(id, now, out);
        }
        self.remind(id, session, hello.closed_for_drain, now, out);
        self.settle_joined_host(id, now, out);
        self.settle_woken_host(id, now, out);
        let sentence = format!("{} CPU, {}", crate::resources::Cores(hello.capacity.cpu_milli), hello.version);
        record(out, now, Subject::Node(id), "connected", sentence, None);
        out.touched.nodes.insert(id);
        self.unsettled.insert(id);
        self.freed.insert(id);
        self.reindex(id);
    }

    /// Takes over what the node says of itself. `rebooted`: another life of it spoke last.
    fn adopt(&mut self, id: NodeId, session: SessionId, hello: &Hello, rebooted: bool, now: Timestamp) {
        let is_woken = self.waking_of(id).is_some();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let record = &mut node.record;
        let forgets = record.agent_start != hello.agent_start && mutation::is_on(Mutation::CordonClearedByRestart);
        if forgets && matches!(record.duty, Duty::Cordoned(_)) {
            record.duty = Duty::Eligible;
        }
        record.boot_id.clone_from(&hello.boot_id);
        record.instance.clone_from(&hello.instance);
        record.agent_start = hello.agent_start;
        record.capacity = hello.capacity;
        record.labels.clone_from(&hello.labels);
        record.fences.clone_from(&hello.fences);
        record.version.clone_from(&hello.version);
        // A node that was told to go and was brought back by an operator begins anew. As it went it opened
        // itself; one that is still closed for its drain has not got our word, and gets it again, or opens if it is wanted.
        if let Duty::Stopping { drain, .. } = &record.duty
            && (is_woken || hello.closed_for_drain != drain.revision)
        {
            record.duty = Duty::Eligible;
        }
        if let Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } = &record.duty
            && (hello.closed_for_drain != drain.revision || !hello.held.is_empty() || rebooted)
        {
            // A copied or restored disk: what speaks now is not what proved itself empty (FL-7). One that says it is
            // closed may have it on no disk yet, and then obeys no release: each life proves it for itself.
            record.duty = Duty::Draining(drain.clone());
        }
        if hello.closed_for_drain > record.drain_revision {
            // Closed by a drain of its former record, or one that a restored store does not know: the host
            // takes only newer questions, so a drain in force is asked for under a newer number.
            record.drain_revision = hello.closed_for_drain;
            if let Duty::Draining(drain) = &mut record.duty {
                record.drain_revision = record.drain_revision.next();
                drain.revision = record.drain_revision;
            }
        }
        record.liveness = Liveness::Live;
        if record.idle_since.is_none() && node.attempts.is_empty() {
            record.idle_since = Some(now);
        }
        node.session = Some(session);
        node.stream = hello.stream;
        node.heard = now;
        node.lease_end = lease::ended_here(now);
        let lease_end = node.lease_end;
        self.names.insert(node.record.name.clone(), id);
        self.wake_at(lease_end, Timer::Node(id));
    }

    /// What the host runs has started, also when the report of it was lost with a stream.
    fn note_running(&mut self, id: NodeId, held: &[Held], now: Timestamp, out: &mut Output) {
        let has_started =
            |held: &&Held| held.phase != HeldPhase::Queued || mutation::is_on(Mutation::PrefilledIsStarted);
        for held in held.iter().filter(has_started) {
            self.note_started(held.attempt, id, held.epoch, now, out);
        }
    }

    /// What a host holds of ours. Under another epoch it is another's, whose number a store that lost writes has given
    /// out again.
    fn ours_of(&self, held: &[Held]) -> BTreeSet<AttemptId> {
        let is_ours =
            |held: &&Held| self.attempts.get(&held.attempt).is_some_and(|known| known.record.term == held.epoch.term);
        held.iter().filter(is_ours).map(|held| held.attempt).collect()
    }

    /// What we know and the host does not hold.
    fn compare_at_hello(&mut self, id: NodeId, held: &[Held], restarted: bool, now: Timestamp, out: &mut Output) {
        let held = self.ours_of(held);
        let missing: Vec<AttemptId> =
            self.nodes.get(&id).into_iter().flat_map(|node| node.attempts.difference(&held).copied()).collect();
        for attempt in missing {
            let Some(known) = self.attempts.get(&attempt) else { continue };
            let delivery = self.jobs.get(&attempt.job).map(|job| job.spec.delivery);
            let repeatable = delivery == Some(crate::spec::Delivery::AtLeastOnce);
            let may_have_run = known.record.started.is_some() || (restarted && !repeatable);
            if may_have_run || mutation::is_on(Mutation::NeverThereIsLost) {
                // Started, or perhaps started by a spawner that died with the agent: it may have run.
                self.end_attempt(attempt, End::SpawnerLost, true, Vec::new(), now, out);
            } else {
                // The old stream is dead and the host does not hold it: it never arrived.
                self.take_back(attempt, now, out);
            }
        }
    }

    fn welcome(&mut self, id: NodeId, session: SessionId, held: &[Held], now: Timestamp, out: &mut Output) {
        let unknown = self.unknown_here(id, held);
        let Some(node) = self.nodes.get(&id) else { return };
        let drain = node.record.drain().map(|drain| notice_of(drain, now));
        out.effects.push(Effect::Welcome { node: id, session, incarnation: node.record.incarnation, unknown, drain });
    }

    /// Held there and not live here. What has ended there is told by its report, not by this list.
    fn unknown_here(&self, node: NodeId, held: &[Held]) -> Vec<AttemptId> {
        // A store that lost writes does not know what it lost: nothing is ended for that. What it knows to be over is.
        let is_behind = self.meta.loss.is_some();
        held.iter()
            .filter(|held| !is_behind || self.is_known_to_be_over(held.attempt))
            .filter(|held| match held.phase {
                HeldPhase::Queued | HeldPhase::Running | HeldPhase::Stopping => {
                    !self.attempts.get(&held.attempt).is_some_and(|known| {
                        known.record.node == node
                            && held.epoch == Epoch { term: known.record.term, attempt: held.attempt.number }
                    })
                }
                HeldPhase::Ended => false,
            })
            .map(|held| held.attempt)
            .collect()
    }

    /// Sends again what a lost stream may have swallowed.
    fn remind(&mut self, id: NodeId, session: SessionId, closed_for: Revision, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.asked_drained = None;
        match &node.record.duty {
            Duty::Eligible | Duty::Cordoned(_) if closed_for != Revision(0) => {
                out.effects.push(Effect::Reopen { node: id, session, revision: closed_for });
            }
            Duty::Eligible | Duty::Cordoned(_) | Duty::Draining(_) => {}
            Duty::Drained { drain, .. } | Duty::Stopping { drain, .. } => {
                out.effects.push(Effect::Release {
                    node: id,
                    session,
                    revision: drain.revision,
                    then: drain.order.then,
                });
            }
        }
        let stopping: Vec<(AttemptId, StopReason)> = self
            .nodes
            .get(&id)
            .into_iter()
            .flat_map(|node| node.attempts.iter())
            .filter_map(|attempt| Some((*attempt, self.attempts.get(attempt)?.record.stopping?.1)))
            .collect();
        for (attempt, reason) in stopping.into_iter().filter(|_| !mutation::is_on(Mutation::StopsNotRepeated)) {
            let grace = self.jobs.get(&attempt.job).map_or(limits::GRACE, |job| job.spec.grace);
            self.stop_attempt(attempt, reason, grace, now, out);
        }
    }

    fn settle_joined_host(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get(&id) else { return };
        let Some(host) = node.record.host else { return };
        let Some(pool) = self.pools.get_mut(&node.record.pool) else { return };
        match pool.record.hosts.get(&host).copied() {
            Some(Host::Requested(since)) => {
                pool.note_boot(since, "a host has joined", now, out);
                pool.record.made = Some(Made { capacity: node.record.capacity, fences: node.record.fences.clone() });
            }
            Some(Host::Joined(_) | Host::Deleting { .. } | Host::Waking { .. }) => return,
            // The provider said that it is gone, and here it speaks: it counts again (FL-11).
            None if mutation::is_on(Mutation::SpeakerUncounted) => return,
            None => {}
        }
        pool.record.hosts.insert(host, Host::Joined(id));
        out.touched.pools.insert(node.record.pool.clone());
    }

    pub(super) fn node_disconnected(&mut self, id: NodeId, session: SessionId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.node_on(id, session) else { return };
        node.session = None;
        if mutation::is_on(Mutation::GivenUpWithStream) {
            return self.give_up_attempts(id, &End::NodeLost(NodeLoss::Silent), now, out);
        }
        // A node that was told to go has gone; for all others only the lease tells.
        if is_told_to_go(&node.record) {
            self.gone_after_drain(id, now, out);
        }
        self.reindex(id);
    }

    fn gone_after_drain(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.record.liveness = Liveness::Gone(now);
        record(out, now, Subject::Node(id), "gone", String::from("it left after its proved drain"), None);
        out.touched.nodes.insert(id);
        self.leave_rolling(id, "it is gone", None, now, out);
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one event")]
    pub(super) fn heartbeat(
        &mut self,
        id: NodeId,
        session: SessionId,
        sequence: u64,
        sample: HostSample,
        held: &[Held],
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(node) = self.node_on(id, session) else { return };
        node.heard = now;
        node.sample = sample;
        node.lease_end = lease::ended_here(now);
        if !matches!(node.record.liveness, Liveness::Live) {
            node.record.liveness = Liveness::Live;
            record(out, now, Subject::Node(id), "live", String::from("heard again"), None);
            out.touched.nodes.insert(id);
            self.freed.insert(id);
            self.reindex(id);
        }
        self.look_at_disk(id, now, out);
        self.reconcile(id, held, now, out);
        self.note_running(id, held, now, out);
        self.compare_at_heartbeat(id, held, now, out);
        let unknown = self.unknown_here(id, held);
        out.effects.push(Effect::GrantLease { node: id, session, sequence, duration: lease::duration(), unknown });
    }

    /// Reports precede the heartbeat on the same stream, and an ended attempt is held until we
    /// acknowledge it: what has started and is neither held nor reported is lost with its spawner.
    fn compare_at_heartbeat(&mut self, id: NodeId, held: &[Held], now: Timestamp, out: &mut Output) {
        if mutation::is_on(Mutation::HeartbeatUncompared) {
            return;
        }
        let held: BTreeMap<AttemptId, HeldPhase> = held.iter().map(|held| (held.attempt, held.phase)).collect();
        let lost: Vec<AttemptId> = self
            .nodes
            .get(&id)
            .into_iter()
            .flat_map(|node| node.attempts.iter())
            .filter(|attempt| !held.contains_key(attempt))
            .filter(|attempt| self.attempts.get(attempt).is_some_and(|known| known.record.started.is_some()))
            .copied()
            .collect();
        for attempt in lost {
            self.end_attempt(attempt, End::SpawnerLost, true, Vec::new(), now, out);
        }
    }

    /// Leases, loss and holds of one node, by what is.
    pub(super) fn settle_node(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        self.settle_liveness(id, now, out);
        self.settle_hold(id, now, out);
        self.settle_drain(id, now, out);
    }

    /// Told to go, and powered off without a last word: no silence that anybody should hear of, nor a reason to brake.
    /// Looked for before any silence, so that a brake does not take it for a host that lives.
    pub(super) fn notice_departure(&mut self, id: NodeId, now: Timestamp, out: &mut Output) -> bool {
        let is_due = |node: &&Node| node.record.liveness == Liveness::Live && node.lease_end <= now;
        let left = self.nodes.get(&id).filter(is_due).is_some_and(|node| is_told_to_go(&node.record));
        if left {
            self.close_session(id, "it was told to go, and nothing was heard of it since", out);
            self.gone_after_drain(id, now, out);
            self.reindex(id);
        }
        left
    }

    /// Its lease has run out and nothing was heard. Whether it is to be given up is asked later, however long it is: first
    /// a brake may hold.
    pub(super) fn notice_silence(&mut self, id: NodeId, now: Timestamp, out: &mut Output) -> bool {
        let is_due = |node: &&mut Node| node.record.liveness == Liveness::Live && node.lease_end <= now;
        if self.notice_departure(id, now, out) {
            return true;
        }
        let Some(node) = self.nodes.get_mut(&id).filter(is_due) else { return false };
        node.record.liveness = Liveness::Silent(now);
        let due = node.heard + limits::LOST_AFTER;
        let sentence = format!("no heartbeat for {}", now.since(node.heard));
        record(out, now, Subject::Node(id), "silent", sentence, None);
        out.touched.nodes.insert(id);
        self.reindex(id);
        self.wake_at(due, Timer::Node(id));
        self.apply_brake(now, out);
        true
    }

    fn settle_liveness(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        if self.notice_silence(id, now, out) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&id) else { return };
        match node.record.liveness {
            Liveness::Joining | Liveness::Gone(_) => {}
            Liveness::Lost(_) => self.settle_lost(id, now, out),
            Liveness::Live => {
                let due = node.lease_end;
                self.wake_at(due, Timer::Node(id));
            }
            Liveness::Silent(_) => self.settle_silent(id, now, out),
        }
    }

    fn settle_silent(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let due = (node.heard + limits::LOST_AFTER).max(self.meta.brake_until.unwrap_or_default());
        if due > now {
            self.wake_at(due, Timer::Node(id));
            return;
        }
        node.record.liveness = Liveness::Lost(now);
        let sentence = format!("no heartbeat for {}; its attempts are presumed lost", now.since(node.heard));
        record(out, now, Subject::Node(id), "lost", sentence, None);
        out.touched.nodes.insert(id);
        self.pause_after_brake(now, out);
        // A start may lie in its stream, sent before and not arrived: a lease granted on the same stream would let it
        // run beside the attempt that is placed now (FL-3). So the node says hello first, and is told what is over.
        self.close_session(id, "nothing was heard of this node for so long that its attempts were given up", out);
        self.give_up_attempts(id, &End::NodeLost(NodeLoss::Silent), now, out);
        self.settle_lost(id, now, out);
    }

    pub(super) fn settle_hold(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        match node.record.hold {
            Hold::None => {}
            Hold::Cooling { until, .. } if until > now => self.wake_at(until, Timer::Node(id)),
            Hold::Cooling { .. } => {
                // Its faults still count: one more is enough to cool it down again.
                node.record.hold = Hold::None;
                record(out, now, Subject::Node(id), "cooled", String::from("it may be tried again"), None);
                out.touched.nodes.insert(id);
                self.freed.insert(id);
            }
        }
        self.reindex(id);
    }
}

/// It proved itself empty and was told to go; no provider says whether it did.
const fn is_told_to_go(record: &NodeRecord) -> bool {
    matches!(record.duty, Duty::Stopping { .. }) && record.host.is_none()
}

/// From a stream of an agent that has died since, or that has opened another since: what it held then says nothing
/// about now.
fn is_late(node: &Node, hello: &Hello) -> bool {
    let is_older_stream = hello.stream > 0 && hello.stream < node.stream && !mutation::is_on(Mutation::LateHello);
    hello.agent_start < node.record.agent_start || (hello.agent_start == node.record.agent_start && is_older_stream)
}

/// A cloned disk or a copied key: another machine speaks as this node while the first still does.
fn second_claimant(node: &Node, hello: &Hello, now: Timestamp) -> Option<String> {
    let other = node.record.boot_id != hello.boot_id || node.record.instance != hello.instance;
    let speaking = node.session.is_some() && now.since(node.heard) < Millis(limits::HEARTBEAT_INTERVAL.0 * 2);
    (other && speaking).then(|| {
        format!(
            "node `{}` is connected with boot id {}, and another host with boot id {} claims to be it",
            node.record.name, node.record.boot_id, hello.boot_id
        )
    })
}

pub(super) fn new_record(
    name: String,
    pool: PoolName,
    host: Option<HostRequestId>,
    key: [u8; 32],
    now: Timestamp,
) -> NodeRecord {
    NodeRecord {
        name,
        pool,
        key,
        host,
        joined: now,
        incarnation: Incarnation(0),
        boot_id: String::new(),
        instance: String::new(),
        agent_start: 0,
        capacity: Resources::default(),
        labels: BTreeMap::new(),
        fences: BTreeSet::new(),
        version: String::new(),
        liveness: Liveness::Joining,
        duty: Duty::Eligible,
        hold: Hold::None,
        faults: 0,
        attempts_total: 0,
        idle_since: None,
        drain_revision: Revision(0),
        rolling: None,
        disk_full: None,
    }
}
