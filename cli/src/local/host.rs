//! One local node: a spawner and its agent, from the coordinator's request to
//! the last file. Each that dies is started again; jobs outlive the agent, and
//! the agent outlives the spawner.
//!
//! ```text
//! started -> running <-> one of both is started again
//!            running --agent exits 86, or delete--> agent ended -> spawner ended -> removed
//!            running --the parent ends--> both clean up by themselves
//! ```

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use muster_coordinator::provider::local_lines::Create;
use tokio::{process::Child, sync::watch, time::sleep};

use super::{
    children::{self, Backoff},
    folder,
    pipes::Pipes,
};
use crate::output::now_ms;

/// The agent was released after a drain and must not be started again.
const RELEASED: i32 = 86;
/// A spawner listens by then, or it failed.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// Between two looks at its socket.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// An agent leaves within this after SIGTERM.
const AGENT_LEAVES: Duration = Duration::from_secs(10);
/// A spawner ends its jobs within this after SIGTERM: their grace, and the kill.
const SPAWNER_LEAVES: Duration = Duration::from_secs(30);
/// As root, each node's jobs have this many uids.
const UIDS_OF_A_NODE: u32 = 1_000;
/// Nodes at a time that uids are kept for.
const NODES_OF_A_RUN: u32 = 64;
/// The first uid that is given to jobs, above those of people and services.
const FIRST_UID: u32 = 200_000;
/// Runs at a time that uids are kept apart for.
const RUNS: u32 = 1_000;

/// What all nodes of a run share.
#[derive(Debug)]
pub struct HostContext {
    /// The run's folder.
    pub folder: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
    /// Names this run among all on the machine.
    pub run: String,
    /// What children inherit.
    pub pipes: Mutex<Pipes>,
    /// Becomes true when the parent ends everything.
    pub ending: watch::Receiver<bool>,
    /// Slots of uids that are in use.
    pub slots: Mutex<BTreeSet<u32>>,
    /// How nodes ended.
    pub exits: Mutex<Vec<Exits>>,
}

/// When the processes of a node ended, by this machine's clock.
#[derive(Clone, Debug)]
pub struct Exits {
    /// The node's name.
    pub name: String,
    /// The agent left by itself: it was released, or told to go because its host is deleted.
    pub released: bool,
    /// Its agent's end, in milliseconds since the Unix epoch.
    pub agent_ms: u64,
}

impl HostContext {
    /// A line in the parent's own log.
    pub fn note(&self, text: &str) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.logs.join("parent.log"));
        // A log that cannot be written is no reason to stop.
        drop(log.and_then(|mut log| writeln!(log, "{} {text}", crate::output::rfc3339(now_ms()))));
    }

    /// Starts a child with this run's pipes.
    pub fn start(&self, program: &str, args: &[OsString], env: &[(&str, &str)], log: &str) -> io::Result<Child> {
        let pipes = self.pipes.lock().expect("nobody panics with this lock");
        let fds = pipes.for_child().ok_or_else(|| io::Error::other("this run is ending"))?;
        let mut args = args.to_vec();
        args.extend([OsString::from("--parent-fd"), fds.parent.to_string().into()]);
        children::start(program, &args, env, &self.logs.join(log), fds)
    }

    fn take_slot(&self) -> Option<u32> {
        let mut slots = self.slots.lock().expect("nobody panics with this lock");
        let free = (0..NODES_OF_A_RUN).find(|slot| !slots.contains(slot))?;
        slots.insert(free);
        Some(free)
    }

    fn give_slot_back(&self, slot: u32) {
        self.slots.lock().expect("nobody panics with this lock").remove(&slot);
    }
}

/// First and last uid of a slot; runs are kept apart by the parent's pid.
fn uids(slot: u32) -> (u32, u32) {
    let run = std::process::id() % RUNS;
    let first = FIRST_UID + (run * NODES_OF_A_RUN + slot) * UIDS_OF_A_NODE;
    (first, first + UIDS_OF_A_NODE - 1)
}

/// The paths and command lines of one node.
struct Plan {
    spawner_folder: PathBuf,
    agent_folder: PathBuf,
    socket: PathBuf,
    spawner_args: Vec<OsString>,
    agent_args: Vec<OsString>,
    token: String,
    spawner_log: String,
    agent_log: String,
}

impl Plan {
    fn new(context: &HostContext, new: &Create, slot: u32) -> Self {
        let host = new.host;
        let spawner_folder = context.folder.join(format!("s{host}"));
        let agent_folder = context.folder.join(format!("a{host}"));
        let socket = spawner_folder.join("sock");
        let node_id = format!("{}-{host}", context.run);
        let mut spawner_args = words(&["--socket"], &socket);
        spawner_args.extend(words(&["--state"], &spawner_folder));
        spawner_args.extend(["--node-id", &node_id, "--ephemeral"].map(OsString::from));
        if nix::unistd::geteuid().is_root() {
            let (first, last) = uids(slot);
            spawner_args.extend([OsString::from("--uids"), format!("{first}-{last}").into()]);
        }
        let mut agent_args = words(&["run", "--state"], &agent_folder);
        agent_args.extend(words(&["--spawner"], &socket));
        let (cpu, memory, disk) =
            (format!("{}m", new.cpu_milli), new.memory_bytes.to_string(), new.disk_bytes.to_string());
        agent_args.extend(
            [
                "--coordinator",
                &new.coordinator,
                "--name",
                &new.name,
                "--cpu",
                &cpu,
                "--memory",
                &memory,
                "--disk",
                &disk,
            ]
            .map(OsString::from),
        );
        for (key, value) in &new.labels {
            agent_args.extend([OsString::from("--label"), format!("{key}={value}").into()]);
        }
        agent_args.extend(["--slice", "--ephemeral"].map(OsString::from));
        Self {
            spawner_folder,
            agent_folder,
            socket,
            spawner_args,
            agent_args,
            token: new.token.clone(),
            spawner_log: format!("spawner-{host}.log"),
            agent_log: format!("agent-{host}.log"),
        }
    }

    fn start_spawner(&self, context: &HostContext) -> io::Result<Child> {
        // What a killed one left would be in the way of its successor.
        drop(fs::remove_file(&self.socket));
        context.start("muster-spawner", &self.spawner_args, &[], &self.spawner_log)
    }

    fn start_agent(&self, context: &HostContext) -> io::Result<Child> {
        context.start("muster-agent", &self.agent_args, &[("MUSTER_TOKEN", &self.token)], &self.agent_log)
    }
}

fn words(flags: &[&str], path: &Path) -> Vec<OsString> {
    flags.iter().map(OsString::from).chain([path.as_os_str().to_owned()]).collect()
}

/// The whole life of a node; the error is why it could not be made.
pub async fn live(
    context: &HostContext,
    new: Create,
    mut stopped: watch::Receiver<bool>,
    created: impl Fn(),
) -> Result<(), String> {
    let slot = context.take_slot().ok_or_else(|| format!("this machine already runs {NODES_OF_A_RUN} nodes"))?;
    let plan = Plan::new(context, &new, slot);
    let lived = make_and_run(context, &new, &plan, &mut stopped, &created).await;
    for folder in [&plan.agent_folder, &plan.spawner_folder] {
        if let Err(error) = folder::remove_tree(folder) {
            context.note(&format!("{}: cannot remove {}: {error}", new.name, folder.display()));
        }
    }
    context.give_slot_back(slot);
    lived
}

async fn make_and_run(
    context: &HostContext,
    new: &Create,
    plan: &Plan,
    stopped: &mut watch::Receiver<bool>,
    created: &impl Fn(),
) -> Result<(), String> {
    let sentence = |error: io::Error| format!("cannot start its processes: {error}");
    children::make_folder(&plan.spawner_folder, 0o711).map_err(sentence)?;
    children::make_folder(&plan.agent_folder, 0o700).map_err(sentence)?;
    let mut spawner = plan.start_spawner(context).map_err(sentence)?;
    if let Err(reason) = wait_until_it_listens(&mut spawner, plan, context).await {
        // What it has made so far it takes away itself.
        children::terminate(&spawner);
        drop(children::end_within(&mut spawner, SPAWNER_LEAVES).await);
        return Err(reason);
    }
    let agent = match plan.start_agent(context) {
        Ok(agent) => agent,
        Err(error) => {
            children::terminate(&spawner);
            drop(children::end_within(&mut spawner, SPAWNER_LEAVES).await);
            return Err(sentence(error));
        }
    };
    created();
    run(context, new, plan, stopped, spawner, agent).await
}

async fn wait_until_it_listens(spawner: &mut Child, plan: &Plan, context: &HostContext) -> Result<(), String> {
    let listens = async {
        while !plan.socket.exists() {
            sleep(LOOK_AGAIN).await;
        }
    };
    let tail = || children::tail(&context.logs.join(&plan.spawner_log));
    tokio::select! {
        () = listens => Ok(()),
        ended = spawner.wait() => Err(format!("its spawner ended ({}): {}", children::words(&ended), tail())),
        () = sleep(LISTENS_WITHIN) => Err(format!("its spawner does not listen: {}", tail())),
    }
}

/// Keeps both running until the node is released, deleted or the run ends.
async fn run(
    context: &HostContext,
    new: &Create,
    plan: &Plan,
    stopped: &mut watch::Receiver<bool>,
    mut spawner: Child,
    mut agent: Child,
) -> Result<(), String> {
    let mut ending = context.ending.clone();
    let (mut of_agent, mut of_spawner) = (Backoff::new(), Backoff::new());
    let mut failure = None;
    let mut released = false;
    loop {
        tokio::select! {
            biased;
            () = until(&mut ending) => {
                // Both see the pipe's end and clean up; here only their end is awaited.
                drop(children::end_within(&mut agent, AGENT_LEAVES).await);
                drop(children::end_within(&mut spawner, SPAWNER_LEAVES).await);
                return Ok(());
            }
            () = until(stopped) => {
                // The agent of a drained host waits for this: it is closed, and nothing is left there.
                children::terminate(&agent);
                let left = tokio::time::timeout(AGENT_LEAVES, agent.wait()).await;
                released = matches!(&left, Ok(Ok(status)) if status.success() || status.code() == Some(RELEASED));
                break;
            }
            ended = agent.wait() => {
                if matches!(&ended, Ok(status) if status.code() == Some(RELEASED)) {
                    released = true;
                    break;
                }
                let words = children::words(&ended);
                context.note(&format!("{}: the agent ended ({words}); it is started again", new.name));
                match again(&mut of_agent, || plan.start_agent(context)).await {
                    Ok(started) => agent = started,
                    Err(why) => {
                        let tail = children::tail(&context.logs.join(&plan.agent_log));
                        failure = Some(format!("its agent ends again and again ({words}; {why}): {tail}"));
                        break;
                    }
                }
            }
            ended = spawner.wait() => {
                let words = children::words(&ended);
                context.note(&format!("{}: the spawner ended ({words}); it is started again", new.name));
                match again(&mut of_spawner, || plan.start_spawner(context)).await {
                    Ok(started) => spawner = started,
                    Err(why) => {
                        let tail = children::tail(&context.logs.join(&plan.spawner_log));
                        failure = Some(format!("its spawner ends again and again ({words}; {why}): {tail}"));
                        break;
                    }
                }
            }
        }
    }
    children::terminate(&agent);
    drop(children::end_within(&mut agent, AGENT_LEAVES).await);
    let agent_ms = now_ms();
    children::terminate(&spawner);
    drop(children::end_within(&mut spawner, SPAWNER_LEAVES).await);
    let exits = Exits { name: new.name.clone(), released, agent_ms };
    context.exits.lock().expect("nobody panics with this lock").push(exits);
    failure.map_or(Ok(()), Err)
}

/// Returns when the flag is set, or will never be.
async fn until(flag: &mut watch::Receiver<bool>) {
    drop(flag.wait_for(|set| *set).await);
}

/// Starts a child again after its wait; the error is why it is given up.
async fn again(backoff: &mut Backoff, start: impl Fn() -> io::Result<Child>) -> Result<Child, String> {
    loop {
        let wait = backoff.after_failure().ok_or("given up")?;
        sleep(wait).await;
        match start() {
            Ok(child) => {
                backoff.started();
                return Ok(child);
            }
            Err(error) if backoff.after_failure().is_none() => return Err(error.to_string()),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_of_nodes_do_not_overlap_and_stay_clear_of_others() {
        let (first, last) = uids(0);
        assert!(first >= FIRST_UID && last < uids(1).0);
        const { assert!(FIRST_UID + RUNS * NODES_OF_A_RUN * UIDS_OF_A_NODE < 0x7fff_ffff) }
    }
}
