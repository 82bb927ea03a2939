//! The fleet that faults are done to: every part by name, down or up.

use std::path::PathBuf;

use muster_tests::{Client, Cut, Fleet, HighlyAvailable, Network, NodeOptions, part::Part};

use tokio::task::JoinHandle;

use crate::Store;

/// Something that can be killed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// One of the coordinators.
    Coordinator(usize),
    /// A node's agent.
    Agent(String),
    /// A node's spawner.
    Spawner(String),
    /// The data base.
    Database,
    /// The wire between a node, by its number from 0, and the coordinators.
    Wire(usize),
}

impl Target {
    /// The kind of part, for the count of faults.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Coordinator(_) => "coordinator",
            Self::Agent(_) => "agent",
            Self::Spawner(_) => "spawner",
            Self::Database => "database",
            Self::Wire(_) => "wire",
        }
    }
}

/// The fleet, and its network where there is one of its own.
#[derive(Debug)]
pub struct World {
    // In this order they are dropped: processes, then the network that they are in.
    parts: Parts,
    network: Option<Network>,
    failover: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Parts {
    /// With one coordinator.
    Embedded(Fleet),
    /// With three and their data base.
    Postgres(HighlyAvailable),
}

const COORDINATORS: usize = 3;
/// The jobs write what they see into a file of the host. What the host lacks is not the matter here.
const POLICY: &str = "weakest_profile = \"shared\"\nmay_lack = [\"limits\", \"kill.cgroup\", \"uid.own\"]\n";

impl World {
    /// Starts it with so many nodes. None: no PostgreSQL here.
    pub async fn start(store: Store, nodes: u64) -> Option<Self> {
        let mut network = Network::new();
        let parts = match (store, &network) {
            (Store::Embedded, None) => Parts::Embedded(Fleet::start().await),
            (Store::Embedded, Some(network)) => Parts::Embedded(Fleet::start_in(network).await),
            (Store::Postgres, network) => {
                Parts::Postgres(HighlyAvailable::start_pair(network.as_ref(), COORDINATORS).await?)
            }
        };
        let places: Vec<_> = (0..nodes).map(|_| network.as_mut().map(Network::add_host)).collect();
        let mut world = Self { parts, network, failover: None };
        for (node, network) in (1..).zip(places) {
            let options = NodeOptions { policy: POLICY, network, ..NodeOptions::default() };
            world.fleet().add_node(&format!("n{node}"), &options).await;
        }
        Some(world)
    }

    /// The data base ends, and its standby takes over.
    pub fn fail_over(&mut self) {
        if let Parts::Postgres(all) = &mut self.parts {
            self.failover = Some(all.fail_over());
        }
    }

    /// The data base is in the middle of a failover, and is to be left alone.
    pub fn is_failing_over(&self) -> bool {
        self.failover.as_ref().is_some_and(|failover| !failover.is_finished())
    }

    /// Loses what goes over a wire from now on.
    pub fn cut(&self, wire: usize, cut: Cut) {
        if let Some(network) = &self.network {
            network.cut(wire, cut);
        }
    }

    /// Disturbs all wires from now on, in the words of tc-netem(8).
    pub fn disturb(&self, netem: &str) -> Result<(), String> {
        let network = self.network.as_ref().ok_or("only root has a network of its own, and only with iproute2")?;
        (0..network.hosts()).try_for_each(|wire| network.disturb(wire, netem))
    }

    /// Its nodes.
    pub fn fleet(&mut self) -> &mut Fleet {
        match &mut self.parts {
            Parts::Embedded(fleet) => fleet,
            Parts::Postgres(all) => &mut all.fleet,
        }
    }

    /// An operator at each coordinator.
    pub fn clients(&self) -> Vec<Client> {
        match &self.parts {
            Parts::Embedded(fleet) => vec![fleet.client.clone()],
            Parts::Postgres(all) => all.members.iter().map(|member| member.client.clone()).collect(),
        }
    }

    /// All that can be killed.
    pub fn targets(&self, nodes: u64) -> Vec<Target> {
        let names = || (1..=nodes).map(|node| format!("n{node}"));
        let mut targets: Vec<Target> = names().map(Target::Agent).chain(names().map(Target::Spawner)).collect();
        if self.network.is_some() {
            targets.extend((0..names().count()).map(Target::Wire));
        }
        match &self.parts {
            Parts::Embedded(_) => targets.push(Target::Coordinator(0)),
            Parts::Postgres(all) => {
                targets.extend((0..all.members.len()).map(Target::Coordinator));
                targets.push(Target::Database);
            }
        }
        targets
    }

    /// The process of a part; none: it was killed, or it is not one process.
    pub fn part(&mut self, target: &Target) -> Option<&mut Part> {
        match target {
            Target::Coordinator(number) => match &mut self.parts {
                Parts::Embedded(fleet) => fleet.coordinator.as_mut(),
                Parts::Postgres(all) => all.members[*number].part.as_mut(),
            },
            Target::Agent(name) => self.fleet().node(name).agent.as_mut(),
            Target::Spawner(name) => self.fleet().node(name).spawner.as_mut(),
            Target::Database | Target::Wire(_) => None,
        }
    }

    /// `kill -9`; of the data base, an end without any last word.
    pub fn kill(&mut self, target: &Target) {
        if let (Parts::Postgres(all), Target::Database) = (&self.parts, target) {
            all.cluster.crash();
        } else if let Some(part) = self.part(target) {
            part.kill9();
        }
    }

    /// Starts it again, and waits for nothing but the data base.
    pub fn launch(&mut self, target: &Target) {
        match (&mut self.parts, target) {
            (Parts::Embedded(fleet), Target::Coordinator(_)) => fleet.launch_coordinator(),
            (Parts::Postgres(all), Target::Coordinator(number)) => all.start_member(*number),
            (Parts::Postgres(all), Target::Database) => all.cluster.launch(),
            (Parts::Embedded(_), Target::Database) | (_, Target::Wire(_)) => (),
            (_, Target::Agent(name)) => self.fleet().start_agent(name),
            (_, Target::Spawner(name)) => self.fleet().start_spawner(name),
        }
    }

    /// Where its parts' logs and its nodes' names are: command lines of its processes hold one of these.
    pub fn folders(&mut self) -> Vec<PathBuf> {
        let mut folders = vec![self.fleet().folder().to_owned()];
        if let Parts::Postgres(all) = &self.parts {
            folders.push(all.folder().to_owned());
            let servers = [Some(&all.cluster), all.standby.as_ref()].into_iter().flatten();
            folders.extend(servers.filter_map(|server| Some(server.socket().parent()?.to_owned())));
        }
        folders
    }
}
