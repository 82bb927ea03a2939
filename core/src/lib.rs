#![no_std]
//! The fleet's rules as one deterministic state machine.
//!
//! In goes an [`Event`](event::Event) with the time; out come
//! [`Effect`](effect::Effect)s and the rows that changed. No I/O, no clock, no
//! randomness, no async: the coordinator's driver and the simulator run this
//! same code. The driver must commit the rows before it acts on the effects.
//! The promises FL-1..FL-15 that this upholds are listed in ARCHITECTURE.md
//! and checked by name in [`invariants`].

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod autoscale;
pub mod denied;
pub mod effect;
pub mod end;
pub mod event;
pub mod fence;
pub mod fleet;
pub mod host;
pub mod ids;
pub mod invariants;
pub mod job;
pub mod leadership;
pub mod lease;
pub mod limits;
pub mod mutation;
pub mod node;
pub mod placement;
pub mod policy;
pub mod pool;
pub mod queue;
pub mod range_set;
pub mod resources;
pub mod rolling;
pub mod spec;
pub mod time;
pub mod timeline;
