//! A seeded, simulated fleet round the real core: `Fleet` for the coordinator
//! and `Host` for each agent, in virtual time, with a network that delays and
//! cuts, and parts that crash at any step. The promises are checked after each
//! step against what really ran, which no part of the fleet can see.
//!
//! ```text
//! world  ── actions in time order ──► coordinator (Fleet + committed rows)
//!                                     hosts (Host + spawner with its processes)
//! truth  ◄── every start and end of user code, every answer to a client
//! ```

mod coordinator;
mod host;
mod rng;
mod truth;
mod world;

pub use truth::Violation;
pub use world::{Faults, Outcome, Setup, run};
