//! The client: submits jobs of all kinds under keys of its own, asks again when an
//! answer fails to come, and writes down what it hears.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use muster_proto::v1;
use muster_tests::{Client, Fleet, client::bytes, until};
use serde_json::json;
use tonic::{Code, Status};

use crate::{dice::Dice, history::Writer};

/// A call that has no answer by then is given up: it may be done.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

/// What the job does, in words of a shell alone but for the sleep: its clock is the one of `boot_ms`, to 10 ms.
const SCRIPT: &str = r#"
say() {
    read -r up idle < /proc/uptime
    printf '{"kind":"%s","key":"%s","task":%s,"epoch":"%s","at_ms":%s0%s}\n' \
        "$1" "$CHAOS_KEY" "$MUSTER_TASK" "$MUSTER_EPOCH" "${up%.*}${up#*.}" "$2" >> "$CHAOS_WITNESS"
}
say start
beats=$CHAOS_BEATS
while [ $beats -gt 0 ]; do
    sleep 0.2
    say beat
    beats=$((beats - 1))
done
code=0
[ "${MUSTER_EPOCH#*.}" -gt "$CHAOS_FAILURES" ] || code=$CHAOS_CODE
say end ",\"code\":$code"
exit $code
"#;

/// Whom to ask: the coordinator that answered last comes first.
#[derive(Clone, Debug)]
pub struct Doors {
    clients: Arc<Vec<Client>>,
    good: Arc<AtomicUsize>,
}

impl Doors {
    /// All of them.
    pub fn new(clients: Vec<Client>) -> Self {
        Self { clients: Arc::new(clients), good: Arc::new(AtomicUsize::new(0)) }
    }

    /// One call, to whoever is held to lead. No answer in time is an error that leaves all open.
    pub async fn call<T>(&self, ask: impl AsyncFnOnce(Client) -> Result<T, Status>) -> Result<T, Status> {
        let at = self.good.load(Ordering::Relaxed);
        let client = self.clients[at % self.clients.len()].clone();
        let answer = tokio::time::timeout(PATIENCE, ask(client)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        if answer.as_ref().is_err_and(is_open) {
            // Whoever is first moves on for all.
            let _ = self.good.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        answer
    }
}

/// The error leaves open whether the call was done.
pub fn is_open(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted | Code::Internal
    )
}

/// A client with its jobs.
#[derive(Clone, Debug)]
pub struct Load {
    /// Whom it asks.
    pub doors: Doors,
    /// What it saw.
    pub history: Writer,
    /// Jobs that it was answered with.
    pub jobs: Arc<Mutex<Vec<u64>>>,
    /// In the environment of each process of its jobs.
    pub mark: String,
}

/// One job and what its client will do.
#[derive(Clone, Debug)]
struct Plan {
    key: String,
    delivery: &'static str,
    template: v1::JobTemplate,
    gives_up: bool,
    asks_again: bool,
    asks_for_another: bool,
}

impl Load {
    /// Submits up to a moment; each job's client may go on a little longer.
    pub async fn submit_until(self, fleet: Planner, end: Instant, mut dice: Dice) {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0.. {
            if Instant::now() >= end {
                break;
            }
            let plan = fleet.plan(number, &self.mark, &mut dice);
            clients.spawn_local(self.clone().submit(plan, end + 4 * PATIENCE));
            until(Instant::now() + dice.millis(80..500)).await;
        }
        clients.join_all().await;
    }

    async fn submit(self, plan: Plan, end: Instant) {
        let Some(job) = self.ask(&plan, end).await else { return };
        self.jobs.lock().expect("no client panics").push(job);
        if plan.asks_again {
            self.ask(&plan, end).await;
        }
        if plan.asks_for_another {
            let mut other = plan.template.clone();
            other.tasks += 1;
            let key = plan.key.clone();
            match self.doors.call(async |client| client.try_submit(&key, other).await).await {
                Ok(_) => self.history.write(&json!({"kind": "conflict", "key": plan.key, "refused": false})),
                Err(status) if status.code() == Code::AlreadyExists => {
                    self.history.write(&json!({"kind": "conflict", "key": plan.key, "refused": true}));
                }
                Err(_no_news) => (),
            }
        }
    }

    /// Asks until there is an answer, or until it gives up.
    async fn ask(&self, plan: &Plan, end: Instant) -> Option<u64> {
        let tasks = plan.template.tasks;
        loop {
            self.history.write(&json!({"kind": "asked", "key": plan.key, "delivery": plan.delivery, "tasks": tasks}));
            let template = plan.template.clone();
            match self.doors.call(async |client| client.try_submit(&plan.key, template).await).await {
                Ok(answer) => {
                    let (job, existed) = (answer.job, answer.existed);
                    self.history.write(&json!({"kind": "answered", "key": plan.key, "job": job, "existed": existed}));
                    return Some(job);
                }
                Err(status) => {
                    let (code, said) = (format!("{:?}", status.code()), status.message());
                    self.history.write(&json!({
                        "kind": "failed", "key": plan.key, "maybe": is_open(&status), "code": code, "said": said
                    }));
                }
            }
            if plan.gives_up || Instant::now() >= end {
                return None;
            }
            until(Instant::now() + PAUSE).await;
        }
    }
}

/// Makes jobs.
#[derive(Clone, Debug)]
pub struct Planner {
    /// A job of this fleet that does nothing.
    base: v1::JobTemplate,
    witness: String,
    beats_max: u64,
}

impl Planner {
    /// For a fleet whose jobs write into this file. A job that lasts longer than a host's lease is only there in a run
    /// of so many seconds: it is what the fence of an exclusive one is for.
    pub fn new(fleet: &Fleet, witness: &Path, seconds: u64) -> Self {
        let mut base = fleet.script(SCRIPT);
        let body = base.body.as_mut().expect("a script has a body");
        body.profile = v1::Profile::Shared.into();
        body.network = v1::Network::Host.into();
        Self { base, witness: witness.display().to_string(), beats_max: (seconds * 5).clamp(30, 150) }
    }

    fn plan(&self, number: u64, mark: &str, dice: &mut Dice) -> Plan {
        let key = format!("{mark}-{number}");
        let kinds = [
            ("at_least_once", v1::Delivery::AtLeastOnce),
            ("at_most_once", v1::Delivery::AtMostOnce),
            ("exclusive", v1::Delivery::Exclusive),
        ];
        let (delivery, kind) = *dice.pick(&kinds).expect("three kinds");
        let mut template = self.base.clone();
        template.name.clone_from(&key);
        template.tasks = u32::try_from(dice.among(1..4)).expect("few");
        // Most succeed; some fail once and then succeed, some always fail.
        let failures = *dice.pick(&[0, 0, 0, 0, 1, 99]).expect("some");
        template.retries =
            Some(v1::RetryPolicy { failed: Some(dice.among(0..3) as u32), lost: Some(8), drained: None });
        let body = template.body.as_mut().expect("a script has a body");
        body.delivery = kind.into();
        let beats = if dice.once_in(8) { dice.among(10..self.beats_max) } else { dice.among(0..8) };
        let variables = [
            ("CHAOS_KEY", key.clone()),
            ("CHAOS_WITNESS", self.witness.clone()),
            ("CHAOS_BEATS", beats.to_string()),
            ("CHAOS_FAILURES", failures.to_string()),
            ("CHAOS_CODE", dice.among(1..20).to_string()),
        ];
        body.environment =
            variables.map(|(name, value)| v1::EnvironmentVariable { name: bytes(name), value: bytes(value) }).to_vec();
        let (gives_up, asks_again) = (dice.once_in(8), dice.once_in(4));
        Plan { key, delivery, template, gives_up, asks_again, asks_for_another: dice.once_in(6) }
    }
}
