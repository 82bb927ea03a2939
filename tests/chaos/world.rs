//! The fleet that faults are done to: every part by name, down or up.

use std::path::PathBuf;

use muster_tests::{Client, Fleet, HighlyAvailable, NodeOptions, part::Part};

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
}

impl Target {
    /// The kind of part, for the count of faults.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Coordinator(_) => "coordinator",
            Self::Agent(_) => "agent",
            Self::Spawner(_) => "spawner",
            Self::Database => "database",
        }
    }
}

/// The fleet.
#[derive(Debug)]
pub enum World {
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
        let mut world = match store {
            Store::Embedded => Self::Embedded(Fleet::start().await),
            Store::Postgres => Self::Postgres(HighlyAvailable::start(COORDINATORS).await?),
        };
        let options = NodeOptions { policy: POLICY, ..NodeOptions::default() };
        for node in 1..=nodes {
            world.fleet().add_node(&format!("n{node}"), &options).await;
        }
        Some(world)
    }

    /// Its nodes.
    pub fn fleet(&mut self) -> &mut Fleet {
        match self {
            Self::Embedded(fleet) => fleet,
            Self::Postgres(all) => &mut all.fleet,
        }
    }

    /// An operator at each coordinator.
    pub fn clients(&self) -> Vec<Client> {
        match self {
            Self::Embedded(fleet) => vec![fleet.client.clone()],
            Self::Postgres(all) => all.members.iter().map(|member| member.client.clone()).collect(),
        }
    }

    /// All that can be killed.
    pub fn targets(&self, nodes: u64) -> Vec<Target> {
        let names = || (1..=nodes).map(|node| format!("n{node}"));
        let mut targets: Vec<Target> = names().map(Target::Agent).chain(names().map(Target::Spawner)).collect();
        match self {
            Self::Embedded(_) => targets.push(Target::Coordinator(0)),
            Self::Postgres(all) => {
                targets.extend((0..all.members.len()).map(Target::Coordinator));
                targets.push(Target::Database);
            }
        }
        targets
    }

    /// The process of a part; none: it was killed, or it is the data base, which is several.
    pub fn part(&mut self, target: &Target) -> Option<&mut Part> {
        match (self, target) {
            (Self::Embedded(fleet), Target::Coordinator(_)) => fleet.coordinator.as_mut(),
            (Self::Postgres(all), Target::Coordinator(number)) => all.members[*number].part.as_mut(),
            (world, Target::Agent(name)) => world.fleet().node(name).agent.as_mut(),
            (world, Target::Spawner(name)) => world.fleet().node(name).spawner.as_mut(),
            (_, Target::Database) => None,
        }
    }

    /// `kill -9`; of the data base, an end without any last word.
    pub fn kill(&mut self, target: &Target) {
        match (&mut *self, target) {
            (Self::Postgres(all), Target::Database) => all.cluster.crash(),
            (world, part) => {
                if let Some(part) = world.part(part) {
                    part.kill9();
                }
            }
        }
    }

    /// Starts it again, and waits for nothing but the data base.
    pub fn launch(&mut self, target: &Target) {
        match (self, target) {
            (Self::Embedded(fleet), Target::Coordinator(_)) => fleet.launch_coordinator(),
            (Self::Postgres(all), Target::Coordinator(number)) => all.start_member(*number),
            (Self::Postgres(all), Target::Database) => all.cluster.launch(),
            (Self::Embedded(_), Target::Database) => (),
            (world, Target::Agent(name)) => world.fleet().start_agent(name),
            (world, Target::Spawner(name)) => world.fleet().start_spawner(name),
        }
    }

    /// Where its parts' logs and its nodes' names are: command lines of its processes hold one of these.
    pub fn folders(&mut self) -> Vec<PathBuf> {
        let mut folders = vec![self.fleet().folder().to_owned()];
        if let Self::Postgres(all) = self {
            folders.push(all.folder().to_owned());
            folders.extend(all.cluster.socket().parent().map(ToOwned::to_owned));
        }
        folders
    }
}
