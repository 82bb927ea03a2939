//! The promises, each as a function from a history to what breaks it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::history::{Delivery, History, Observation, Process, Record};

/// A promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// The history is whole.
    Complete,
    /// What was answered is there in the end.
    NothingLost,
    /// A key names one job.
    NothingDoubled,
    /// An error says no more than is true.
    ErrorsTrue,
    /// Each task has exactly one record, and has ended.
    OneEnd,
    /// An end stays as it is.
    EndsStay,
    /// What a record says of a process is what the process says.
    RecordsTrue,
    /// An attempt ends by itself, or through one of the faults.
    EndsExplained,
    /// One attempt is one process.
    AttemptsOnce,
    /// At most once.
    AtMostOnce,
    /// Never two at a time.
    Exclusive,
    /// Nothing runs on.
    NothingLeft,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// How.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// States of a task that has not ended.
const UNDER_WAY: [&str; 4] = ["waiting", "placed", "running", "stopping"];

/// Ends that a process brings about, or that a killed or silent host does. Any other one was not called for.
const EXPLAINED: [&str; 4] = ["succeeded", "exited(", "spawner_lost", "node_lost("];

/// What one process of a task wrote.
#[derive(Debug, Default)]
struct Run {
    starts: usize,
    first_ms: u64,
    last_ms: u64,
    code: Option<i64>,
}

/// A key's side of the history.
#[derive(Debug, Default)]
struct Key {
    delivery: Option<Delivery>,
    tasks: u64,
    asked: usize,
    maybe: usize,
    refused: usize,
    answers: Vec<(u64, bool)>,
    jobs: Vec<(u64, u64)>,
    /// By task and attempt.
    runs: BTreeMap<(u64, u64), Run>,
}

struct Case<'a> {
    history: &'a History,
    keys: BTreeMap<&'a str, Key>,
    records: BTreeMap<(u64, u64), Vec<&'a Record>>,
    found: Vec<Violation>,
}

/// All that is wrong with a history.
#[must_use]
pub fn judge(history: &History) -> Vec<Violation> {
    let mut case = Case { history, keys: BTreeMap::new(), records: BTreeMap::new(), found: Vec::new() };
    case.sort();
    case.completeness();
    case.jobs();
    case.ends();
    case.stay();
    case.processes();
    case.found
}

impl<'a> Case<'a> {
    fn found(&mut self, rule: Rule, what: String) {
        self.found.push(Violation { rule, what });
    }

    fn sort(&mut self) {
        for line in &self.history.lines {
            match line {
                Observation::Asked { key, delivery, tasks } => {
                    let known = self.keys.entry(key).or_default();
                    (known.delivery, known.tasks) = (Some(*delivery), *tasks);
                    known.asked += 1;
                }
                Observation::Answered { key, job, existed } => {
                    self.keys.entry(key).or_default().answers.push((*job, *existed));
                }
                Observation::Failed { key, maybe } => {
                    let known = self.keys.entry(key).or_default();
                    *(if *maybe { &mut known.maybe } else { &mut known.refused }) += 1;
                }
                Observation::Job { job, key, tasks } => {
                    self.keys.entry(key).or_default().jobs.push((*job, *tasks));
                }
                Observation::Record(record) => {
                    self.records.entry((record.job, record.task)).or_default().push(record);
                }
                Observation::Process { what, key, task, attempt, at_ms } => {
                    let runs = &mut self.keys.entry(key).or_default().runs;
                    runs.entry((*task, *attempt)).or_default().heard(*what, *at_ms);
                }
                Observation::Conflict { .. }
                | Observation::Seen { .. }
                | Observation::Cancelled { .. }
                | Observation::Fault
                | Observation::Left { .. }
                | Observation::Closed => (),
            }
        }
    }

    fn completeness(&mut self) {
        for line in &self.history.lines {
            match line {
                Observation::Left { what } => self.found(Rule::NothingLeft, what.clone()),
                Observation::Conflict { key, refused: false } => {
                    self.found(Rule::NothingDoubled, format!("{key} also took another request"));
                }
                Observation::Asked { .. }
                | Observation::Answered { .. }
                | Observation::Failed { .. }
                | Observation::Conflict { refused: true, .. }
                | Observation::Seen { .. }
                | Observation::Cancelled { .. }
                | Observation::Job { .. }
                | Observation::Record(_)
                | Observation::Process { .. }
                | Observation::Fault
                | Observation::Closed => (),
            }
        }
        if self.history.lines.last() != Some(&Observation::Closed) {
            self.found(Rule::Complete, String::from("the history was not closed"));
        }
        if !self.history.lines.iter().any(|line| matches!(line, Observation::Asked { .. })) {
            self.found(Rule::Complete, String::from("nobody asked for anything"));
        }
    }

    /// What was asked against what is there.
    fn jobs(&mut self) {
        let mut found = Vec::new();
        for (name, key) in &self.keys {
            if key.delivery.is_none() {
                found.push((Rule::Complete, format!("{name} was never asked for, and is there")));
                continue;
            }
            if key.answers.len() + key.maybe + key.refused > key.asked {
                found.push((Rule::Complete, format!("{name} has more answers than questions")));
            }
            let mut answered: BTreeSet<u64> = key.answers.iter().map(|(job, _)| *job).collect();
            if answered.len() > 1 {
                found.push((Rule::NothingDoubled, format!("{name} was answered with jobs {answered:?}")));
            }
            if key.answers.iter().skip(1).any(|(_, existed)| !existed) {
                found.push((Rule::NothingDoubled, format!("{name} was made anew although it had been answered")));
            }
            // Who got an error or no answer may have been taken all the same.
            let heard = key.answers.len() + key.refused == key.asked;
            if key.answers.first().is_some_and(|(_, existed)| *existed) && heard {
                found.push((Rule::ErrorsTrue, format!("{name} existed before anybody can have made it")));
            }
            let there: BTreeSet<u64> = key.jobs.iter().map(|(job, _)| *job).collect();
            if key.jobs.len() > 1 {
                found.push((Rule::NothingDoubled, format!("{name} is there as {:?}", key.jobs)));
            }
            if key.answers.is_empty() && heard && !there.is_empty() {
                found.push((Rule::ErrorsTrue, format!("{name} was said to be not done, and is there")));
            }
            answered.retain(|job| !there.contains(job));
            if !answered.is_empty() {
                found.push((Rule::NothingLost, format!("{name} was answered with {answered:?}, which are not there")));
            }
            for (job, tasks) in key.jobs.iter().filter(|(_, tasks)| *tasks != key.tasks) {
                found.push((Rule::NothingLost, format!("{name}: job {job} has {tasks} of {} tasks", key.tasks)));
            }
            if key.jobs.is_empty() && !key.runs.is_empty() {
                found.push((Rule::NothingLost, format!("{name} ran, and no job is there")));
            }
        }
        self.found.extend(found.into_iter().map(|(rule, what)| Violation { rule, what }));
    }

    /// Each task of each job has one record, with an end that stands for itself.
    fn ends(&mut self) {
        let mut found = Vec::new();
        let cancelled: BTreeSet<(u64, u64)> = self.history.lines.iter().filter_map(cancelled).collect();
        let mut expected = BTreeSet::new();
        for key in self.keys.values() {
            for (job, tasks) in &key.jobs {
                expected.extend((0..*tasks).map(|task| (*job, task)));
            }
        }
        for id in &expected {
            let name = format!("job {} task {}", id.0, id.1);
            let records = self.records.get(id).map_or(&[][..], Vec::as_slice);
            let [record] = records else {
                found.push((Rule::OneEnd, format!("{name} has {} records", records.len())));
                continue;
            };
            if UNDER_WAY.contains(&record.state.as_str()) {
                found.push((Rule::OneEnd, format!("{name} has not ended: {}", record.state)));
                continue;
            }
            if record.state == "cancelled" && !cancelled.contains(id) {
                found.push((Rule::RecordsTrue, format!("{name} is cancelled, and nobody did it")));
            }
            for attempt in record.attempts.iter().filter(|attempt| attempt.end.is_empty()) {
                found.push((Rule::OneEnd, format!("{name} has ended, and its attempt {} not", attempt.number)));
            }
            let explained = |end: &str| end.is_empty() || EXPLAINED.iter().any(|known| end.starts_with(known));
            for attempt in record.attempts.iter().filter(|attempt| !explained(&attempt.end)) {
                found.push((Rule::EndsExplained, format!("{name} attempt {} is {}", attempt.number, attempt.end)));
            }
            let numbers: BTreeSet<u64> = record.attempts.iter().map(|attempt| attempt.number).collect();
            if numbers.len() != record.attempts.len() {
                found.push((Rule::OneEnd, format!("{name} has an attempt twice: {:?}", record.attempts)));
            }
            let succeeded = record.attempts.iter().filter(|attempt| attempt.end == "succeeded").count();
            if succeeded != usize::from(record.state == "succeeded") {
                found.push((Rule::OneEnd, format!("{name} is {} with {succeeded} successes", record.state)));
            }
            let last = record.attempts.iter().max_by_key(|attempt| attempt.number);
            if record.state != "cancelled" && last.is_none_or(|last| last.end != record.state) {
                found.push((Rule::RecordsTrue, format!("{name} is {}, its last attempt {last:?}", record.state)));
            }
        }
        for id in self.records.keys().filter(|id| !expected.contains(id)) {
            found.push((Rule::OneEnd, format!("job {} task {} has a record and no job", id.0, id.1)));
        }
        self.found.extend(found.into_iter().map(|(rule, what)| Violation { rule, what }));
    }

    /// An end that was once seen is the end.
    fn stay(&mut self) {
        let mut ends: BTreeMap<(u64, u64), &str> = BTreeMap::new();
        let mut found = Vec::new();
        let records = self.records.values().flatten().map(|record| (record.job, record.task, record.state.as_str()));
        for (job, task, state) in self.history.lines.iter().filter_map(seen).chain(records) {
            match ends.get(&(job, task)) {
                Some(end) if *end != state => {
                    found.push(format!("job {job} task {task} was {end}, and then {state}"));
                }
                None if !UNDER_WAY.contains(&state) => {
                    ends.insert((job, task), state);
                }
                Some(_) | None => (),
            }
        }
        found.into_iter().for_each(|what| self.found(Rule::EndsStay, what));
    }

    /// What processes say against the records and against each other.
    fn processes(&mut self) {
        let mut found = Vec::new();
        for (name, key) in &self.keys {
            let job = key.jobs.first().map(|(job, _)| *job);
            for ((task, attempt), run) in &key.runs {
                if run.starts != 1 {
                    let what = format!("{name} task {task} attempt {attempt} started {} times", run.starts);
                    found.push((Rule::AttemptsOnce, what));
                }
                let record = job.and_then(|job| self.records.get(&(job, *task))).and_then(|records| records.first());
                if record.is_some_and(|record| is_unrecorded(key, record, *attempt)) {
                    found.push((Rule::RecordsTrue, format!("{name} task {task}: attempt {attempt} ran unrecorded")));
                }
            }
            if key.delivery == Some(Delivery::AtMostOnce) {
                found.extend(started_again(name, key).map(|what| (Rule::AtMostOnce, what)));
            }
            if key.delivery == Some(Delivery::Exclusive) {
                found.extend(overlaps(name, key).into_iter().map(|what| (Rule::Exclusive, what)));
            }
            for record in self.records.values().flatten().filter(|record| Some(record.job) == job) {
                found.extend(untrue(name, key, record).map(|what| (Rule::RecordsTrue, what)));
            }
        }
        self.found.extend(found.into_iter().map(|(rule, what)| Violation { rule, what }));
    }
}

impl Run {
    fn heard(&mut self, what: Process, at_ms: u64) {
        if self.last_ms == 0 {
            self.first_ms = at_ms;
        }
        self.first_ms = self.first_ms.min(at_ms);
        self.last_ms = self.last_ms.max(at_ms);
        match what {
            Process::Start => self.starts += 1,
            Process::Beat => (),
            Process::End(code) => self.code = Some(code),
        }
    }
}

fn cancelled(line: &Observation) -> Option<(u64, u64)> {
    if let Observation::Cancelled { job, task } = line { Some((*job, *task)) } else { None }
}

fn seen(line: &Observation) -> Option<(u64, u64, &str)> {
    if let Observation::Seen { job, task, state } = line { Some((*job, *task, state)) } else { None }
}

/// An attempt whose start nobody could report, as its host's agent and spawner died at once, may count as never sent
/// where its task may be repeated: then a later one is recorded.
fn is_unrecorded(key: &Key, record: &Record, attempt: u64) -> bool {
    let repeated = key.delivery == Some(Delivery::AtLeastOnce);
    record.attempts.iter().all(|known| known.number != attempt && (!repeated || known.number < attempt))
}

fn started_again(name: &str, key: &Key) -> impl Iterator<Item = String> {
    let mut starts: BTreeMap<u64, usize> = BTreeMap::new();
    for ((task, _), run) in &key.runs {
        *starts.entry(*task).or_default() += run.starts;
    }
    let again = starts.into_iter().filter(|(_, count)| *count > 1);
    again.map(move |(task, count)| format!("{name} task {task} started {count} times"))
}

/// From its first line to its last: a process that was killed may have lived a little longer than that.
fn overlaps(name: &str, key: &Key) -> Vec<String> {
    let runs: Vec<_> = key.runs.iter().collect();
    let mut found = Vec::new();
    for (at, ((task, attempt), run)) in runs.iter().enumerate() {
        for ((_, other), later) in runs.iter().skip(at + 1).filter(|((of, _), _)| of == task) {
            if run.first_ms < later.last_ms && later.first_ms < run.last_ms {
                found.push(format!(
                    "{name} task {task}: attempt {attempt} ran {}..{} ms and attempt {other} {}..{} ms",
                    run.first_ms, run.last_ms, later.first_ms, later.last_ms
                ));
            }
        }
    }
    found
}

/// An end that only a process can have brought about is what that process said.
fn untrue(name: &str, key: &Key, record: &Record) -> impl Iterator<Item = String> {
    record.attempts.iter().filter_map(move |attempt| {
        let said = key.runs.get(&(record.task, attempt.number)).and_then(|run| run.code);
        let recorded = match attempt.end.as_str() {
            "succeeded" => 0,
            end => end.strip_prefix("exited(")?.strip_suffix(')')?.parse().ok()?,
        };
        let what =
            || format!("{name} task {} attempt {}: {}, its process {said:?}", record.task, attempt.number, attempt.end);
        (said != Some(recorded)).then(what)
    })
}
