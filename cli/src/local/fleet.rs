//! A run: its folder, its coordinator, its provider and its end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use muster_core::policy::PoolPolicy;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::{process::Child, sync::watch, time::sleep};

pub use super::host::Exits;
use super::{
    children::{self, make_folder},
    coordinator::{Coordinator, Plan},
    folder,
    host::HostContext,
    pipes::{self, Pipes},
    policy,
    provider::Hosts,
};
use crate::{
    client::{Client, Server, TlsFiles},
    exit::{Exit, Failure, Result},
};

/// Requests of the parent itself.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// All children end within this, or the janitor goes on without them.
const ENDS_WITHIN: Duration = Duration::from_secs(45);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a run is made from.
#[derive(Debug)]
pub struct Settings {
    /// Where the coordinator's data stays; none: it goes with the run.
    pub data: Option<PathBuf>,
    /// Where logs stay; none: they go with the run.
    pub logs: Option<PathBuf>,
    /// TCP address.
    pub listen: String,
    /// TCP address for health and metrics.
    pub http: Option<String>,
    /// The pools.
    pub policies: Vec<PoolPolicy>,
}

/// A running fleet on this machine.
#[derive(Debug)]
pub struct LocalFleet {
    context: Arc<HostContext>,
    coordinator: Coordinator,
    hosts: Hosts,
    janitor: Child,
    say_ending: watch::Sender<bool>,
    /// Operators' socket.
    pub socket: PathBuf,
    policy_files: Vec<(PathBuf, PoolPolicy)>,
}

impl LocalFleet {
    /// Makes the folder, the janitor, the provider and the coordinator.
    pub async fn start(settings: Settings) -> Result<Self> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| Failure::new(Exit::Failed, format!("cannot {what}: {error}")).caused_by(error)
        };
        let run = folder::create().map_err(failed("make a folder for this run"))?;
        let pipes = Pipes::new().map_err(failed("make a pipe"))?;
        // First of all: from here on nothing is left, whatever happens to this process.
        let janitor = start_janitor(&run, &pipes).map_err(|error| {
            drop(folder::remove(&run));
            failed("start the janitor")(error)
        })?;
        let logs = settings.logs.clone().unwrap_or_else(|| run.join("log"));
        make_folder(&logs, 0o700).map_err(failed("make the folder for logs"))?;
        let (say_ending, ending) = watch::channel(false);
        let context = Arc::new(HostContext {
            run: run.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            folder: run.clone(),
            logs,
            pipes: Mutex::new(pipes),
            ending,
            slots: Mutex::default(),
            exits: Mutex::default(),
        });
        let hosts = Hosts::new(Arc::clone(&context));
        let provider = run.join("provider.sock");
        hosts.serve(&provider).map_err(failed("serve the provider's socket"))?;
        let policy_files = write_policies(&run, settings.policies).map_err(failed("write the policies"))?;
        let data = match &settings.data {
            Some(data) => fs::create_dir_all(data).map(|()| data.clone()),
            None => make_folder(&run.join("coordinator"), 0o700).map(|()| run.join("coordinator")),
        }
        .map_err(failed("make the coordinator's folder"))?;
        let socket = run.join(folder::OPERATOR_SOCKET);
        let plan = Plan {
            data,
            ephemeral: settings.data.is_none(),
            listen: settings.listen,
            http: settings.http,
            socket: socket.clone(),
            port_file: run.join("port"),
            provider,
            policies: policy_files.iter().map(|(path, _)| path.clone()).collect(),
        };
        match Coordinator::start(Arc::clone(&context), plan).await {
            Ok(coordinator) => Ok(Self { context, coordinator, hosts, janitor, say_ending, socket, policy_files }),
            Err(why) => {
                end_children(&context, &say_ending, &hosts, janitor).await;
                Err(Failure::new(Exit::Failed, why))
            }
        }
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        &self.context.folder
    }

    /// Where agents and operators reach the coordinator.
    pub fn address(&self) -> &str {
        &self.coordinator.address
    }

    /// A connection to the coordinator.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(Server::Unix(self.socket.clone()), &TlsFiles::default(), REQUEST_TIMEOUT).await
    }

    /// The pools, as they were at the start.
    pub fn policies(&self) -> impl Iterator<Item = &PoolPolicy> {
        self.policy_files.iter().map(|(_, policy)| policy)
    }

    /// A policy for a coordinator that is started again.
    pub fn keep_policy(&self, policy: &PoolPolicy) {
        if let Some((path, _)) = self.policy_files.iter().find(|(_, known)| known.name == policy.name)
            && let Err(error) = fs::write(path, policy::to_toml(policy))
        {
            self.context.note(&format!("cannot write {}: {error}", path.display()));
        }
    }

    /// Ready when the coordinator was given up, with why.
    pub async fn given_up(&self) -> String {
        let mut given_up = self.coordinator.given_up.clone();
        match given_up.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_closed) => String::from("the coordinator is gone"),
        }
    }

    /// No process of a node is left.
    pub fn has_no_host(&self) -> bool {
        self.hosts.is_empty()
    }

    /// How nodes ended so far.
    pub fn exits(&self) -> Vec<Exits> {
        self.context.exits.lock().expect("nobody panics with this lock").clone()
    }

    /// The end of the parts' logs, for a person who asks why.
    pub fn log_tails(&self) -> Vec<String> {
        let mut logs: Vec<_> = fs::read_dir(&self.context.logs).into_iter().flatten().flatten().collect();
        logs.sort_by_key(fs::DirEntry::file_name);
        logs.iter()
            .map(|log| format!("{}: {}", log.file_name().to_string_lossy(), children::tail(&log.path())))
            .filter(|line| !line.ends_with(": "))
            .collect()
    }

    /// Ends everything that is left: children see the pipe's end and clean up.
    pub async fn end(self) {
        if self.hosts.is_empty() {
            // Nothing is left to hurry for: the coordinator closes its store in peace.
            self.coordinator.end().await;
        }
        end_children(&self.context, &self.say_ending, &self.hosts, self.janitor).await;
    }
}

fn start_janitor(run: &Path, pipes: &Pipes) -> io::Result<Child> {
    let fds = pipes.for_janitor();
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.arg0("muster").arg("janitor").arg("--folder").arg(run);
    command.args(["--parent-fd", &fds.parent.to_string(), "--children-fd", &fds.children.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec only setsid(2) and fcntl(2) are called,
    // both async-signal-safe; nothing allocates.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            pipes::keep_over_exec(fds.parent)?;
            pipes::keep_over_exec(fds.children)
        });
    }
    command.spawn()
}

fn write_policies(run: &Path, policies: Vec<PoolPolicy>) -> io::Result<Vec<(PathBuf, PoolPolicy)>> {
    policies
        .into_iter()
        .enumerate()
        .map(|(at, policy)| {
            let path = run.join(format!("policy-{at}.toml"));
            fs::write(&path, policy::to_toml(&policy))?;
            Ok((path, policy))
        })
        .collect()
}

async fn end_children(context: &HostContext, say_ending: &watch::Sender<bool>, hosts: &Hosts, mut janitor: Child) {
    // What children leave unreaped at their end comes to us, not to an init that may be slow to look.
    let _only_tidier = nix::sys::prctl::set_child_subreaper(true);
    let _nobody_left = say_ending.send(true);
    context.pipes.lock().expect("nobody panics with this lock").tell_end();
    let ended = async {
        while !hosts.is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    };
    if tokio::time::timeout(ENDS_WITHIN, ended).await.is_err() {
        context.note("not all processes ended in time");
    }
    // The janitor goes last; what it could not remove is removed here, or told.
    drop(children::end_within(&mut janitor, ENDS_WITHIN).await);
    if context.folder.exists()
        && let Err(error) = folder::remove(&context.folder)
    {
        eprintln!("muster: {} could not be removed: {error}", context.folder.display());
    }
    while let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {}
}
