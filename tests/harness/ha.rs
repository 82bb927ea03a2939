//! Several coordinators of one fleet on one PostgreSQL, and a fleet's nodes that
//! know all of them.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use muster_proto::v1;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::{
    Client, Fleet, WAIT, eventually,
    network::{self, Network},
    part::{Part, Surroundings, muster_binary},
    postgres::Cluster,
};

/// One coordinator.
#[derive(Debug)]
pub struct Member {
    /// Its process, while it runs.
    pub part: Option<Part>,
    /// Where it is dialled, the same over restarts.
    pub address: String,
    /// The operator on its socket.
    pub client: Client,
    data: PathBuf,
}

/// The coordinators with their fleet. Everything ends and is removed with it.
#[derive(Debug)]
pub struct HighlyAvailable {
    // Fields are dropped in this order: nodes, coordinators, the data base.
    /// Its nodes; its client speaks to the leader that was found last.
    pub fleet: Fleet,
    /// The coordinators.
    pub members: Vec<Member>,
    /// The data base.
    pub cluster: Arc<Cluster>,
    /// Its synchronous standby, if it has one.
    pub standby: Option<Arc<Cluster>>,
    /// The address by which coordinators reach it.
    pub store: String,
    network: Option<PathBuf>,
    folder: TempDir,
}

impl HighlyAvailable {
    /// Starts so many coordinators without any node, and waits for the first leader. None: no PostgreSQL here.
    pub async fn start(count: usize) -> Option<Self> {
        let cluster = Cluster::start()?;
        let store = cluster.url();
        Some(Self::start_on(cluster, store, count).await)
    }

    /// The same with a data base that has a standby, and with the coordinators in a network of the test's own if there
    /// is one.
    pub async fn start_pair(network: Option<&Network>, count: usize) -> Option<Self> {
        let pair = Cluster::start_pair()?;
        let store = Cluster::url_of(&pair);
        let [primary, standby] = pair;
        let mut this = Self::start_at(primary, store, count, network).await;
        this.standby = Some(Arc::new(standby));
        Some(this)
    }

    /// Ends the data base as a crash would; its standby takes over, and it begins anew as that one's standby. Until the
    /// answer is finished neither is to be touched.
    ///
    /// # Panics
    /// If there is no standby.
    pub fn fail_over(&mut self) -> JoinHandle<()> {
        let standby = self.standby.take().expect("a standby");
        let old = std::mem::replace(&mut self.cluster, standby);
        let new = Arc::clone(&self.cluster);
        self.standby = Some(Arc::clone(&old));
        tokio::task::spawn_blocking(move || {
            old.crash();
            new.promote();
            old.follow(&new);
        })
    }

    /// The same by another road to the data base.
    ///
    /// # Panics
    /// If a coordinator is not made or does not start.
    pub async fn start_on(cluster: Cluster, store: String, count: usize) -> Self {
        Self::start_at(cluster, store, count, None).await
    }

    async fn start_at(cluster: Cluster, store: String, count: usize, network: Option<&Network>) -> Self {
        let host = network.map_or("127.0.0.1", |_| network::COORDINATOR);
        let folder = tempfile::Builder::new().prefix("muster-ha-").tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("shared")).expect("a folder in our own");
        let members = (0..count).map(|number| {
            let data = folder.path().join(format!("c{number}"));
            let client = Client::new(&data.join("operator.sock"));
            Member { part: None, address: format!("{host}:0"), client, data }
        });
        let members: Vec<Member> = members.collect();
        let fleet = Fleet::without_coordinator(members[0].client.clone());
        let network = network.map(Network::coordinator);
        let cluster = Arc::new(cluster);
        let mut this = Self { fleet, members, cluster, standby: None, store, network, folder };
        for number in 0..count {
            this.init(number);
            this.launch(number).await;
        }
        let addresses: Vec<_> = this.members.iter().map(|member| member.address.as_str()).collect();
        this.fleet.address = addresses.join(",");
        this.leader().await;
        this
    }

    /// The first makes the fleet; the others take its CA over from its folder.
    fn init(&self, number: usize) {
        let mut command = Command::new(muster_binary());
        command.args(["coordinator", "init", "--store", &self.store, "--data"]).arg(&self.members[number].data);
        if number > 0 {
            command.arg("--join-from").arg(&self.members[0].data);
        }
        let done = command.stdin(Stdio::null()).output().expect("an executable");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn port_file(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("port{number}"))
    }

    /// Starts a coordinator (again) without waiting for it.
    pub fn start_member(&mut self, number: usize) {
        let port_file = self.port_file(number);
        let _ = std::fs::remove_file(&port_file);
        let log = self.folder.path().join(format!("c{number}.log"));
        let member = &mut self.members[number];
        let mut arguments: Vec<OsString> = ["coordinator", "serve", "--data"].map(OsString::from).to_vec();
        arguments.push(member.data.clone().into());
        arguments.extend(["--store", &self.store, "--listen", &member.address, "--shared"].map(OsString::from));
        arguments.push(self.folder.path().join("shared").into());
        arguments.extend(["--port-file".into(), (&port_file).into()]);
        let surroundings = Surroundings { network: self.network.clone(), ..Surroundings::default() };
        member.part = Some(Part::start_in(&format!("coordinator {number}"), &log, &arguments, &surroundings));
    }

    /// Starts a coordinator (again) on its data and port, and waits until it serves or stands by.
    ///
    /// # Panics
    /// If it ends.
    pub async fn launch(&mut self, number: usize) {
        self.start_member(number);
        let port_file = self.port_file(number);
        let member = &mut self.members[number];
        let part = member.part.as_mut().expect("just started");
        member.address = eventually("the coordinator listens", WAIT, async || {
            assert!(part.is_running(), "the coordinator ended: {}", part.log());
            std::fs::read_to_string(&port_file).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        })
        .await;
    }

    /// Waits for a leader: which one it is. The fleet's client speaks to it from now on.
    pub async fn leader(&mut self) -> usize {
        let number = eventually("a coordinator leads", WAIT, async || self.leads_now().await).await;
        self.fleet.client = self.members[number].client.clone();
        number
    }

    /// Which one leads, if any does.
    pub async fn leads_now(&self) -> Option<usize> {
        for (number, member) in self.members.iter().enumerate().filter(|(_, member)| member.part.is_some()) {
            if leads(member).await {
                return Some(number);
            }
        }
        None
    }

    /// `kill -9` of a coordinator.
    pub fn kill(&mut self, number: usize) {
        if let Some(mut part) = self.members[number].part.take() {
            part.kill9();
        }
    }

    /// Keys and certificates of the coordinator that made the fleet.
    #[must_use]
    pub fn pki(&self) -> PathBuf {
        self.members[0].data.join("pki")
    }

    /// The folder of the coordinators.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A coordinator's running process.
    ///
    /// # Panics
    /// If it was killed.
    pub fn part(&mut self, number: usize) -> &mut Part {
        self.members[number].part.as_mut().expect("a coordinator that was started")
    }
}

/// A standby that doubts its leader makes the caller wait: it is asked for a short answer.
async fn leads(member: &Member) -> bool {
    let mut request = tonic::Request::new(v1::StatusRequest {});
    request.set_timeout(std::time::Duration::from_millis(100));
    member.client.fleet.clone().status(request).await.is_ok()
}
