//! Wire, conversion, rules: what agents and operators send, decoded, checked and
//! applied to a fleet, which must keep its promises after each message.
//!
//! An input is a list of frames in protobuf's own form: the field's number says
//! who sends what ([`Frame`]), its content is the message as it comes off the
//! wire. What a frame means beyond that is what the coordinator's services do.

use std::collections::BTreeMap;

use muster_core::{
    denied::Denied,
    effect::{Effect, Reply},
    event::{DrainOrder, Event},
    fleet::{Fleet, Output},
    ids::{Actor, HostRequestId, JobId, NodeId, PoolName, RequestId, Revision, SessionId, Term},
    invariants, limits,
    policy::PoolPolicy,
    time::{Millis, Timestamp},
    timeline::Seen,
};
use muster_proto::{
    convert::{self, Checked},
    v1::{self, agent_message::Message as FromAgent, attempt_report::Change},
};
use prost::Message;

use super::fleet_seeds;
use crate::{
    protobuf::{self, Field, Value},
    target::{Shape, Signs, Target},
};

pub(super) const TARGET: Target = Target {
    name: "fleet",
    shape: Shape::Protobuf,
    words: &["node-1", "node-2", "static", "elastic", "n1", "stop", "poweroff", "delete", "nothing", "ns.pid", "boot"],
    inputs_in_ci: 4_000,
    take,
    seeds: fleet_seeds::seeds,
};

/// Pools of every run's fleet.
pub(super) const POOLS: [&str; 2] = [
    "name = \"static\"\nprovider = \"static\"\nmax = 100\n[host]\ncpu = 4\nmemory = \"8GiB\"\ndisk = \"1GiB\"\n",
    "name = \"elastic\"\nprovider = \"local\"\nmax = 5\nplacement = \"bin-pack\"\n[host]\ncpu = 4\nmemory = \"8GiB\"\n\
     disk = \"1GiB\"\n[[scale_out]]\nmetric = \"queue_length\"\nabove = 0\nfor = \"2s\"\nstep = 2\n[scale_in]\nidle = \"8s\"\n",
];
/// Of this many nodes, all of the static pool.
pub(super) const NODES: u64 = 3;
pub(super) const BEGIN: Timestamp = Timestamp(1_700_000_000_000);
/// One frame moves the clock by at most a month: it is ours, not the sender's.
const STEP_MAX: u64 = 30 * 86_400_000;
/// Frames of one input.
const FRAMES_MAX: usize = 200;
/// As the service of pools has it.
const POLICY_BYTES_MAX: usize = 64 << 10;
/// A time below this is a span from now, as the service of nodes has it.
const SPAN_MAX_MS: u64 = 1_000_000_000_000;

/// Numbers of frames. The first ones are `AgentMessage`s of the node with that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Frame {
    /// Milliseconds pass.
    Time = NODES + 1,
    Submit,
    Cancel,
    Retry,
    Cordon,
    Uncordon,
    Resume,
    Drain,
    Remove,
    SetPool,
    AcceptLoss,
    /// The stream of the node with this number breaks.
    Disconnect,
    /// Another leader takes over with what is stored.
    Led,
    /// The provider's word: which one, and on which request.
    Provider,
    /// A `TaskTable`, which the next submits name.
    Table,
    ReleaseBrake,
}

const FRAMES: [Frame; 16] = [
    Frame::Time,
    Frame::Submit,
    Frame::Cancel,
    Frame::Retry,
    Frame::Cordon,
    Frame::Uncordon,
    Frame::Resume,
    Frame::Drain,
    Frame::Remove,
    Frame::SetPool,
    Frame::AcceptLoss,
    Frame::Disconnect,
    Frame::Led,
    Frame::Provider,
    Frame::Table,
    Frame::ReleaseBrake,
];

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let mut world = World::new()?;
    for field in protobuf::read_prefix(input).take(FRAMES_MAX) {
        world.frame(&field, signs)?;
    }
    world.look(signs);
    Ok(())
}

/// A fleet, and what the coordinator's shell knows beside it.
pub(super) struct World {
    pub(super) fleet: Fleet,
    pub(super) now: Timestamp,
    pub(super) sessions: BTreeMap<NodeId, SessionId>,
    last_session: u64,
    last_request: u64,
    term: u64,
    table: Option<v1::TaskTable>,
    /// Of the last batch.
    pub(super) effects: Vec<Effect>,
}

impl World {
    /// Two pools, and nodes that have joined and said nothing yet.
    pub(super) fn new() -> Result<Self, String> {
        let mut world = Self {
            fleet: Fleet::default(),
            now: BEGIN,
            sessions: BTreeMap::new(),
            last_session: 0,
            last_request: 0,
            term: 1,
            table: None,
            effects: Vec::new(),
        };
        world.batch(vec![Event::Stored { commits: 0 }, Event::Led { term: Term(1) }])?;
        for text in POOLS {
            let policy = Box::new(toml::from_str(text).map_err(|error| error.to_string())?);
            world.ask(|request| Event::SetPool { request, policy, actor: operator() })?.map_err(|no| no.to_string())?;
        }
        for node in 1..=NODES {
            let (name, key) = (format!("node-{node}"), key_of(NodeId(node)));
            let pool = PoolName("static".into());
            let enroll = |request| Event::Enroll { request, name, pool, host: None, key, shown: NodeId(0) };
            world.ask(enroll)?.map_err(|no| no.to_string())?;
        }
        Ok(world)
    }

    /// One frame; what is refused is refused by a sentence and changes nothing.
    pub(super) fn frame(&mut self, field: &Field, signs: &mut Signs) -> Result<(), String> {
        match &field.value {
            Value::Bytes(bytes) if (1..=NODES).contains(&field.number) => {
                self.hear_agent(NodeId(field.number), bytes, signs)
            }
            value => match FRAMES.iter().find(|frame| **frame as u64 == field.number) {
                Some(frame) => self.hear_others(*frame, value, signs),
                None => Ok(()),
            },
        }
    }

    fn hear_others(&mut self, frame: Frame, value: &Value, signs: &mut Signs) -> Result<(), String> {
        match (frame, value) {
            (Frame::Time, Value::Varint(span)) => {
                self.now = self.now + Millis((*span).min(STEP_MAX));
                self.batch(vec![Event::Tick])
            }
            (Frame::Disconnect, Value::Varint(node)) => match self.sessions.remove(&NodeId(*node)) {
                Some(session) => self.batch(vec![Event::NodeDisconnected { node: NodeId(*node), session }]),
                None => Ok(()),
            },
            (Frame::Led, Value::Varint(commits)) => {
                self.term += 1;
                self.sessions.clear();
                let led = Event::Led { term: Term(self.term) };
                self.batch(vec![Event::Stored { commits: *commits }, led])
            }
            (Frame::Provider, Value::Varint(word)) => self.batch(vec![provider(*word)]),
            (Frame::Table, Value::Bytes(bytes)) => {
                let table = convert::task_table(bytes.clone().into());
                signs.result("table", &table);
                self.table = table.ok();
                Ok(())
            }
            (_, Value::Bytes(bytes)) => self.hear_operator(frame, bytes, signs),
            (_, Value::Varint(_) | Value::Fixed32(_) | Value::Fixed64(_)) => Ok(()),
        }
    }

    fn hear_agent(&mut self, node: NodeId, bytes: &[u8], signs: &mut Signs) -> Result<(), String> {
        let Some(message) = decoded::<v1::AgentMessage>(bytes, signs).and_then(|wire| wire.message) else {
            return Ok(());
        };
        signs.variant("agent says", &message);
        let events = match self.sessions.get(&node) {
            None => self.hello(node, message),
            Some(session) => events(node, *session, message),
        };
        signs.result("agent", &events);
        match events {
            Ok(events) => self.batch(events),
            // The stream is cut for it.
            Err(_) => match self.sessions.remove(&node) {
                Some(session) => self.batch(vec![Event::NodeDisconnected { node, session }]),
                None => Ok(()),
            },
        }?;
        self.signs_of_effects(signs);
        Ok(())
    }

    fn hello(&mut self, node: NodeId, message: FromAgent) -> Checked<Vec<Event>> {
        let FromAgent::Hello(wire) = message else { return rejected("the first message of a session is Hello") };
        let hello = convert::hello(&wire)?;
        self.last_session += 1;
        let session = SessionId(self.last_session);
        self.sessions.insert(node, session);
        // As if its seal were ours: a host keeps what any leader of this fleet told it.
        let seen = Seen { term: Term(wire.seen_term), commit: wire.seen_commit };
        Ok(vec![Event::HostSaw { node, seen }, Event::NodeConnected { node, key: key_of(node), session, hello }])
    }

    fn hear_operator(&mut self, frame: Frame, bytes: &[u8], signs: &mut Signs) -> Result<(), String> {
        signs.variant("operator asks", &frame);
        let asked = match frame {
            Frame::Submit => self.submit(bytes, signs),
            Frame::Cancel => decoded::<v1::CancelRequest>(bytes, signs).map(|wire| {
                let (job, tasks) = (JobId(wire.job), (!wire.tasks.is_empty()).then_some(wire.tasks));
                let reason = convert::reason(&wire.reason)?;
                Ok(vec![one(move |request| Event::Cancel { request, job, tasks, actor: operator(), reason })])
            }),
            Frame::Retry => decoded::<v1::RetryRequest>(bytes, signs).map(|wire| {
                let job = JobId(wire.job);
                Ok(vec![one(move |request| Event::Retry { request, job, actor: operator() })])
            }),
            Frame::Cordon => {
                self.cordon(bytes, signs, |request, node, actor, reason| Event::Cordon { request, node, actor, reason })
            }
            Frame::Uncordon => self.cordon(bytes, signs, |request, node, actor, reason| Event::Uncordon {
                request,
                node,
                actor,
                reason,
            }),
            Frame::Resume => {
                self.cordon(bytes, signs, |request, node, actor, reason| Event::Resume { request, node, actor, reason })
            }
            Frame::Drain => decoded::<v1::DrainRequest>(bytes, signs).map(|wire| self.drain(&wire)),
            Frame::Remove => decoded::<v1::RemoveNodeRequest>(bytes, signs).map(|wire| {
                let reason = convert::reason(&wire.reason)?;
                let Some(node) = self.fleet.node_named(&wire.node) else { return rejected("there is no such node") };
                let force = wire.force;
                Ok(vec![one(move |request| Event::RemoveNode { request, node, force, actor: operator(), reason })])
            }),
            Frame::SetPool => decoded::<v1::SetPoolRequest>(bytes, signs).map(|wire| set_pool(&wire)),
            Frame::AcceptLoss => decoded::<v1::AcceptLossRequest>(bytes, signs).map(|wire| {
                let reason = convert::reason(&wire.reason)?;
                Ok(vec![one(move |request| Event::AcceptLoss { request, actor: operator(), reason })])
            }),
            Frame::ReleaseBrake => decoded::<v1::ReleaseBrakeRequest>(bytes, signs).map(|wire| {
                let reason = convert::reason(&wire.reason)?;
                Ok(vec![one(move |request| Event::ReleaseBrake { request, actor: operator(), reason })])
            }),
            Frame::Time | Frame::Disconnect | Frame::Led | Frame::Provider | Frame::Table => None,
        };
        let Some(asked) = asked else { return Ok(()) };
        signs.result("operator", &asked);
        for question in asked.unwrap_or_default() {
            let answer = self.ask(question)?;
            signs.result("answer", &answer);
        }
        self.signs_of_effects(signs);
        Ok(())
    }

    fn submit(&self, bytes: &[u8], signs: &mut Signs) -> Option<Checked<Vec<Question>>> {
        let wire = decoded::<v1::SubmitRequest>(bytes, signs)?;
        Some((|| {
            let key = convert::idempotency_key(&wire.idempotency_key)?;
            let Some(template) = wire.template else { return rejected("template is missing") };
            let table = match &template.task_table {
                Some(reference) => {
                    convert::blob("task_table", reference)?;
                    self.table.as_ref()
                }
                None => None,
            };
            let checked = convert::template(template, &operator(), table)?;
            let (mut digest, spec) = ([0; 32], checked.spec);
            checked.canonical.iter().enumerate().for_each(|(at, byte)| digest[at % 32] ^= byte);
            Ok(vec![one(move |request| Event::Submit { request, key, digest, spec })])
        })())
    }

    fn cordon(
        &self,
        bytes: &[u8],
        signs: &mut Signs,
        event: fn(RequestId, NodeId, Actor, String) -> Event,
    ) -> Option<Checked<Vec<Question>>> {
        let wire = decoded::<v1::CordonRequest>(bytes, signs)?;
        Some(convert::reason(&wire.reason).map(|reason| {
            let chosen = self.chosen(&wire.selector.unwrap_or_default()).into_iter();
            chosen
                .map(|node| {
                    let reason = reason.clone();
                    one(move |request| event(request, node, operator(), reason))
                })
                .collect()
        }))
    }

    fn drain(&self, wire: &v1::DrainRequest) -> Checked<Vec<Question>> {
        let in_time = |at| if at < SPAN_MAX_MS { self.now + Millis(at) } else { Timestamp(at) };
        let order = DrainOrder {
            deadline: wire.deadline_ms.map(in_time),
            then: convert::drain_then(&wire.then)?,
            refusable: false,
            actor: operator(),
            reason: convert::reason(&wire.reason)?,
        };
        let chosen = self.chosen(wire.selector.as_ref().unwrap_or(&v1::NodeSelector::default())).into_iter();
        let drains = chosen.map(|node| {
            let order = order.clone();
            one(move |request| Event::Drain { request, node, order })
        });
        Ok(drains.collect())
    }

    fn chosen(&self, selector: &v1::NodeSelector) -> Vec<NodeId> {
        let named = selector.nodes.iter().filter_map(|name| self.fleet.node_named(name));
        let of_pool = self.fleet.nodes().filter(|(_, node)| node.pool.0 == selector.pool).map(|(id, _)| id);
        named.chain(of_pool).collect()
    }

    /// A request gets one answer, whatever it is.
    fn ask(&mut self, event: impl FnOnce(RequestId) -> Event) -> Result<Result<Reply, Denied>, String> {
        self.last_request += 1;
        let asked = RequestId(self.last_request);
        self.batch(vec![event(asked)])?;
        let mut answers = self.effects.iter().filter_map(|effect| match effect {
            Effect::Reply { request, reply } if *request == asked => Some(reply.clone()),
            _other => None,
        });
        match (answers.next(), answers.next()) {
            (Some(answer), None) => Ok(answer),
            (None, _) => Err("a request got no answer".into()),
            (Some(_), Some(_)) => Err("a request got two answers".into()),
        }
    }

    /// As the driver: the events, one settling, the promises.
    pub(super) fn batch(&mut self, events: Vec<Event>) -> Result<(), String> {
        let mut out = Output::default();
        for event in events {
            self.fleet.apply(event, self.now, &mut out);
        }
        self.fleet.settle(self.now, &mut out);
        self.effects = out.effects;
        invariants::check(&self.fleet).map_err(|broken| broken.to_string())
    }

    fn signs_of_effects(&self, signs: &mut Signs) {
        for effect in &self.effects {
            signs.variant("effect", effect);
        }
        for (_, job) in self.fleet.jobs() {
            signs.variant("job", &job.state());
            job.ended.keys().for_each(|end| signs.note("end", end));
        }
        for (id, node) in self.fleet.nodes() {
            signs.variant("node", &node.state());
            signs.count("attempts", self.fleet.attempts_on(id).count());
        }
    }

    /// What people are shown must not fail either.
    fn look(&self, signs: &mut Signs) {
        for (job, _) in self.fleet.jobs() {
            signs.note("wait", &self.fleet.explain_wait(*job).unwrap_or_default());
        }
        for (node, _) in self.fleet.nodes() {
            signs.count("blockers", self.fleet.blockers(node, self.now).len());
        }
        for (pool, _) in self.fleet.pools() {
            self.fleet.explain_pool(pool).iter().for_each(|sentence| signs.note("pool", sentence));
        }
    }
}

type Question = Box<dyn FnOnce(RequestId) -> Event>;

fn one(event: impl FnOnce(RequestId) -> Event + 'static) -> Question {
    Box::new(event)
}

fn key_of(node: NodeId) -> [u8; 32] {
    [node.0 as u8; 32]
}

fn operator() -> Actor {
    Actor("operator".into())
}

fn rejected<T>(why: &str) -> Checked<T> {
    Err(convert::Rejected { field: "fuzz".into(), reason: why.into() })
}

fn decoded<M: Message + Default>(bytes: &[u8], signs: &mut Signs) -> Option<M> {
    let message = M::decode(bytes);
    signs.result("decode", &message);
    message.ok()
}

/// A message of an open stream, as the coordinator's service translates it.
fn events(node: NodeId, session: SessionId, message: FromAgent) -> Checked<Vec<Event>> {
    let event = match message {
        FromAgent::Hello(_) => return rejected("Hello is the first message, and only the first"),
        FromAgent::Heartbeat(beat) => Event::Heartbeat {
            node,
            session,
            sequence: beat.sequence,
            sample: convert::sample(beat.metrics.as_ref()),
            held: convert::held(&beat.held)?,
        },
        FromAgent::Reports(reports) => {
            return reports.reports.into_iter().map(|wire| report(node, session, wire)).collect();
        }
        FromAgent::DrainProof(proof) => Event::DrainProved { node, session, revision: Revision(proof.revision) },
        FromAgent::StopNotice(notice) => Event::StopNotice {
            node,
            session,
            reason: convert::reason(&notice.reason)?,
            within: notice.within_ms.map(Millis),
        },
        FromAgent::Stuck(stuck) => {
            Event::AttemptStuck { node, session, attempt: convert::attempt_id(stuck.attempt.as_ref())? }
        }
        FromAgent::GivenBack(given) => {
            let attempts = given.attempts.iter().map(|id| convert::attempt_id(Some(id)));
            Event::GivenBack { node, session, attempts: attempts.collect::<Checked<_>>()? }
        }
        FromAgent::DrainRefused(refused) => Event::DrainRefused {
            node,
            session,
            revision: Revision(refused.revision),
            reason: convert::reason(&refused.reason)?,
        },
    };
    Ok(vec![event])
}

fn report(node: NodeId, session: SessionId, wire: v1::AttemptReport) -> Checked<Event> {
    let (attempt, epoch) = (convert::attempt_id(wire.attempt.as_ref())?, convert::epoch(wire.epoch.as_ref())?);
    match wire.change {
        Some(Change::Started(_)) => Ok(Event::AttemptStarted { node, session, attempt, epoch }),
        Some(Change::Ended(ended)) => {
            let (end, detail) = (convert::end(ended.end.as_ref())?, convert::detail(&ended)?);
            let wall = Some(Millis(ended.wall_ms));
            Ok(Event::AttemptEnded { node, session, attempt, epoch, end, wall, detail })
        }
        None => rejected("a report says that its attempt started or ended"),
    }
}

fn set_pool(wire: &v1::SetPoolRequest) -> Checked<Vec<Question>> {
    if wire.policy.len() > POLICY_BYTES_MAX {
        return rejected("the policy is too long");
    }
    let policy: Box<PoolPolicy> = match toml::from_str(&wire.policy) {
        Ok(policy) => policy,
        // Its whole text draws the line, and so each would be a sign of its own.
        Err(error) => return rejected(error.message()),
    };
    convert::name("policy.name", &policy.name.0)?;
    Ok(vec![one(move |request| Event::SetPool { request, policy, actor: operator() })])
}

fn provider(word: u64) -> Event {
    let (pool, host) = (PoolName("elastic".into()), HostRequestId(word / 4));
    match word % 4 {
        0 => Event::HostFailed { pool, host, reason: "no room".into() },
        1 => Event::HostGone { pool, host },
        2 => Event::HostDeleteFailed { pool, host, reason: "busy".into() },
        _heard => Event::ProviderHeard { pool, trouble: host.0.is_multiple_of(2).then(|| "no answer".into()) },
    }
}

const _: () = assert!(limits::NODES_MAX > NODES as usize, "the nodes of a run fit in a fleet");
