//! What runs on a host. The agent is the only part that speaks to the network
//! and holds no privilege; the spawner holds the privilege and is the parent
//! of all jobs; the init of each job is a clone of the spawner.

pub mod sandbox;
pub mod spawner;
