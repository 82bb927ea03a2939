//! A fleet on this machine: one parent of a coordinator, and of a spawner and
//! an agent for each node that the coordinator asks of its `local` provider.
//!
//! ```text
//! muster up|demo --- provider socket <--- coordinator
//!   |-- coordinator      restarted when it dies, at the same address
//!   |-- spawner, agent   for each node; restarted when they die
//!   `-- janitor          removes the folder when all the others are gone
//! ```
//! The parent holds the write end of a pipe. When it ends, also by `kill -9`,
//! each child sees the pipe's end and cleans up what it made.

mod children;
mod coordinator;
mod fleet;
pub mod folder;
mod host;
pub mod janitor;
mod pipes;
pub mod policy;
mod provider;
pub mod up;

pub use fleet::{Exits, LocalFleet, Settings};
