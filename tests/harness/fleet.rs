//! A real fleet in a temporary folder: one coordinator, and a spawner and an
//! agent for each node, as an operator would start them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use muster_core::fence;
use muster_proto::v1;
use tempfile::TempDir;

use crate::{
    Client, WAIT,
    client::bytes,
    eventually, host,
    network::{self, Network},
    part::{Part, Surroundings},
};

/// Each node as root gets this many uids for its jobs; nodes of tests at the same time must not share any.
const UIDS_PER_NODE: u32 = 512;

/// What a node declares.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// As `--cpu`.
    pub cpu: &'static str,
    /// As `--memory`.
    pub memory: &'static str,
    /// The token's pool; empty: the default one.
    pub pool: &'static str,
    /// Only a slice of this machine: usage is that of its attempts.
    pub slice: bool,
    /// Its `spawner.toml`; empty: none.
    pub policy: &'static str,
    /// Its network namespace; none: this machine's.
    pub network: Option<PathBuf>,
    /// More flags of its agent.
    pub agent_flags: Vec<OsString>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { cpu: "4", memory: "8G", pool: "", slice: true, policy: "", network: None, agent_flags: Vec::new() }
    }
}

/// One node's processes.
#[derive(Debug)]
pub struct NodeParts {
    /// Its name.
    pub name: String,
    // In the order of a stop: the spawner goes while the agent can still report.
    /// The keeper of its jobs.
    pub spawner: Option<Part>,
    /// Its connection.
    pub agent: Option<Part>,
    agent_arguments: Vec<OsString>,
    spawner_arguments: Vec<OsString>,
    network: Option<PathBuf>,
}

/// A coordinator and its nodes. Everything ends and is removed with it.
#[derive(Debug)]
pub struct Fleet {
    // Fields are dropped in this order: nodes clean up before their coordinator and their folder go.
    nodes: BTreeMap<String, NodeParts>,
    /// The coordinator's process, while it runs.
    pub coordinator: Option<Part>,
    /// Its address, the same over restarts.
    pub address: String,
    /// The operator.
    pub client: Client,
    /// Added to the environment of a coordinator or an agent that is started from now on.
    pub environment: Vec<(OsString, OsString)>,
    fences: BTreeSet<String>,
    network: Option<PathBuf>,
    folder: TempDir,
}

impl Fleet {
    /// Starts a coordinator without any node.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0", None).await
    }

    /// Starts a coordinator in a network of the test's own, without any node.
    pub async fn start_in(network: &Network) -> Self {
        Self::start_at(&format!("{}:0", network::COORDINATOR), Some(network.coordinator())).await
    }

    async fn start_at(address: &str, network: Option<PathBuf>) -> Self {
        let folder = tempfile::Builder::new().prefix("muster-e2e-").tempdir().expect("a temporary folder");
        let client = Client::new(&folder.path().join("coordinator/operator.sock"));
        let mut fleet = Self {
            nodes: BTreeMap::new(),
            coordinator: None,
            address: address.to_owned(),
            client,
            environment: Vec::new(),
            fences: BTreeSet::new(),
            network,
            folder,
        };
        fleet.start_coordinator().await;
        fleet
    }

    /// A fleet whose coordinators somebody else runs: `address` is to be set before a node is added.
    #[must_use]
    pub fn without_coordinator(client: Client) -> Self {
        let folder = tempfile::Builder::new().prefix("muster-e2e-").tempdir().expect("a temporary folder");
        Self {
            nodes: BTreeMap::new(),
            coordinator: None,
            address: String::new(),
            client,
            environment: Vec::new(),
            fences: BTreeSet::new(),
            network: None,
            folder,
        }
    }

    /// Starts a coordinator with one node named `n1`.
    pub async fn with_node() -> Self {
        let mut fleet = Self::start().await;
        fleet.add_node("n1", &NodeOptions::default()).await;
        fleet
    }

    /// The fleet's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The coordinator's data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("coordinator")
    }

    /// The folder of the programs that make hosts; not there unless a test makes it.
    #[must_use]
    pub fn providers(&self) -> PathBuf {
        self.folder.path().join("providers")
    }

    /// Starts the coordinator (again) without waiting for it.
    pub fn launch_coordinator(&mut self) {
        let port_file = self.folder.path().join("port");
        let _ = std::fs::remove_file(&port_file);
        let log = self.folder.path().join("coordinator.log");
        let (environment, network) = (self.environment.clone(), self.network.clone());
        let surroundings = Surroundings { environment, network, ..Surroundings::default() };
        let arguments = self.serve_arguments(&port_file);
        self.coordinator = Some(Part::start_in("coordinator", &log, &arguments, &surroundings));
    }

    /// Starts the coordinator (again) on the same data, and on the same port as before.
    pub async fn start_coordinator(&mut self) {
        self.launch_coordinator();
        let port_file = self.folder.path().join("port");
        let address = eventually("the coordinator is ready", WAIT, async || {
            if let Some(part) = &mut self.coordinator
                && !part.is_running()
            {
                panic!("the coordinator ended: {}", part.log());
            }
            std::fs::read_to_string(&port_file).ok().filter(|text| !text.trim().is_empty())
        })
        .await;
        let address = address.trim();
        // The file may hold the port alone or the whole address.
        self.address = if address.contains(':') { address.to_owned() } else { format!("127.0.0.1:{address}") };
    }

    /// The command line of the coordinator.
    #[must_use]
    pub fn serve_arguments(&self, port_file: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = ["coordinator", "serve", "--init", "--data"].map(OsString::from).to_vec();
        arguments.push(self.data().into());
        arguments.extend(["--listen".into(), self.address.clone().into(), "--port-file".into(), port_file.into()]);
        arguments.extend(["--providers".into(), self.providers().into()]);
        arguments
    }

    /// `kill -9` of the coordinator.
    pub fn kill_coordinator(&mut self) {
        if let Some(mut part) = self.coordinator.take() {
            part.kill9();
        }
    }

    /// A join token.
    ///
    /// # Panics
    ///
    /// If the coordinator refuses.
    pub async fn token(&self, pool: &str) -> String {
        let request = v1::CreateTokenRequest { valid_ms: None, pool: pool.to_owned() };
        self.client.fleet.clone().create_token(request).await.expect("a token").into_inner().token
    }

    /// Starts a spawner and an agent and waits until the node is ready.
    pub async fn add_node(&mut self, name: &str, options: &NodeOptions) -> v1::Node {
        let token = self.token(options.pool).await;
        let parts = self.node_parts(name, options, &token);
        self.nodes.insert(name.to_owned(), parts);
        self.start_spawner(name);
        self.start_agent(name);
        let node = self.client.node_in(name, "ready").await;
        self.fences.extend(node.fences.iter().cloned());
        node
    }

    /// Names a node's cgroup: of this fleet alone, also where all tests are threads of one process.
    #[must_use]
    pub fn node_id(&self, name: &str) -> String {
        let fleet = self.folder.path().file_name().expect("a name").to_string_lossy();
        format!("{}-{name}", fleet.trim_start_matches("muster-"))
    }

    fn node_parts(&self, name: &str, options: &NodeOptions, token: &str) -> NodeParts {
        let state = self.folder.path().join(name);
        std::fs::create_dir_all(&state).expect("a node's folder");
        let socket = state.join("spawner.sock");
        let mut spawner: Vec<OsString> = vec!["spawner".into(), "--socket".into(), (&socket).into()];
        spawner.extend(["--state".into(), state.join("spawner").into(), "--node-id".into()]);
        spawner.push(self.node_id(name).into());
        if !options.policy.is_empty() {
            let path = state.join("spawner.toml");
            std::fs::write(&path, options.policy).expect("a policy");
            spawner.extend(["--config".into(), path.into()]);
        }
        if host::is_root() {
            spawner.extend(["--uids".into(), uid_range().into()]);
        }
        let mut agent: Vec<OsString> = vec!["agent".into(), "run".into(), "--state".into(), state.join("agent").into()];
        agent.extend(["--coordinator".into(), self.address.clone().into(), "--spawner".into(), socket.into()]);
        agent.extend(
            ["--name", name, "--cpu", options.cpu, "--memory", options.memory, "--token", token].map(Into::into),
        );
        if options.slice {
            agent.push("--slice".into());
        }
        agent.extend(options.agent_flags.iter().cloned());
        NodeParts {
            name: name.into(),
            spawner: None,
            agent: None,
            agent_arguments: agent,
            spawner_arguments: spawner,
            network: options.network.clone(),
        }
    }

    /// A node's processes.
    ///
    /// # Panics
    ///
    /// If there is no such node.
    pub fn node(&mut self, name: &str) -> &mut NodeParts {
        self.nodes.get_mut(name).expect("a node that was added")
    }

    /// Starts a node's agent (again).
    pub fn start_agent(&mut self, name: &str) {
        let log = self.folder.path().join(format!("{name}-agent.log"));
        let environment = self.environment.clone();
        let node = self.node(name);
        let surroundings = Surroundings { environment, network: node.network.clone(), ..Surroundings::default() };
        node.agent = Some(Part::start_in(&format!("agent {name}"), &log, &node.agent_arguments, &surroundings));
    }

    /// Starts a node's spawner (again).
    pub fn start_spawner(&mut self, name: &str) {
        let log = self.folder.path().join(format!("{name}-spawner.log"));
        let environment = vec![("NOTIFY_SOCKET".into(), self.notify_socket(name).into())];
        let node = self.node(name);
        let surroundings = Surroundings { environment, cgroup: None, network: node.network.clone() };
        let part = Part::start_in(&format!("spawner {name}"), &log, &node.spawner_arguments, &surroundings);
        node.spawner = Some(part);
    }

    /// Where a node's spawner tells the service manager how it is (sd_notify(3)); a test may listen there.
    #[must_use]
    pub fn notify_socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}-notify"))
    }

    /// Fences of profile strict that this host's nodes lack.
    #[must_use]
    pub fn lacking(&self) -> Vec<String> {
        fence::STRICT.iter().filter(|fence| !self.fences.contains(**fence)).map(|fence| (*fence).to_owned()).collect()
    }

    /// A small job of one task in profile strict, without what this host lacks.
    #[must_use]
    pub fn job<const N: usize>(&self, arguments: [&str; N]) -> v1::JobTemplate {
        let body = v1::JobBody {
            arguments: arguments.iter().map(bytes).collect(),
            request: Some(v1::Resources { cpu_milli: 100, memory_bytes: 64 << 20, disk_bytes: 16 << 20 }),
            profile: v1::Profile::Strict.into(),
            network: v1::Network::None.into(),
            delivery: v1::Delivery::AtLeastOnce.into(),
            on_drain: v1::OnDrain::Finish.into(),
            checkpoint_signal: 0,
            without: self.lacking(),
            grace_ms: 1_000,
            ..Default::default()
        };
        v1::JobTemplate { body: Some(body), tasks: 1, ..Default::default() }
    }

    /// A job that runs a shell script.
    #[must_use]
    pub fn script(&self, script: &str) -> v1::JobTemplate {
        self.job(["/bin/sh", "-c", script])
    }

    /// Drains a node.
    ///
    /// # Panics
    ///
    /// If the coordinator refuses.
    pub async fn drain(&self, name: &str, deadline: Option<Duration>, then: &str) -> v1::DrainResponse {
        let request = v1::DrainRequest {
            selector: Some(selector(name)),
            reason: String::from("a test"),
            deadline_ms: deadline.map(|time| u64::try_from(time.as_millis()).expect("a short time")),
            then: then.to_owned(),
            dry_run: false,
            at_once: None,
        };
        self.client.nodes.clone().drain(request).await.expect("a drain").into_inner()
    }
}

/// One node by name.
#[must_use]
pub fn selector(name: &str) -> v1::NodeSelector {
    v1::NodeSelector { nodes: vec![name.to_owned()], ..Default::default() }
}

/// A range of uids for one spawner, unlike that of any other test that may run now.
fn uid_range() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let node = NEXT.fetch_add(1, Ordering::Relaxed);
    // Tests run in processes of their own: a slot for each by pid, with room for 8 nodes.
    let slot = std::process::id() % 4_096;
    let first = 1_000_000 + (slot * 8 + node % 8) * UIDS_PER_NODE;
    format!("{first}-{}", first + UIDS_PER_NODE - 1)
}

impl Fleet {
    /// A node that joins with this token.
    pub async fn join_with_token(&mut self, name: &str, token: &str, options: &NodeOptions) {
        let parts = self.node_parts(name, options, token);
        self.nodes.insert(name.to_owned(), parts);
        self.start_spawner(name);
        self.start_agent(name);
        self.client.node_in(name, "ready").await;
    }

    /// An agent that must be refused with this token: what it printed.
    ///
    /// # Panics
    ///
    /// If it says nothing about it.
    pub fn refused_join(&mut self, name: &str, token: &str) -> String {
        let parts = self.node_parts(name, &NodeOptions::default(), token);
        self.nodes.insert(name.to_owned(), parts);
        self.start_spawner(name);
        self.start_agent(name);
        let agent = self.node(name).agent.as_mut().expect("just started");
        // It may end, or try again for ever; either way it says why.
        crate::eventually_blocking(WAIT, || {
            let log = agent.log();
            (!agent.is_running() || log.contains("token")).then_some(log)
        })
        .expect("it says why it was refused")
    }
}
