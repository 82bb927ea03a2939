//! Traces as text become a [`Workload`]. What a trace does not say is an assumption with one default each, and the
//! caller can set every one.

mod arrivals;
mod counts;
mod detect;
mod fields;
mod invocations;
mod swf;
#[cfg(test)]
mod tests;

use std::fmt;

use muster_core::time::{Millis, Timestamp};

use super::workload::Workload;

/// The formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Standard Workload Format: a batch log, one job a line.
    Swf,
    /// Invocations a minute, one function a line, with durations and memory in two further files.
    Invocations,
    /// One request a line: when, tokens in, tokens out.
    Arrivals,
    /// Requests in each interval: when, how many.
    Counts,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Swf, Self::Invocations, Self::Arrivals, Self::Counts];

    /// The word of the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Swf => "swf",
            Self::Invocations => "invocations",
            Self::Arrivals => "arrivals",
            Self::Counts => "counts",
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|format| format.name() == text);
        known.ok_or_else(|| format!("there is no format `{text}`; known are swf, invocations, arrivals, counts"))
    }
}

/// What a trace leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assumptions {
    /// SWF: cores of one task; a job of P processors is P divided by this, rounded up, alike tasks.
    pub task_cores: u32,
    /// Others: thousandths of a core that a task takes.
    pub cpu_milli: u32,
    /// Memory of a task where the trace does not say, in MiB; memory that it says is rounded up to a multiple of it.
    pub memory_mib: u32,
    /// Counts: how long one request runs.
    pub service: Millis,
    /// Arrivals: microseconds for each token that comes in.
    pub input_token_us: u64,
    /// Arrivals: microseconds for each token that is made.
    pub output_token_us: u64,
    /// Multiplies the number of arrivals, in thousandths.
    pub scale_permille: u64,
    /// Seeds where in its minute an invocation falls, and how long it runs within its function's percentiles.
    pub seed: u64,
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            task_cores: 1,
            cpu_milli: 1_000,
            memory_mib: 256,
            service: Millis::from_secs(60),
            input_token_us: 125,
            output_token_us: 50_000,
            scale_permille: 1_000,
            seed: 1,
        }
    }
}

/// One file of a trace.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Shown in errors.
    pub name: &'a str,
    /// All that it says.
    pub text: &'a str,
}

/// A trace's files.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The trace.
    pub trace: Source<'a>,
    /// Invocations: how long each function runs.
    pub durations: Option<Source<'a>>,
    /// Invocations: how much memory each function has.
    pub memory: Option<Source<'a>>,
}

/// What is wrong with a trace, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceError {
    /// The file.
    pub file: String,
    /// The line, counted from 1; none: the file as a whole.
    pub line: Option<usize>,
    /// What was wrong.
    pub what: String,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

impl std::error::Error for TraceError {}

impl Source<'_> {
    fn wrong(&self, line: usize, what: impl Into<String>) -> TraceError {
        TraceError { file: self.name.to_owned(), line: Some(line), what: what.into() }
    }

    fn wrong_as_a_whole(&self, what: impl Into<String>) -> TraceError {
        TraceError { file: self.name.to_owned(), line: None, what: what.into() }
    }
}

/// A trace that was read.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Its format.
    pub format: Format,
    /// What it comes to.
    pub workload: Workload,
    /// When it began, if it says so.
    pub begins: Option<Timestamp>,
}

/// Most tasks of a trace: they are kept in memory.
pub const TASKS_MAX: u64 = 50_000_000;

/// Reads a trace, in the format named or in the one that its first lines show.
///
/// # Errors
/// The file, the line and what was wrong there.
pub fn read(files: &Files<'_>, format: Option<Format>, assumptions: &Assumptions) -> Result<Trace, TraceError> {
    let format = match format {
        Some(format) => format,
        None => detect::detect(&files.trace)?,
    };
    let (workload, begins) = match format {
        Format::Swf => swf::read(&files.trace, assumptions)?,
        Format::Invocations => (invocations::read(files, assumptions)?, None),
        Format::Arrivals => arrivals::read(&files.trace, assumptions)?,
        Format::Counts => counts::read(&files.trace, assumptions)?,
    };
    if workload.arrivals.is_empty() {
        return Err(files.trace.wrong_as_a_whole("it names no work"));
    }
    let tasks = workload.tasks();
    if tasks > TASKS_MAX {
        return Err(files.trace.wrong_as_a_whole(format!("{tasks} tasks are more than {TASKS_MAX}; use --scale")));
    }
    Ok(Trace { format, workload, begins })
}
