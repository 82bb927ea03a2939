//! Hosts in networks of their own, cut off in every way: what is exclusive is
//! dead before it is placed again, all else fares as its delivery says, and a
//! partition that is over before the lease is not seen at all.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use muster_proto::v1::{self, Delivery, end::Reason, node_lost::Cause};
use muster_tests::{
    Cut, Fleet, Network, NodeOptions, WAIT,
    client::{bytes, fresh_key},
    eventually, host, skip, until,
};
use nix::sys::signal::Signal;

const NO_NETWORK: &str = "only root makes network namespaces, with iproute2";
/// Two minutes until a silent node is lost, and as long again for a slow machine.
const LOST: Duration = Duration::from_secs(240);
const MARK: &str = "PARTITION_MARK";

/// A fleet in its own network, hosts in the order in which they were added.
struct World {
    fleet: Fleet,
    network: Network,
}

impl World {
    async fn start() -> Option<Self> {
        let network = Network::new()?;
        let fleet = Fleet::start_in(&network).await;
        Some(Self { fleet, network })
    }

    async fn add_node(&mut self, name: &str, cpu: &'static str) {
        let network = Some(self.network.add_host());
        self.fleet.add_node(name, &NodeOptions { cpu, network, ..NodeOptions::default() }).await;
    }

    /// Its first attempt runs until it is ended, a later one does as its script says.
    async fn submit(&self, delivery: Delivery, cpu_milli: u64, later: &str) -> Watched {
        let mark = fresh_key();
        let script = format!("[ ${{MUSTER_EPOCH#*.}} = 1 ] || {later}; while :; do sleep 0.5; done");
        let mut template = self.fleet.script(&script);
        let body = template.body.as_mut().expect("a script has a body");
        body.delivery = delivery.into();
        body.request = Some(v1::Resources { cpu_milli, memory_bytes: 64 << 20, disk_bytes: 16 << 20 });
        body.environment = vec![v1::EnvironmentVariable { name: bytes(MARK), value: bytes(&mark) }];
        let job = self.fleet.client.submit(template).await;
        self.fleet.client.running(job, 1).await;
        let first = eventually("its process is seen", WAIT, async || {
            Some(processes(&mark, 1)).filter(|found| !found.is_empty())
        })
        .await;
        Watched { job, mark, first }
    }

    async fn attempts(&self, job: &Watched) -> Vec<v1::Attempt> {
        self.fleet.client.tasks(job.job).await.swap_remove(0).attempts
    }
}

/// A job of one task with the processes of its first attempt.
struct Watched {
    job: u64,
    mark: String,
    first: Vec<(u32, String)>,
}

impl Watched {
    /// No process of its first attempt is left.
    fn is_dead(&self) -> bool {
        processes(&self.mark, 1).is_empty() && self.first.iter().all(|known| !is_there(known))
    }
}

/// Processes of an attempt by its number: pid and start time, which together are never used again.
fn processes(mark: &str, number: u32) -> Vec<(u32, String)> {
    let variable = format!("{MARK}={mark}");
    let found = host::processes_with(&variable).into_iter().filter(|(pid, _)| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        variables.any(|line| line.starts_with("MUSTER_EPOCH=") && line.ends_with(&format!(".{number}")))
    });
    found.filter_map(|(pid, _)| Some((pid, start_time(pid)?))).collect()
}

fn is_there((pid, start): &(u32, String)) -> bool {
    start_time(*pid).as_ref() == Some(start)
}

/// Field 22 of /proc/PID/stat; none: it has ended, also if nobody has fetched its status yet.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    (!matches!(*fields.first()?, "Z" | "X")).then(|| fields.get(19).map(|field| (*field).to_owned()))?
}

/// What happened when, by both clocks: the boot-time clock of the host, which is also that of its jobs, and the
/// coordinator's own.
struct Timeline {
    begun: i64,
    /// Of the coordinator's clock against the boot-time clock: both are clocks of this machine.
    offset: i64,
}

impl Timeline {
    fn begin() -> Self {
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let begun = host::boot_ms();
        println!("{:>9}  {:>14}  {:>15}", "", "boot-time ms", "coordinator ms");
        Self { begun, offset: i64::try_from(wall.as_millis()).expect("our time") - begun }
    }

    fn say(&self, boot: i64, what: &str) {
        println!("{:>+7.2} s  {boot:>14}  {:>15}  {what}", (boot - self.begun) as f64 / 1e3, boot + self.offset);
    }

    fn now(&self, what: &str) -> i64 {
        let boot = host::boot_ms();
        self.say(boot, what);
        boot
    }

    /// A time of the coordinator's in boot-time.
    fn boot_of(&self, coordinator_ms: u64) -> i64 {
        i64::try_from(coordinator_ms).expect("our time") - self.offset
    }
}

/// Watches one exclusive job until its second attempt runs: its first one must be dead before that is even placed.
async fn dead_before_placed_again(world: &World, timeline: &Timeline, name: &str, job: &Watched) {
    let mut dead = None;
    let again = eventually(&format!("{name}: it is placed again"), LOST, async || {
        if dead.is_none() && job.is_dead() {
            dead = Some(timeline.now(&format!("{name}: no process of its attempt 1 is left")));
            let attempts = world.attempts(job).await;
            assert_eq!(attempts.len(), 1, "{name}: it was placed again before it was seen dead: {attempts:?}");
        }
        let attempts = world.attempts(job).await;
        assert!(attempts.len() == 1 || dead.is_some(), "{name}: placed again while its first attempt lives");
        attempts.into_iter().nth(1).filter(|again| again.started_ms.is_some())
    })
    .await;
    let (placed, started) = (timeline.boot_of(again.placed_ms), timeline.boot_of(again.started_ms.expect("it runs")));
    timeline.say(placed, &format!("{name}: attempt 2 is placed on {}", again.node_name));
    timeline.say(started, &format!("{name}: attempt 2 runs"));
    let dead = dead.expect("it was seen above");
    assert!(dead < placed, "{name}: dead at {dead}, placed at {placed}");
    assert_eq!(again.node_name, "spare");
    assert!(!processes(&job.mark, 2).is_empty(), "{name}: it is attempt 2 that runs");
    assert!(job.is_dead());
}

#[tokio::test]
async fn an_exclusive_job_is_dead_before_it_is_placed_again_however_its_host_was_cut_off() {
    let Some(mut world) = World::start().await else { skip!(NO_NETWORK) };
    let mut jobs = Vec::new();
    for name in ["killed", "stopped", "mute"] {
        // Each job takes its node whole, so the next one goes to the next node.
        world.add_node(name, "4").await;
        jobs.push(world.submit(Delivery::Exclusive, 4_000, "exec sleep 600").await);
    }
    world.add_node("spare", "12").await;

    let timeline = Timeline::begin();
    world.fleet.node("killed").agent.as_mut().expect("an agent").kill9();
    world.network.cut(0, Cut::Both);
    timeline.now("killed: its agent is killed and its wire is cut");
    world.fleet.node("stopped").agent.as_ref().expect("an agent").stop();
    timeline.now("stopped: its agent is stopped");
    world.network.cut(2, Cut::ToCoordinator);
    timeline.now("mute: what it sends is lost, what it is sent arrives");
    tokio::join!(
        dead_before_placed_again(&world, &timeline, "killed", &jobs[0]),
        dead_before_placed_again(&world, &timeline, "stopped", &jobs[1]),
        dead_before_placed_again(&world, &timeline, "mute", &jobs[2]),
    );

    // They come back, and the second attempts are nobody's to end.
    world.network.cut(0, Cut::Mended);
    world.network.cut(2, Cut::Mended);
    world.fleet.node("stopped").agent.as_ref().expect("an agent").signal(Signal::SIGCONT);
    world.fleet.start_agent("killed");
    for name in ["killed", "stopped", "mute"] {
        world.fleet.client.node_in(name, "ready").await;
    }
    timeline.now("all are back");
    for job in &jobs {
        let attempts = world.attempts(job).await;
        assert_eq!(attempts.len(), 2, "{attempts:?}");
        assert_eq!((lost(&attempts[0]), attempts[1].end.is_none()), (Some(Cause::Silent), true), "{attempts:?}");
        assert!(!processes(&job.mark, 2).is_empty() && job.is_dead());
    }
}

/// Why the coordinator presumes that an attempt is over, if it does.
fn lost(attempt: &v1::Attempt) -> Option<Cause> {
    match attempt.end.clone()?.reason? {
        Reason::NodeLost(loss) if attempt.presumed => Some(loss.cause()),
        _ => None,
    }
}

#[tokio::test]
async fn what_a_deaf_host_runs_fares_as_its_delivery_says() {
    let Some(mut world) = World::start().await else { skip!(NO_NETWORK) };
    world.add_node("deaf", "4").await;
    let repeatable = world.submit(Delivery::AtLeastOnce, 1_000, "exit 7").await;
    let once = world.submit(Delivery::AtMostOnce, 1_000, "exit 7").await;
    let exclusive = world.submit(Delivery::Exclusive, 1_000, "exec sleep 600").await;
    world.add_node("spare", "4").await;

    let timeline = Timeline::begin();
    world.network.cut(0, Cut::FromCoordinator);
    timeline.now("deaf: what it is sent is lost, what it sends arrives");
    dead_before_placed_again(&world, &timeline, "exclusive", &exclusive).await;
    let done = world.fleet.client.finished(repeatable.job, WAIT).await;
    assert_eq!((done.tasks[0].attempts.len(), done.end(0)), (2, Reason::Exited(7)));
    assert!(!repeatable.is_dead(), "nobody could tell it to end, and it may run twice");
    let over = world.fleet.client.finished(once.job, WAIT).await;
    assert_eq!((over.tasks[0].attempts.len(), lost(&over.last_attempt(0))), (1, Some(Cause::Silent)));

    world.network.cut(0, Cut::Mended);
    world.fleet.client.node_in("deaf", "ready").await;
    timeline.now("deaf: it is back");
    eventually("what nobody waits for any more is ended", WAIT, async || {
        (repeatable.is_dead() && once.is_dead()).then_some(())
    })
    .await;
    for (job, known) in [(&repeatable, &done), (&once, &over)] {
        let now = world.fleet.client.tasks(job.job).await;
        assert_eq!(now, known.tasks, "a result that comes late changes nothing");
    }
}

#[tokio::test]
async fn a_short_partition_is_not_seen_and_one_beyond_the_lease_costs_what_is_exclusive_alone() {
    let Some(mut world) = World::start().await else { skip!(NO_NETWORK) };
    world.add_node("n1", "4").await;
    let repeatable = world.submit(Delivery::AtLeastOnce, 1_000, "exit 7").await;
    let exclusive = world.submit(Delivery::Exclusive, 1_000, "exec sleep 600").await;
    let timeline = Timeline::begin();
    world.network.cut(0, Cut::Both);
    until(Instant::now() + Duration::from_secs(5)).await;
    let before = world.fleet.client.node("n1").await.expect("it is known").metrics_ms;
    world.network.cut(0, Cut::Mended);
    timeline.now("cut for 5 s");
    let heard = eventually("it is heard again", WAIT, async || {
        world.fleet.client.node("n1").await.filter(|node| node.metrics_ms > before)
    })
    .await;
    assert_eq!(heard.state, "ready");
    assert!(!repeatable.is_dead() && !exclusive.is_dead());
    assert_eq!((world.attempts(&repeatable).await.len(), world.attempts(&exclusive).await.len()), (1, 1));

    world.network.cut(0, Cut::Both);
    timeline.now("cut again");
    eventually("the host ends what is exclusive by itself", WAIT, async || exclusive.is_dead().then_some(())).await;
    timeline.now("its exclusive job is dead");
    eventually("the coordinator misses it", WAIT, async || {
        let node = world.fleet.client.node("n1").await?;
        (node.liveness == "silent").then_some(())
    })
    .await;
    timeline.now("the coordinator calls it silent");
    world.network.cut(0, Cut::Mended);
    world.fleet.client.running(exclusive.job, 1).await;
    eventually("the exclusive job runs again", WAIT, async || {
        Some(world.attempts(&exclusive).await).filter(|all| all.len() == 2 && all[1].started_ms.is_some())
    })
    .await;
    timeline.now("mended, and its exclusive job runs again");
    assert_eq!(world.attempts(&repeatable).await.len(), 1);
    assert!(!repeatable.is_dead(), "it ran all the time");
}
