//! The keeper and parent of all jobs of a host.

pub mod protocol;
