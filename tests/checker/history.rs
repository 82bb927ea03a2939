//! What a history holds. A line that is not understood is an error: evidence is
//! never left out in silence.
//!
//! Times are milliseconds of the host's boot-time clock, so that lines of all
//! processes of one host can be compared.

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

/// How often a task may be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Again after a loss.
    AtLeastOnce,
    /// Never again.
    AtMostOnce,
    /// Again, and never two at a time.
    Exclusive,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observation {
    /// A client is about to submit.
    Asked {
        /// Its idempotency key; names the job in all that follows.
        key: String,
        /// What it asks.
        delivery: Delivery,
        /// How many tasks.
        tasks: u64,
    },
    /// It was answered with a job.
    Answered {
        /// The key.
        key: String,
        /// The job's id.
        job: u64,
        /// The fleet says that it knew the key.
        existed: bool,
    },
    /// It got an error.
    Failed {
        /// The key.
        key: String,
        /// The error leaves open whether it was done; else it says that it was not.
        maybe: bool,
    },
    /// Another request under a key that was answered: whether it was refused.
    Conflict {
        /// The key.
        key: String,
        /// It was.
        refused: bool,
    },
    /// A task's state, as somebody saw it.
    Seen {
        /// The job.
        job: u64,
        /// The task.
        task: u64,
        /// The word.
        state: String,
    },
    /// Somebody ends a task.
    Cancelled {
        /// The job.
        job: u64,
        /// The task.
        task: u64,
    },
    /// A job that the fleet has in the end.
    Job {
        /// Its id.
        job: u64,
        /// The key that was its name.
        key: String,
        /// Its tasks.
        tasks: u64,
    },
    /// A task's record in the end.
    Record(Record),
    /// What a process of a job wrote.
    Process {
        /// What.
        what: Process,
        /// Its job.
        key: String,
        /// Its task.
        task: u64,
        /// Its attempt.
        attempt: u64,
        /// When.
        at_ms: u64,
    },
    /// What was done to the fleet.
    Fault,
    /// A process or a group that nothing owns any more.
    Left {
        /// Which.
        what: String,
    },
    /// All was healed, waited for and looked at.
    Closed,
}

/// What a process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// It begins.
    Start,
    /// It goes on.
    Beat,
    /// It will now exit with this code.
    End(i64),
}

/// A task in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its job.
    pub job: u64,
    /// The task.
    pub task: u64,
    /// Its state's word.
    pub state: String,
    /// All attempts.
    pub attempts: Vec<Attempt>,
}

/// An attempt in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number.
    pub number: u64,
    /// How it ended, in the words of the task's state; empty: it did not.
    pub end: String,
}

/// Why a text is not a history.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed {
    line: usize,
    why: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for Malformed {}

/// All lines, in the order of each writer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The lines.
    pub lines: Vec<Observation>,
}

impl History {
    /// Reads JSON lines.
    ///
    /// # Errors
    ///
    /// The first line that is not an observation.
    pub fn read(text: &str) -> Result<Self, Malformed> {
        let lines = text.lines().enumerate().map(|(at, line)| {
            let malformed = |why: String| Malformed { line: at + 1, why };
            let value: Value = serde_json::from_str(line).map_err(|error| malformed(error.to_string()))?;
            observation(&value).map_err(|field| malformed(format!("no {field}: {line}")))
        });
        Ok(Self { lines: lines.collect::<Result<_, _>>()? })
    }

    /// How much there was to judge.
    #[must_use]
    pub fn summary(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for line in &self.lines {
            let name = match line {
                Observation::Asked { .. } => "asked",
                Observation::Answered { .. } => "answered",
                Observation::Failed { maybe: true, .. } => "maybe done",
                Observation::Failed { maybe: false, .. } => "not done",
                Observation::Conflict { .. } => "conflicts",
                Observation::Seen { .. } | Observation::Closed => continue,
                Observation::Cancelled { .. } => "cancelled",
                Observation::Job { .. } => "jobs",
                Observation::Record(_) => "tasks",
                Observation::Process { what: Process::Start, .. } => "starts",
                Observation::Process { what: Process::Beat, .. } => continue,
                Observation::Process { what: Process::End(_), .. } => "ends",
                Observation::Fault => "faults",
                Observation::Left { .. } => "left",
            };
            *counts.entry(name).or_default() += 1;
        }
        counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    }
}

fn observation(value: &Value) -> Result<Observation, &'static str> {
    let key = || text(value, "key");
    let number = |name| number(value, name);
    let process = |what| {
        // The epoch is the leader's term and the attempt's number.
        let epoch = text(value, "epoch")?;
        let attempt = epoch.split_once('.').and_then(|(_, number)| number.parse().ok()).ok_or("epoch")?;
        Ok(Observation::Process { what, key: key()?, task: number("task")?, attempt, at_ms: number("at_ms")? })
    };
    Ok(match value["kind"].as_str().ok_or("kind")? {
        "asked" => Observation::Asked { key: key()?, delivery: delivery(value)?, tasks: number("tasks")? },
        "answered" => Observation::Answered { key: key()?, job: number("job")?, existed: flag(value, "existed")? },
        "failed" => Observation::Failed { key: key()?, maybe: flag(value, "maybe")? },
        "conflict" => Observation::Conflict { key: key()?, refused: flag(value, "refused")? },
        "seen" => Observation::Seen { job: number("job")?, task: number("task")?, state: text(value, "state")? },
        "cancelled" => Observation::Cancelled { job: number("job")?, task: number("task")? },
        "job" => Observation::Job { job: number("job")?, key: key()?, tasks: number("tasks")? },
        "record" => Observation::Record(record(value)?),
        "start" => process(Process::Start)?,
        "beat" => process(Process::Beat)?,
        "end" => process(Process::End(value["code"].as_i64().ok_or("code")?))?,
        "fault" => Observation::Fault,
        "left" => Observation::Left { what: text(value, "what")? },
        "closed" => Observation::Closed,
        _ => return Err("kind that is known"),
    })
}

fn record(value: &Value) -> Result<Record, &'static str> {
    let attempts = value["attempts"].as_array().ok_or("attempts")?.iter();
    let attempts =
        attempts.map(|attempt| Ok(Attempt { number: number(attempt, "number")?, end: text(attempt, "end")? }));
    Ok(Record {
        job: number(value, "job")?,
        task: number(value, "task")?,
        state: text(value, "state")?,
        attempts: attempts.collect::<Result<_, &'static str>>()?,
    })
}

fn delivery(value: &Value) -> Result<Delivery, &'static str> {
    match value["delivery"].as_str() {
        Some("at_least_once") => Ok(Delivery::AtLeastOnce),
        Some("at_most_once") => Ok(Delivery::AtMostOnce),
        Some("exclusive") => Ok(Delivery::Exclusive),
        _ => Err("delivery"),
    }
}

fn text(value: &Value, name: &'static str) -> Result<String, &'static str> {
    value[name].as_str().map(str::to_owned).ok_or(name)
}

fn number(value: &Value, name: &'static str) -> Result<u64, &'static str> {
    value[name].as_u64().ok_or(name)
}

fn flag(value: &Value, name: &'static str) -> Result<bool, &'static str> {
    value[name].as_bool().ok_or(name)
}
