//! The tree of commands and their options. Nothing is decided here; the doc
//! comments are the manual.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

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
    #[arg(long, default_value_t = 5, value_name = "N")]
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

#[derive(Args, Debug)]
pub struct Run {
    #[command(flatten)]
    pub options: JobOptions,
    /// Show output as the job wrote it, also on a terminal.
    #[arg(long)]
    pub raw: bool,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub enum Job {
    /// Submit a job, or an array of tasks.
    Submit(Box<Submit>),
    /// The newest jobs, newest first.
    List {
        /// Only in this state: waiting, running, finished.
        #[arg(long)]
        state: Option<String>,
        /// At most this many.
        #[arg(long, short = 'n', default_value_t = 20)]
        limit: u32,
    },
    /// All about one job, with the reasons.
    Inspect { job: String },
    /// The tasks of a job and their attempts.
    Tasks {
        job: String,
        /// From this task on.
        #[arg(long, default_value_t = 0)]
        first: u32,
        /// At most this many.
        #[arg(long, short = 'n', default_value_t = 1_000)]
        limit: u32,
        /// Only in this state, by the first letters: waiting, running, exited ...
        #[arg(long)]
        state: Option<String>,
    },
    /// What a job wrote to stdout and stderr.
    Logs {
        /// JOB or JOB.TASK.
        job: String,
        /// As it comes, until the job has ended.
        #[arg(long, short)]
        follow: bool,
        /// Which task of the array; default: all, one after the other.
        #[arg(long)]
        task: Option<u32>,
        /// Which attempt; default: the last.
        #[arg(long)]
        attempt: Option<u32>,
        /// As it was written, also on a terminal.
        #[arg(long)]
        raw: bool,
    },
    /// End jobs, or some tasks of one.
    Cancel {
        #[arg(required = true, value_name = "JOB")]
        jobs: Vec<String>,
        /// Only these tasks: 3 or 10-19.
        #[arg(long, value_name = "A-B", value_parser = units::array)]
        tasks: Option<(u32, u32)>,
        /// Why; kept with the record.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Wait for jobs to finish; exit 1 if one failed, 7 after --timeout.
    Wait {
        #[arg(required = true, value_name = "JOB")]
        jobs: Vec<String>,
        /// Exit with the job's own code (one job with one task).
        #[arg(long)]
        propagate_exit: bool,
    },
    /// Place the failed and cancelled tasks again.
    Retry {
        #[arg(required = true, value_name = "JOB")]
        jobs: Vec<String>,
    },
    /// A live count of a job's tasks.
    Progress { job: String },
    /// What happened to a job.
    Events {
        job: String,
        /// As it happens.
        #[arg(long, short)]
        follow: bool,
    },
    /// Fetch files that a job returned.
    Outputs {
        job: String,
        /// Folder to write to; made if missing.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Only this task.
        #[arg(long)]
        task: Option<u32>,
        /// Replace files that exist.
        #[arg(long)]
        overwrite: bool,
    },
}

#[derive(Args, Debug)]
pub struct Submit {
    /// The job as TOML; options of the command line go before it.
    #[arg(short, long, value_name = "TOML")]
    pub file: Option<PathBuf>,
    /// Task indexes of an array: 0-999.
    #[arg(long, value_name = "A-B", value_parser = units::array, conflicts_with = "each_line")]
    pub array: Option<(u32, u32)>,
    /// A task for each line of this file (- for stdin); `{}` in an argument is the line.
    #[arg(long, value_name = "FILE")]
    pub each_line: Option<PathBuf>,
    #[command(flatten)]
    pub options: JobOptions,
    /// Wait for the end; exit 1 if it failed.
    #[arg(long)]
    pub wait: bool,
    /// With --wait: exit with the job's own code.
    #[arg(long, requires = "wait")]
    pub propagate_exit: bool,
    /// The command and its arguments.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// What a job asks; each overrides the job file.
#[derive(Args, Debug, Default)]
pub struct JobOptions {
    /// Shown in lists.
    #[arg(long)]
    pub name: Option<String>,
    /// CPU: 500m, 2. Default 1.
    #[arg(long, value_parser = units::cpu)]
    pub cpu: Option<u64>,
    /// Memory: 256M, 2G. Default 512M.
    #[arg(long, value_parser = units::size)]
    pub memory: Option<u64>,
    /// Size of the private working folder. Default 256M.
    #[arg(long, value_parser = units::size)]
    pub disk: Option<u64>,
    /// Processes and threads. Default 1024.
    #[arg(long, value_name = "N")]
    pub pids: Option<u32>,
    /// Longest time an attempt may run.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub time_limit: Option<Duration>,
    /// Between SIGTERM and the kill. Default 10s.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub grace: Option<Duration>,
    /// Bytes of stdout and stderr together; what is more is cut. Default 64M.
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    pub output_limit: Option<u64>,
    /// Tries after a failure of the job's own. Default 0.
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
    /// Tries after a lost node. Default 3.
    #[arg(long, value_name = "N")]
    pub retries_lost: Option<u32>,
    /// Tries after a drain. Default 16.
    #[arg(long, value_name = "N")]
    pub retries_drained: Option<u32>,
    /// Higher goes first: -1000 to 1000.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub priority: Option<i32>,
    /// A label that the node must carry; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = units::pair)]
    pub constraint: Vec<(String, String)>,
    /// The pool to run in. Default: any.
    #[arg(long)]
    pub pool: Option<String>,
    /// A variable of the job's environment: KEY=VALUE, or KEY to take it from here; may be repeated.
    #[arg(long, short, value_name = "KEY=VALUE")]
    pub env: Vec<OsString>,
    /// A file (- for stdin) that becomes the job's stdin.
    #[arg(long, value_name = "FILE")]
    pub stdin: Option<PathBuf>,
    /// A file or folder to send along, by its own name or NAME; may be repeated.
    #[arg(long, short, value_name = "PATH[=NAME]")]
    pub input: Vec<OsString>,
    /// A file below the working folder that comes back; may be repeated.
    #[arg(long = "output", value_name = "PATH")]
    pub outputs: Vec<OsString>,
    /// Where the command starts, below the private working folder.
    #[arg(long, value_name = "PATH")]
    pub working_folder: Option<OsString>,
    /// none (default) or host.
    #[arg(long, value_enum)]
    pub network: Option<crate::template::Network>,
    /// strict (default), shared or none.
    #[arg(long, value_enum)]
    pub profile: Option<crate::template::Profile>,
    /// Fences that the job can do without, by name: ns.net,limits
    #[arg(long, value_delimiter = ',', value_name = "FENCE,...")]
    pub without: Vec<String>,
    /// Do without all fences that the live nodes lack, and say which.
    #[arg(long)]
    pub best_effort: bool,
    /// How often a task may start.
    #[arg(long, value_enum)]
    pub delivery: Option<crate::template::Delivery>,
    /// What a drain does to it: finish (default), requeue or checkpoint.
    #[arg(long, value_enum)]
    pub on_drain: Option<crate::template::OnDrain>,
    /// The signal that asks it to save, with `--on-drain checkpoint`. Default USR1.
    #[arg(long, value_name = "SIGNAL", value_parser = units::signal)]
    pub checkpoint_signal: Option<u8>,
    /// Idempotency key: asking twice with the same key makes one job.
    #[arg(long)]
    pub key: Option<String>,
}

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
