//! A seeded, simulated fleet round the real core: `Fleet` for the coordinators
//! and `Host` for each agent, in virtual time, with a network, disks, clocks
//! and a provider that fail, and parts that die or stop at any step. The
//! promises are checked after each step against what really ran, which no part
//! of the fleet can see.
//!
//! ```text
//! agenda ── actions in time order ──► coordinators (Fleet + committed rows, one leads)
//!                                     hosts (Host + spawner with its processes)
//!                                     clients, provider, faults
//! truth  ◄── every start and end of user code, every commit, every answer to a client
//! ```

mod agenda;
mod clients;
mod coordinator;
mod coverage;
mod faults;
mod host;
mod network;
mod play;
mod provider;
pub mod replay;
pub mod rng;
mod setup;
mod spawner;
mod store;
mod trace;
mod truth;
mod world;

pub use coverage::Coverage;
pub use play::{Failure, Progress, Summary, play_all, shrink, trace};
pub use setup::{Fault, Faults, Mix, Setup};
pub use truth::Violation;
pub use world::{Outcome, run};
