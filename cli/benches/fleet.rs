//! The whole system on this machine, from the command line to the exit code, beside xargs in the same run:
//! `cargo bench -p muster --bench fleet [-- TASKS RUNS]`, which also builds the executable that it measures.
//!
//! `muster up --nodes 1` is started, given an array of `/bin/true` in profiles `none` and `strict`, then single jobs
//! from the shell, apart and in a row. CPU is what each process says of itself in /proc. Nothing fails because of a time.
//! Where a Python has the package `hyperqueue` (`PYTHON=...` names it), its local cluster runs the same tasks too.
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::{Child, Command, ExitCode, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

const MUSTER: &str = env!("CARGO_BIN_EXE_muster");
/// A fleet that takes longer to come or to go is broken.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const TICK: Duration = Duration::from_millis(20);
/// Between two single jobs "apart": the machine has come to rest.
const APART: Duration = Duration::from_millis(50);
/// A host without cgroup controllers can run them too; one that has them sets limits all the same.
const WITHOUT: [&str; 2] = ["--without", "limits"];
/// What `xargs -P` runs at once: a one-core job for each core of the node.
fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// `muster up` in a folder of its own; it drains and ends with this.
struct Fleet {
    up: Child,
    server: String,
    _folder: TempDir,
}

impl Fleet {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("muster-fleet-").tempdir().unwrap();
        let said = folder.path().join("said");
        let mut command = Command::new(MUSTER);
        command.args(["up", "--nodes", "1", "--data"]).arg(folder.path().join("data")).stdin(Stdio::null());
        let log = File::create(folder.path().join("log")).unwrap();
        let up = command.stdout(File::create(&said).unwrap()).stderr(log).spawn().unwrap();
        let mut fleet = Self { up, server: String::new(), _folder: folder };
        fleet.server = until("`muster up` says where it listens", || server_of(&said));
        until("its node is ready", || fleet.muster(&["node", "list"], &[]).filter(|list| list.contains("ready")));
        fleet
    }

    /// The standard output of one command that succeeds.
    fn muster(&self, arguments: &[&str], command: &[&str]) -> Option<String> {
        let done = self.ask(arguments, command);
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
    }

    fn ask(&self, arguments: &[&str], command: &[&str]) -> Output {
        let mut muster = Command::new(MUSTER);
        muster.args(arguments).env("MUSTER_SERVER", &self.server).stdin(Stdio::null());
        if !command.is_empty() {
            muster.arg("--").args(command);
        }
        muster.output().unwrap()
    }

    /// One job from the shell, from before its start to after its exit code.
    fn run_one(&self) -> Duration {
        let begun = Instant::now();
        let done = self.ask(&["run", WITHOUT[0], WITHOUT[1]], &["/bin/true"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        begun.elapsed()
    }

    /// All its processes by their part, found as children of children of `up`; the spawner's children, which are
    /// inits, count as its children's time.
    fn processes(&self) -> BTreeMap<String, Process> {
        let all: Vec<Process> =
            fs::read_dir("/proc").unwrap().flatten().filter_map(|e| Process::read(&e.path())).collect();
        let mut ours = vec![self.up.id()];
        let mut found: BTreeMap<String, Process> = BTreeMap::new();
        while let Some(parent) = ours.pop() {
            for process in all.iter().filter(|process| process.parent == parent || process.pid == self.up.id()) {
                match found.get_mut(&process.part) {
                    None => {
                        found.insert(process.part.clone(), process.clone());
                        ours.push(process.pid);
                    }
                    Some(spawner) if process.parent == spawner.pid => {
                        spawner.children_ticks += process.own_ticks + process.children_ticks;
                    }
                    Some(_) => {}
                }
            }
        }
        found
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.up.id()).unwrap());
        // Our own child that is not yet reaped: the number is still its own.
        let _gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.up.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _gone = self.up.kill();
            }
            thread::sleep(TICK);
        }
    }
}

/// What /proc says of one process.
#[derive(Clone)]
struct Process {
    pid: u32,
    parent: u32,
    part: String,
    /// Its own CPU time, in clock ticks.
    own_ticks: u64,
    /// That of all its children that have ended: the spawner's are jobs and their inits.
    children_ticks: u64,
    resident_kib: u64,
}

impl Process {
    fn read(folder: &Path) -> Option<Self> {
        let pid = folder.file_name()?.to_str()?.parse().ok()?;
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        let command = fs::read(folder.join("cmdline")).ok()?;
        let words: Vec<String> =
            command.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let name = Path::new(words.first()?).file_name()?.to_str()?;
        let part = match name.strip_prefix("muster-") {
            Some(part) => part.to_owned(),
            None if name == "muster" => words.get(1)?.clone(),
            None => return None,
        };
        let status = fs::read_to_string(folder.join("status")).ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            part,
            own_ticks: number(11)? + number(12)?,
            children_ticks: number(13)? + number(14)?,
            resident_kib: resident.split_whitespace().next()?.parse().ok()?,
        })
    }
}

fn server_of(said: &Path) -> Option<String> {
    let text = fs::read_to_string(said).ok()?;
    text.lines().find_map(|line| line.strip_prefix("MUSTER_SERVER=")).map(str::to_owned)
}

fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(TICK);
    }
}

fn main() -> ExitCode {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<u32>().ok());
    let (tasks, runs) = (numbers.next().unwrap_or(10_000).max(1), numbers.next().unwrap_or(100).max(1));
    let fleet = Fleet::start();
    println!("{} cores; jobs do without limits where this machine has none ({})", cores(), WITHOUT.join(" "));
    match local_cluster(tasks) {
        Some(rate) => println!("HyperQueue's local cluster in Python, {tasks} /bin/true: {rate:.0} tasks/s"),
        None => println!("HyperQueue: no Python here has its package (pip install hyperqueue, PYTHON=...)"),
    }
    for profile in ["none", "strict"] {
        array(&fleet, profile, tasks);
    }
    for (what, pause) in [("apart", APART), ("in a row", Duration::ZERO)] {
        let mut taken: Vec<f64> = Vec::new();
        for _ in 0..runs {
            thread::sleep(pause);
            taken.push(fleet.run_one().as_secs_f64() * 1_000.0);
        }
        taken.sort_by(f64::total_cmp);
        let at = |share: usize| taken[taken.len() * share / 100];
        println!("muster run, {runs} {what}: median {:.1} ms, p90 {:.1} ms, min {:.1} ms", at(50), at(90), at(0));
    }
    let resident = |(part, process): (String, Process)| format!("{part} {:.1}", process.resident_kib as f64 / 1_024.0);
    let resident: Vec<String> = fleet.processes().into_iter().map(resident).collect();
    println!("resident after that, MiB: {}", resident.join(", "));
    ExitCode::SUCCESS
}

/// One array, and xargs right before it.
fn array(fleet: &Fleet, profile: &str, tasks: u32) {
    let xargs = xargs(tasks);
    let before = fleet.processes();
    let begun = Instant::now();
    let range = format!("0-{}", tasks - 1);
    let arguments = ["job", "submit", "--array", &range, "--profile", profile, WITHOUT[0], WITHOUT[1], "--wait"];
    let done = fleet.ask(&arguments, &["/bin/true"]);
    let own = f64::from(tasks) / begun.elapsed().as_secs_f64();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let beside = xargs.map_or_else(
        || "xargs is not on this machine".to_owned(),
        |xargs| format!("{:.2} x xargs -P{} ({xargs:.0}/s)", own / xargs, cores()),
    );
    println!("array of {tasks} /bin/true, profile {profile}: {own:.0} tasks/s = {beside}");
    let mut spent = Vec::new();
    for (part, after) in fleet.processes() {
        let (own, children) = before.get(&part).map_or((0, 0), |before| (before.own_ticks, before.children_ticks));
        spent.push(format!("{part} {:.0}", us_per_task(after.own_ticks - own, tasks)));
        if part == "spawner" {
            spent.push(format!("jobs with their inits {:.0}", us_per_task(after.children_ticks - children, tasks)));
        }
    }
    println!("  CPU of a task, us: {}", spent.join(", "));
}

fn us_per_task(ticks: u64, tasks: u32) -> f64 {
    let ticks_per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap().unwrap();
    ticks as f64 * 1_000_000.0 / ticks_per_second as f64 / f64::from(tasks)
}

/// Tasks a second of HyperQueue, unsandboxed and without a journal.
fn local_cluster(tasks: u32) -> Option<f64> {
    let python = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/local_cluster.py");
    let arguments = [tasks.to_string(), cores().to_string()];
    let done = Command::new(python).arg(script).args(arguments).stdin(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&done.stdout).lines().last()?.parse().ok()
}

/// Tasks a second of `seq TASKS | xargs -P CORES -n1 /bin/true`.
fn xargs(tasks: u32) -> Option<f64> {
    let mut numbers = Command::new("seq").arg(tasks.to_string()).stdout(Stdio::piped()).spawn().ok()?;
    let mut command = Command::new("xargs");
    command.args([&format!("-P{}", cores()), "-n1", "/bin/true"]).stdin(numbers.stdout.take()?);
    let begun = Instant::now();
    let done = command.status();
    let took = begun.elapsed();
    numbers.wait().ok()?;
    done.ok()?.success().then(|| f64::from(tasks) / took.as_secs_f64())
}
