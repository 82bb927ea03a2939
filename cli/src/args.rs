//! The tree of commands and their options. Nothing is decided here; the doc
//! comments are the manual.

mod jobs;
mod nodes;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

pub use jobs::{Job, JobOptions, Run, Submit};
pub use nodes::{Drain, Drains, Node, Selector, Then};

use crate::{
    output::{Color, Format},
    units,
};

/// Runs sandboxed jobs on a fleet of hosts that is as large as the work.
#[derive(Debug, Parser)]
#[command(name = "muster", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 not found; 4 not allowed; 5 conflict; \
    6 coordinator unreachable; 7 a wait timed out; 8 done in part; 10 changes pending (dry run); 130 interrupted.\n\
    Try it: `muster demo`, or `muster up` and in another terminal `muster run -- uname -a`.")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Form of the answer.
    #[arg(
        short,
        long = "output-format",
        alias = "format",
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORM"
    )]
    pub output: Format,
    /// Only these columns of a table, in this order.
    #[arg(long, global = true, value_delimiter = ',', value_name = "NAME,...")]
    pub columns: Vec<String>,
    /// Tables without the line of column names.
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// Colour on stdout.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: Color,
    /// Say less on stderr.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Errors with all their causes.
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Do not ask before touching several targets.
    #[arg(short, long, global = true)]
    pub yes: bool,
    /// Give up after this long: a request (default 30s), or a wait (default never).
    #[arg(long, global = true, value_parser = units::duration, value_name = "TIME")]
    pub timeout: Option<Duration>,
    /// The coordinator: unix:/path, or host:port (all of them, with commas). Default: the newest running `muster up`, else the system's.
    #[arg(long, global = true, env = "MUSTER_SERVER", value_name = "WHERE")]
    pub server: Option<String>,
    /// The fleet's CA certificate (PEM), for host:port.
    #[arg(long, global = true, env = "MUSTER_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Your client certificate (PEM), for host:port.
    #[arg(long, global = true, env = "MUSTER_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Its private key (PEM). Default: beside the certificate, ending in .key.
    #[arg(long, global = true, env = "MUSTER_CERT_KEY", value_name = "FILE")]
    pub cert_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "parsed once, and never kept in numbers")]
pub enum Command {
    /// A fleet on this machine that does real work, grows, drains and shrinks; leaves nothing behind.
    Demo(Demo),
    /// A fleet on this machine to try things on, until Ctrl-C.
    Up(Up),
    /// Submit one job, stream its output, exit with its code.
    Run(Box<Run>),
    /// Submit, watch, end and repeat jobs.
    #[command(subcommand, visible_alias = "jobs")]
    Job(Job),
    /// See, cordon, drain and remove nodes.
    #[command(subcommand, visible_alias = "nodes")]
    Node(Node),
    /// Rolling drains: see them, end them. `muster node drain --max-parallel N` begins one.
    #[command(subcommand, visible_alias = "drains")]
    Drain(Drains),
    /// See and set pools, their policies and decisions.
    #[command(subcommand, visible_alias = "pools")]
    Pool(Pool),
    /// Tokens with which hosts join.
    #[command(subcommand)]
    Token(Token),
    /// The fleet's stored state: what to do when it is damaged, restored or behind.
    #[command(subcommand)]
    State(State),
    /// The fleet in a few lines, with alarms.
    Status,
    /// What happened in the fleet, newest last.
    Events(Events),
    /// Versions of this program and of the coordinator.
    Version,
    /// Check this host, and say how to mend what a strict job would miss. Changes nothing; exit 1 if something is missing.
    Doctor(Doctor),
    /// Play the fleet's real rules in virtual time, with faults, and check every promise; exit 1 if one breaks.
    Simulate(Simulate),
    /// Cleans up after a killed `up` or `demo`.
    #[command(hide = true)]
    Janitor(Janitor),
}

/// Where the fleet's store is.
#[derive(Args, Debug)]
pub struct DataFolder {
    /// The coordinator's data folder.
    #[arg(long, default_value = "/var/lib/muster", value_name = "DIR")]
    pub data: PathBuf,
}

/// `muster state`.
#[derive(Debug, Subcommand)]
pub enum State {
    /// Read every row of the store and check every promise that it can show; the coordinator may run. Exit 1: damaged.
    Verify {
        #[command(flatten)]
        folder: DataFolder,
        /// A store in PostgreSQL instead.
        #[arg(long, value_name = "postgres://...", env = "MUSTER_STORE", hide_env_values = true)]
        store: Option<String>,
        /// CA that vouches for PostgreSQL's certificate.
        #[arg(long, value_name = "FILE")]
        store_ca: Option<PathBuf>,
    },
    /// Copy the store, the fleet's marker and its keys into a new folder, and check the copy; the coordinator may run.
    Backup {
        #[command(flatten)]
        folder: DataFolder,
        /// The new folder. It holds the fleet's keys: keep it as safe as the data folder.
        #[arg(value_name = "TO")]
        to: PathBuf,
    },
    /// Put a backup back, and keep what was there beside it. The coordinator must be stopped.
    Restore {
        #[command(flatten)]
        folder: DataFolder,
        /// A folder that `backup` made.
        #[arg(value_name = "FROM")]
        from: PathBuf,
    },
    /// Make a store that opens from what can be read of a damaged one, and say what is lost. The coordinator must be stopped.
    Repair {
        #[command(flatten)]
        folder: DataFolder,
    },
    /// Place again although the store lost answered requests (a restored backup, a failover that lost some).
    AcceptLoss {
        /// Why; kept in the history.
        #[arg(long, default_value = "", value_name = "TEXT")]
        reason: String,
    },
}

/// Where the parts of this host have their files.
#[derive(Args, Debug)]
pub struct Doctor {
    /// The spawner's policy.
    #[arg(long, default_value = "/etc/muster/spawner.toml", value_name = "FILE")]
    pub spawner_config: PathBuf,
    /// The spawner's folder.
    #[arg(long, default_value = "/var/lib/muster-spawner", value_name = "DIR")]
    pub spawner_state: PathBuf,
    /// The agent's folder.
    #[arg(long, default_value = "/var/lib/muster-agent", value_name = "DIR")]
    pub agent_state: PathBuf,
    /// The file with the agent's join token.
    #[arg(long, default_value = "/etc/muster/join-token", value_name = "FILE")]
    pub token_file: PathBuf,
    /// The coordinator's folder, if it runs here.
    #[arg(long, default_value = "/var/lib/muster", value_name = "DIR")]
    pub coordinator_data: PathBuf,
    /// The coordinator whose clock this host's is compared with. Default: MUSTER_COORDINATOR of /etc/muster/agent.env.
    #[arg(long, value_name = "HOST:PORT")]
    pub coordinator: Option<String>,
    /// The cgroup that the spawner has. Default: its systemd unit's; without one, what a spawner that is started
    /// from here would have.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
}

/// A simulated fleet: how large, what it does, what fails (parts of the jobs are in thousandths); or, with --policy,
/// a trace of real work replayed against a pool's policy.
#[derive(Args, Debug)]
pub struct Simulate {
    /// The first seed; one seed is one run, to the byte.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// How many seeds to play, one after another.
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub seeds: u64,
    /// Threads, one seed a thread. Default: one a core.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// A seed: play it alone and print all that happens, and a hash over it. With --policy: the file of a trace (.gz too).
    #[arg(long, value_name = "SEED|FILE")]
    pub trace: Option<OsString>,
    /// Try to find a smaller world in which a failing seed fails as well.
    #[arg(long)]
    pub shrink: bool,
    /// Hosts that join by themselves.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = units::at_least_one)]
    pub hosts: usize,
    /// Hosts that a provider makes beyond those, at most.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub pool_max: u32,
    /// Jobs, of 1 to 6 tasks each.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub jobs: usize,
    /// Clients and faults act for this long; then all heals and has to end.
    #[arg(long, default_value = "10m", value_parser = units::duration, value_name = "TIME")]
    pub span: Duration,
    /// Coordinators on one store, one of which leads. Default: one or two, by the seed.
    #[arg(long, value_name = "N")]
    pub coordinators: Option<usize>,
    /// Faults that occur: all, none, or names with commas; a name that is not known lists them.
    #[arg(long, default_value = "all", value_name = "LIST")]
    pub faults: muster_sim::Faults,
    /// Mean time between two faults.
    #[arg(long, default_value = "3s", value_parser = units::duration, value_name = "TIME")]
    pub fault_every: Duration,
    /// Jobs that may never start twice.
    #[arg(long, default_value_t = 200, value_name = "PERMILLE")]
    pub at_most_once: u64,
    /// Jobs that may never run twice at once.
    #[arg(long, default_value_t = 250, value_name = "PERMILLE")]
    pub exclusive: u64,
    /// Attempts that run for minutes, not seconds.
    #[arg(long, default_value_t = 120, value_name = "PERMILLE")]
    pub long: u64,
    /// Jobs with a time limit.
    #[arg(long, default_value_t = 100, value_name = "PERMILLE")]
    pub limited: u64,
    /// Jobs that bring down each host that they run on.
    #[arg(long, default_value_t = 5, value_name = "PERMILLE")]
    pub poison: u64,
    /// Jobs that do not end by themselves: they are cancelled when all has healed.
    #[arg(long, default_value_t = 10, value_name = "PERMILLE")]
    pub endless: u64,
    /// What a policy would do with recorded work.
    #[command(flatten)]
    pub replay: crate::commands::Replay,
}

#[derive(Args, Debug)]
pub struct Janitor {
    #[arg(long)]
    pub folder: PathBuf,
    #[arg(long)]
    pub parent_fd: i32,
    #[arg(long)]
    pub children_fd: i32,
}

#[derive(Args, Debug)]
pub struct Demo {
    /// Folder whose regular files are the work. Default: the current one, without target/ and .git.
    pub folder: Option<PathBuf>,
    /// One JSON document with the summary on stdout.
    #[arg(long)]
    pub json: bool,
    /// Keep the coordinator's data and the logs of all parts in this folder.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Up {
    /// Nodes to start. Without --policy only.
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "policy")]
    pub nodes: u32,
    /// A pool's policy (TOML) with `provider = "local"`; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub policy: Vec<PathBuf>,
    /// Keep the coordinator's data here. Default: a temporary folder that is removed at the end.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// TCP address for operators and agents.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS")]
    pub listen: String,
    /// TCP address for health and metrics.
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Pool {
    /// All pools.
    List,
    /// One pool with its policy.
    Show { pool: String },
    /// Make a pool, or replace its policy.
    Set {
        /// The policy as TOML.
        #[arg(short, long, value_name = "TOML")]
        file: PathBuf,
    },
    /// What the pool would do now, and why.
    Explain { pool: String },
    /// Every scaling decision with its reason, newest last; with `-o wide` or json also what it was made of.
    History { pool: String },
    /// Give the pool a size of your own, within its maximum, whatever its policy wants.
    Scale {
        pool: String,
        /// So many hosts. Fewer: idle ones go, and busy ones when they become idle.
        size: u32,
        /// For so long. Default: until `muster pool resume`.
        #[arg(long = "for", value_name = "TIME", value_parser = units::duration)]
        hold: Option<Duration>,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Stop all scaling of the pool; what is there stays.
    Pause {
        pool: String,
        /// Why; shown to everybody.
        #[arg(long)]
        reason: String,
    },
    /// Scale by the policy alone again: ends a pause, one for failed hosts too, and a size set by `scale`.
    Resume {
        pool: String,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Forget an empty pool that no unfinished job asks for.
    Delete {
        pool: String,
        /// Why.
        #[arg(long, default_value = "")]
        reason: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// A one-time token with which one host joins.
    Create {
        /// Its life. Default 1h.
        #[arg(long, value_name = "TIME", value_parser = units::duration)]
        valid: Option<Duration>,
        /// The pool that the host joins.
        #[arg(long, default_value = "default")]
        pool: String,
    },
}

#[derive(Args, Debug)]
pub struct Events {
    /// As it happens.
    #[arg(long, short)]
    pub follow: bool,
    /// Only about job/ID, node/NAME or pool/NAME.
    #[arg(long)]
    pub subject: Option<String>,
    /// At most this many, the newest.
    #[arg(long, short = 'n', default_value_t = 50)]
    pub limit: u32,
    /// Only after this revision.
    #[arg(long, default_value_t = 0)]
    pub after: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_of_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn commands_keep_bytes_that_are_not_text() {
        use std::os::unix::ffi::OsStringExt;
        let odd = OsString::from_vec(b"x\xff".to_vec());
        let cli = Cli::try_parse_from([
            OsString::from("muster"),
            "run".into(),
            "--input".into(),
            odd.clone(),
            "--".into(),
            odd.clone(),
        ])
        .unwrap();
        let Command::Run(run) = cli.command else { panic!("{cli:?}") };
        assert_eq!((run.command, run.options.input), (vec![odd.clone()], vec![odd]));
    }

    #[test]
    fn an_empty_command_is_refused() {
        for line in [&["muster", "run"][..], &["muster", "run", "--"]] {
            assert!(Cli::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
