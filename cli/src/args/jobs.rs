//! Commands of jobs, and what a job may ask.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::units;

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
