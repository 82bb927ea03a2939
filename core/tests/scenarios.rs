//! Readable transcripts of the core: `tests/scenarios/*.txt` hold commands and
//! what the fleet answers to each. A change of behaviour reads as a text diff.
//! `RECORD=1 cargo test -p muster-core --test scenarios` writes them anew.

mod described;

use std::{collections::BTreeMap, fmt::Write as _, fs, num::NonZeroU32, path::Path};

use described::describe;
use muster_core::{
    end::{End, NodeLoss},
    event::{DrainOrder, DrainThen, Event, Held, HeldPhase, Hello, HostSample},
    fleet::{Fleet, Image, Meta, Output},
    ids::{Actor, AttemptId, Epoch, HostRequestId, JobId, NodeId, PoolName, RequestId, Revision, SessionId, Term},
    job::JobRecord,
    limits,
    policy::{Below, Change, HostTemplate, Metric, PlacementOrder, PoolPolicy, ProviderKind, ScaleIn, ScaleOut, Sleep},
    resources::Resources,
    rolling::{RollingId, RollingOrder},
    spec::{Delivery, JobSpec, OnDrain, Retries},
    time::{Millis, Timestamp},
    timeline::Seen,
};

#[test]
fn transcripts_say_what_they_said() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scenarios");
    let mut paths: Vec<_> =
        fs::read_dir(&folder).expect("the scenarios folder").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no scenario in {}", folder.display());
    let mut differing = Vec::new();
    for path in paths {
        let recorded = fs::read_to_string(&path).expect("a scenario");
        let played = play(&recorded);
        if std::env::var_os("RECORD").is_some() {
            fs::write(&path, &played).expect("the scenario is writable");
        } else if played != recorded {
            differing.push(format!("--- {} now says:\n{played}", path.display()));
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

/// Plays the commands of a transcript and writes it anew with today's answers.
fn play(transcript: &str) -> String {
    let mut world = World::new();
    let mut played = String::new();
    for line in transcript.lines().filter(|line| !line.starts_with("  ")) {
        played.push_str(line);
        played.push('\n');
        if !line.is_empty() && !line.starts_with('#') {
            for answer in world.command(line) {
                writeln!(played, "  {answer}").expect("a string takes all");
            }
        }
    }
    played
}

struct World {
    fleet: Fleet,
    now: Timestamp,
    sessions: BTreeMap<NodeId, SessionId>,
    next_session: u64,
}

/// `key=value` words of a command.
struct Words<'a> {
    plain: Vec<&'a str>,
    named: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn of(line: &'a str) -> Self {
        let (named, plain): (Vec<&str>, Vec<&str>) = line.split_whitespace().partition(|word| word.contains('='));
        Self { plain, named: named.iter().filter_map(|word| word.split_once('=')).collect() }
    }

    fn text(&self, name: &str, default: &str) -> String {
        self.named.get(name).copied().unwrap_or(default).to_owned()
    }

    fn number(&self, name: &str, default: u64) -> u64 {
        self.named.get(name).map_or(default, |value| value.parse().expect("a number"))
    }
}

fn seconds(text: &str) -> Millis {
    match text.strip_suffix("ms") {
        Some(millis) => Millis(millis.parse().expect("milliseconds")),
        None => Millis::from_secs(text.strip_suffix('s').expect("seconds").parse().expect("seconds")),
    }
}

fn attempt(text: &str) -> AttemptId {
    let mut parts = text.split('.');
    let mut next = || parts.next().expect("job.task.number");
    let job: JobId = next().parse().expect("a job id");
    let task = next().parse().expect("a task");
    let number: NonZeroU32 = next().parse().expect("an attempt number");
    AttemptId { job, task, number }
}

fn drain_then(words: &Words<'_>) -> DrainThen {
    match words.text("then", "nothing").as_str() {
        "stop" => DrainThen::Stop,
        "delete" => DrainThen::Delete,
        _nothing => DrainThen::Nothing,
    }
}

fn end(text: &str) -> End {
    match text {
        "succeeded" => End::Succeeded,
        "cancelled" => End::Cancelled,
        "drained" => End::Drained,
        "spawner_lost" => End::SpawnerLost,
        "node_lost" => End::NodeLost(NodeLoss::Silent),
        "start_failed" => End::StartFailed { step: "mount.root".into(), errno: 5 },
        "no_folder" => End::StartFailed { step: "working_folder".into(), errno: 2 },
        other => End::Exited(other.strip_prefix("exit:").expect("an end").parse().expect("an exit code")),
    }
}

/// The same machine has the same key, unless another is named.
fn key_of(name: &str, words: &Words<'_>) -> [u8; 32] {
    [u8::try_from(words.number("key", name.len() as u64)).expect("a small number"); 32]
}

impl World {
    fn new() -> Self {
        let mut world =
            Self { fleet: Fleet::default(), now: Timestamp(1_000_000), sessions: BTreeMap::new(), next_session: 1 };
        world.apply(Event::Led { term: Term(1) });
        world
    }

    fn apply(&mut self, event: Event) -> Vec<String> {
        let mut out = Output::default();
        self.fleet.apply(event, self.now, &mut out);
        self.fleet.settle(self.now, &mut out);
        muster_core::invariants::check(&self.fleet).expect("every promise holds");
        describe(&out)
    }

    fn node(&self, name: &str) -> NodeId {
        self.fleet.nodes().find(|(_, node)| node.name == name).expect("a known node").0
    }

    fn session(&self, node: NodeId) -> SessionId {
        self.sessions.get(&node).copied().unwrap_or(SessionId(0))
    }

    fn command(&mut self, line: &str) -> Vec<String> {
        let words = Words::of(line);
        let request = RequestId(1);
        let actor = Actor("ana".into());
        let reason = words.text("reason", "because");
        let first = words.plain.get(1).copied().unwrap_or("");
        match words.plain[0] {
            "wait" => self.wait(seconds(first)),
            "keep" => self.keep(seconds(first), &words.plain[2..]),
            "stopped" => {
                // The coordinator itself does not run; then it looks once.
                self.now = self.now + seconds(first);
                self.apply(Event::Tick)
            }
            "node" => self.enroll_and_connect(first, &words),
            "connect" => self.connect(first, &words),
            "disconnect" => {
                let node = self.node(first);
                self.apply(Event::NodeDisconnected { node, session: self.session(node) })
            }
            "heartbeat" => {
                let node = self.node(first);
                let held = self.held(&words);
                let session = self.session(node);
                let free_mib = words.named.get("free_mib").map(|free| free.parse::<u64>().expect("a number") << 20);
                let sample = HostSample {
                    disk_total_bytes: free_mib.map(|_| 10 << 30),
                    disk_available_bytes: free_mib,
                    ..HostSample::default()
                };
                self.apply(Event::Heartbeat { node, session, sequence: 1, sample, held })
            }
            "submit" => self.submit(&words),
            "cancel" => {
                let job = first.parse().expect("a job id");
                let task = |task: &&str| vec![task.parse().expect("a task")];
                let tasks = words.plain.get(2).map(task);
                self.apply(Event::Cancel { request, job, tasks, actor, reason })
            }
            "retry" => self.apply(Event::Retry { request, job: first.parse().expect("a job id"), actor }),
            "started" => self.report(
                first,
                |node, session, attempt, epoch| Event::AttemptStarted { node, session, attempt, epoch },
                &words,
            ),
            "ended" => {
                let end = end(words.plain[2]);
                self.report(
                    first,
                    |node, session, attempt, epoch| Event::AttemptEnded {
                        node,
                        session,
                        attempt,
                        epoch,
                        end,
                        wall: None,
                        detail: Vec::new(),
                    },
                    &words,
                )
            }
            "stuck" => {
                self.report(first, |node, session, attempt, _| Event::AttemptStuck { node, session, attempt }, &words)
            }
            "stop_notice" => {
                let node = self.node(first);
                let within = words.named.get("within").map(|span| seconds(span));
                self.apply(Event::StopNotice { node, session: self.session(node), reason, within })
            }
            "given_back" => {
                let id = attempt(first);
                let node = self.fleet.attempt(id).expect("a live attempt").node;
                self.apply(Event::GivenBack { node, session: self.session(node), attempts: vec![id] })
            }
            "cordon" => self.apply(Event::Cordon { request, node: self.node(first), actor, reason }),
            "uncordon" => self.apply(Event::Uncordon { request, node: self.node(first), actor, reason }),
            "resume" => self.apply(Event::Resume { request, node: self.node(first), actor, reason }),
            "remove" => {
                let force = words.named.contains_key("force");
                self.apply(Event::RemoveNode { request, node: self.node(first), force, actor, reason })
            }
            "drain" => {
                let deadline = words.named.get("deadline").map(|span| self.now + seconds(span));
                let then = drain_then(&words);
                let order = DrainOrder { deadline, then, refusable: false, actor, reason };
                self.apply(Event::Drain { request, node: self.node(first), order })
            }
            "drain_rolling" => {
                let nodes = first.split(',').map(|name| self.node(name)).collect();
                let order = RollingOrder {
                    at_once: u32::try_from(words.number("at_once", 1)).expect("a small number"),
                    within: words.named.get("within").map(|span| seconds(span)),
                    then: drain_then(&words),
                    actor,
                    reason,
                };
                self.apply(Event::DrainRolling { request, nodes, order })
            }
            "cancel_rolling" => {
                let rolling = RollingId(words.number("id", 1));
                self.apply(Event::CancelRolling { request, rolling, actor, reason })
            }
            "proved" => {
                let node = self.node(first);
                let revision = Revision(words.number("revision", 1));
                self.apply(Event::DrainProved { node, session: self.session(node), revision })
            }
            "refused" => {
                let node = self.node(first);
                let revision = Revision(words.number("revision", 1));
                self.apply(Event::DrainRefused { node, session: self.session(node), revision, reason })
            }
            "pool" => self.pool(&words),
            "host_gone" => {
                let host = HostRequestId(first.parse().expect("a host"));
                self.apply(Event::HostGone { pool: PoolName("local".into()), host })
            }
            "provider_silent" | "provider_answers" => {
                let trouble = (words.plain[0] == "provider_silent").then_some(reason);
                self.apply(Event::ProviderHeard { pool: PoolName("local".into()), trouble })
            }
            "host_described" => {
                let host = HostRequestId(first.parse().expect("a host"));
                let kept = words.named.get("kept").map(|reason| (*reason).to_owned());
                self.apply(Event::HostDescribed { pool: PoolName("local".into()), host, kept })
            }
            "host_failed" => {
                let host = HostRequestId(first.parse().expect("a host"));
                self.apply(Event::HostFailed { pool: PoolName("local".into()), host, reason })
            }
            "saw" => {
                let seen = Seen { term: Term(words.number("term", 1)), commit: words.number("commit", 0) };
                self.apply(Event::HostSaw { node: self.node(first), seen })
            }
            "restart" => self.restart(&words),
            "lead" => self.apply(Event::Led { term: Term(words.number("term", 2)) }),
            "release_brake" => self.apply(Event::ReleaseBrake { request, actor, reason }),
            "accept_loss" => self.apply(Event::AcceptLoss { request, actor, reason }),
            "explain_pool" => self.fleet.explain_pool(&PoolName("local".into())),
            "explain" => {
                let job: JobId = first.parse().expect("a job id");
                vec![self.fleet.explain_wait(job).unwrap_or_else(|| "nothing waits".into())]
            }
            "nodes" => self
                .fleet
                .nodes()
                .map(|(id, node)| {
                    format!("{} {} attempts={}", node.name, node.state(), self.fleet.attempts_on(id).count())
                })
                .collect(),
            "job" => {
                let job = self.fleet.job(first.parse().expect("a job id")).expect("a known job");
                vec![format!(
                    "{} waiting={} live={} ended={:?}",
                    job.state().name(),
                    job.waiting.len(),
                    job.live.len(),
                    job.ended.iter().map(|(end, tasks)| format!("{end}:{}", tasks.len())).collect::<Vec<_>>()
                )]
            }
            other => panic!("no such command: {other}"),
        }
    }

    /// Time passes, and these nodes are heard all the while; their leases are not shown.
    fn keep(&mut self, span: Millis, names: &[&str]) -> Vec<String> {
        let until = self.now + span;
        let mut lines = Vec::new();
        while self.now < until {
            lines.extend(self.wait(limits::HEARTBEAT_INTERVAL.min(until.since(self.now))));
            for name in names {
                let beat = self.command(&format!("heartbeat {name}"));
                lines.extend(beat.into_iter().filter(|line| !line.contains("<- lease")));
            }
        }
        lines
    }

    /// Time passes in the steps that the fleet itself asks for.
    fn wait(&mut self, span: Millis) -> Vec<String> {
        let until = self.now + span;
        let mut answers = Vec::new();
        while let Some(due) = self.fleet.next_wake().filter(|due| *due <= until) {
            self.now = due.max(self.now);
            for answer in self.apply(Event::Tick) {
                answers.push(format!("at +{}: {answer}", self.now.since(Timestamp(1_000_000))));
            }
        }
        self.now = until;
        answers
    }

    fn enroll_and_connect(&mut self, name: &str, words: &Words<'_>) -> Vec<String> {
        let host = words.named.get("host").map(|host| HostRequestId(host.parse().expect("a host")));
        let pool = PoolName(words.text("pool", "local"));
        let key = key_of(name, words);
        let (name, shown) = (name.to_owned(), NodeId(words.number("shown", 0)));
        let enroll = Event::Enroll { request: RequestId(1), name: name.clone(), pool, host, key, shown };
        let mut answers = self.apply(enroll);
        answers.extend(self.connect(&name, words));
        answers
    }

    fn connect(&mut self, name: &str, words: &Words<'_>) -> Vec<String> {
        // Its certificate may name what another store gave out.
        let number = words.named.get("as").map(|number| NodeId(number.parse().expect("a number")));
        let node = number.unwrap_or_else(|| self.node(name));
        let session = SessionId(self.next_session);
        self.next_session += 1;
        if number.is_none() {
            self.sessions.insert(node, session);
        }
        let hello = Hello {
            boot_id: words.text("boot", "boot-1"),
            agent_start: words.number("start", 1),
            stream: words.number("stream", 0),
            instance: words.text("instance", name),
            capacity: Resources {
                cpu_milli: words.number("cpu", 1) * 1_000,
                memory_bytes: words.number("gib", 4) << 30,
                disk_bytes: 1 << 30,
            },
            labels: BTreeMap::new(),
            fences: words.text("fences", "ns.pid").split(',').map(str::to_owned).collect(),
            held: self.held(words),
            closed_for_drain: Revision(words.number("closed", 0)),
            version: "muster".into(),
        };
        self.apply(Event::NodeConnected { node, key: key_of(name, words), session, hello })
    }

    /// Another coordinator leads, with what the store has: all that is known of nobody's streams is gone.
    /// `longest=60s`: a leader of another version granted such leases.
    fn restart(&mut self, words: &Words<'_>) -> Vec<String> {
        let fleet = &self.fleet;
        let jobs: Vec<_> =
            fleet.jobs().map(|(id, job)| (*id, JobRecord { live: BTreeMap::new(), ..job.clone() })).collect();
        let attempts = |(id, _): &(JobId, JobRecord)| {
            fleet.attempts_of(*id).map(|(id, record)| (id, record.clone())).collect::<Vec<_>>()
        };
        let image = Image {
            meta: Meta {
                longest_lease: words.named.get("longest").map_or(fleet.meta().longest_lease, |span| seconds(span)),
                ..fleet.meta().clone()
            },
            attempts: jobs.iter().flat_map(attempts).collect(),
            jobs,
            nodes: fleet.nodes().map(|(id, node)| (id, node.clone())).collect(),
            pools: fleet.pools().map(|(name, pool)| (name.clone(), pool.clone())).collect(),
        };
        self.fleet = match Fleet::restore(image) {
            Ok(fleet) => fleet,
            Err(damage) => return vec![damage.to_string()],
        };
        self.sessions.clear();
        self.apply(Event::Led { term: Term(words.number("term", 2)) })
    }

    /// `held=100.0.1:running,100.1.1:queued`, placed under `held_term=`
    fn held(&self, words: &Words<'_>) -> Vec<Held> {
        let list = words.text("held", "");
        let term = Term(words.number("held_term", 1));
        list.split(',')
            .filter(|item| !item.is_empty())
            .map(|item| {
                let (id, phase) = item.split_once(':').expect("attempt:phase");
                let phase = match phase {
                    "queued" => HeldPhase::Queued,
                    "running" => HeldPhase::Running,
                    "stopping" => HeldPhase::Stopping,
                    _ended => HeldPhase::Ended,
                };
                let id = attempt(id);
                Held { attempt: id, epoch: Epoch { term, attempt: id.number }, phase }
            })
            .collect()
    }

    fn submit(&mut self, words: &Words<'_>) -> Vec<String> {
        let spec = JobSpec {
            name: "job".into(),
            owner: Actor("ana".into()),
            pool: words.named.get("pool").map(|name| PoolName((*name).to_owned())),
            priority: words.text("priority", "0").parse().expect("a priority"),
            tasks: u32::try_from(words.number("tasks", 1)).expect("tasks"),
            request: Resources {
                cpu_milli: words.number("cpu_milli", 1_000),
                memory_bytes: words.number("gib", 1) << 30,
                disk_bytes: words.number("disk_mib", 0) << 20,
            },
            fences: words.text("fences", "").split(',').filter(|fence| !fence.is_empty()).map(str::to_owned).collect(),
            constraints: BTreeMap::new(),
            delivery: match words.text("delivery", "").as_str() {
                "once" => Delivery::AtMostOnce,
                "exclusive" => Delivery::Exclusive,
                _default => Delivery::AtLeastOnce,
            },
            on_drain: match words.text("on_drain", "").as_str() {
                "requeue" => OnDrain::Requeue,
                "checkpoint" => OnDrain::Checkpoint { signal: 10 },
                _finish => OnDrain::Finish,
            },
            retries: Retries {
                failed: u32::try_from(words.number("retries", 0)).expect("retries"),
                drained: u32::try_from(words.number("drains", 16)).expect("retries"),
                ..Retries::default()
            },
            time_limit: None,
            grace: limits::GRACE,
        };
        let key = words.text("key", &format!("key-{}", self.fleet.meta().next_job));
        let digest = [words.number("digest", 0) as u8; 32];
        self.apply(Event::Submit { request: RequestId(1), key, digest, spec })
    }

    fn report(
        &mut self,
        text: &str,
        event: impl FnOnce(NodeId, SessionId, AttemptId, Epoch) -> Event,
        words: &Words<'_>,
    ) -> Vec<String> {
        let id = attempt(text);
        let node = match words.named.get("from") {
            Some(name) => self.node(name),
            None => self.fleet.attempt(id).expect("a live attempt").node,
        };
        let epoch = Epoch { term: Term(words.number("term", 1)), attempt: id.number };
        let session = words.named.get("session").map(|number| SessionId(number.parse().expect("a session")));
        self.apply(event(node, session.unwrap_or_else(|| self.session(node)), id, epoch))
    }

    fn pool(&mut self, words: &Words<'_>) -> Vec<String> {
        let small = |key, default| u32::try_from(words.number(key, default)).expect("a small number");
        let host =
            HostTemplate { cpu_milli: 1_000, memory_bytes: 4 << 30, disk_bytes: 1 << 30, labels: BTreeMap::new() };
        let name = PoolName("local".into());
        let provider = match words.text("provider", "").as_str() {
            "exec" => ProviderKind::Exec,
            "static" => ProviderKind::Static,
            _local => ProviderKind::Local,
        };
        let policy = PoolPolicy {
            sleep: if words.text("sleep", "") == "poweroff" { Sleep::Poweroff } else { Sleep::Stop },
            wake: words.named.get("wake").map(|program| (*program).to_owned()),
            placement: if words.text("placement", "") == "bin-pack" {
                PlacementOrder::BinPack
            } else {
                PlacementOrder::Spread
            },
            boot_deadline: seconds(&words.text("boot_deadline", "60s")),
            scale_out: vec![ScaleOut {
                metric: Metric::QueueLength,
                above: words.number("above", 2),
                hold: seconds(&words.text("hold", "0s")),
                change: Change::Step(1),
                cooldown: Some(seconds(&words.text("cooldown", "0s"))),
            }],
            scale_in: Some(ScaleIn {
                when: vec![Below { metric: Metric::QueueLength, below: 1, hold: Millis(0) }],
                cooldown: Some(Millis(0)),
                busy: words.named.get("busy").map(|within| seconds(within)),
                ..ScaleIn::one_by_one(seconds(&words.text("idle", "60s")))
            }),
            ..PoolPolicy::fixed(name, provider, small("min", 0), small("max", 4), host)
        };
        self.apply(Event::SetPool { request: RequestId(1), policy: Box::new(policy), actor: Actor("ana".into()) })
    }
}
