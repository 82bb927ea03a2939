//! End to end: real coordinator, spawner and agent processes on port 0, a fresh
//! folder each, no sleeps. A test's name is the promise that it checks.

mod access;
mod calls;
mod clocks;
mod crowd;
mod demo;
mod disk;
mod doctor;
mod drains;
mod excess;
mod failover;
mod hostile_agent;
mod hostile_connection;
mod jobs;
mod leftovers;
mod notices;
mod partition;
mod pools;
mod progress;
mod restarts;
mod restored;
mod reuse;
mod rolling;
mod shrinking;
mod sleeping;
mod spawner;
mod upgrade;
mod usage;
mod watch;
