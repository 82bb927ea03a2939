//! Commands of nodes and of their drains.

use std::time::Duration;

use clap::{Args, Subcommand};

use crate::units;

/// Which nodes.
#[derive(Args, Debug, Default)]
pub struct Selector {
    /// Names or host lists: web-01 or web-[01-03,07].
    #[arg(value_name = "NODE")]
    pub nodes: Vec<String>,
    /// All nodes with this label; may be repeated.
    #[arg(long, short = 'l', value_name = "KEY=VALUE", value_parser = units::pair)]
    pub label: Vec<(String, String)>,
    /// All nodes of this pool.
    #[arg(long)]
    pub pool: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// All nodes.
    List {
        #[command(flatten)]
        selector: Selector,
    },
    /// All about one node, with the reasons.
    Inspect { node: String },
    /// Place nothing new on these nodes.
    Cordon {
        #[command(flatten)]
        selector: Selector,
        /// Why; shown to everybody.
        #[arg(long)]
        reason: String,
    },
    /// Undo a cordon.
    Uncordon {
        #[command(flatten)]
        selector: Selector,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Empty nodes: nothing new, and what runs leaves.
    Drain(Drain),
    /// Cancel a drain; the duty from before it comes back.
    Resume {
        #[command(flatten)]
        selector: Selector,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Forget nodes and revoke their certificates.
    Remove {
        #[command(flatten)]
        selector: Selector,
        /// Also if it is live or has work.
        #[arg(long)]
        force: bool,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Give up silent nodes although many fell silent at once: their hosts are gone. One after the other, each when it has
    /// been silent for long enough; what they ran is placed elsewhere.
    ReleaseBrake {
        /// Why; kept in the history.
        #[arg(long)]
        reason: String,
    },
    /// What happened to a node.
    Events {
        node: String,
        /// As it happens.
        #[arg(long, short)]
        follow: bool,
    },
}

#[derive(Args, Debug)]
pub struct Drain {
    #[command(flatten)]
    pub selector: Selector,
    /// Why; shown to everybody.
    #[arg(long)]
    pub reason: String,
    /// What is left then is ended. Default 30m.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub deadline: Option<Duration>,
    /// Wait for as long as it takes.
    #[arg(long, conflicts_with = "deadline")]
    pub no_deadline: bool,
    /// What follows.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub then: Then,
    /// At most so many nodes, or such a part of them (10%), drain at once; the others go on working until their turn
    /// has come, and the deadline is each one's own.
    #[arg(long, alias = "max", value_name = "N", value_parser = units::part)]
    pub max_parallel: Option<units::Part>,
    /// Change nothing; list what the drain would wait for. Exit 10 if a node would be drained.
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until all are drained.
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Subcommand)]
pub enum Drains {
    /// All that go on: progress, and how long they will take.
    List,
    /// One of them, node by node: what it waits for.
    Show {
        /// As the list names it: r3.
        #[arg(value_parser = units::rolling)]
        drain: u64,
    },
    /// End one: who waits stays, who drains is resumed, who is drained stays so.
    Cancel {
        /// As the list names it: r3.
        #[arg(value_parser = units::rolling)]
        drain: u64,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
}

/// What follows a drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Then {
    /// Stay connected, closed to work.
    #[default]
    Nothing,
    /// The agent exits and stays down.
    Stop,
    /// The host is powered off.
    Poweroff,
    /// The provider deletes the host.
    Delete,
}
