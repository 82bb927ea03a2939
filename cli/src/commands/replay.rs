//! `muster simulate --policy FILE --trace FILE`: a pool's policy on recorded work, beside rules that are known and
//! beside what foresight would pay. Reads files and shows; all that is played and measured is in `muster_sim::replay`.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use clap::Args;
use muster_core::{
    policy::PoolPolicy,
    time::{Millis, Timestamp},
};
use muster_sim::replay::{
    Assumptions, Bounds, Conditions, Files, Format, RIVALS, Report, Row, Shape, Source, WHOLE, Workload, compare, html,
    read, svg, synthetic,
};
use serde_json::{Value, json};

use super::check_policy;
use crate::{
    escape,
    exit::{Exit, Failure, Result},
    output::{Cell, List, Output},
    progress::{Progress, time_left},
    units,
};

/// A synthetic trace begins on this Monday, 2024-01-01, at midnight (UTC); so does one that does not say when.
const MONDAY: Timestamp = Timestamp(1_704_067_200_000);
/// A larger trace is not read.
const TRACE_BYTES_MAX: u64 = 2 << 30;

/// The replay of a trace.
#[derive(Args, Debug)]
#[command(next_help_heading = "Replay of a trace (--policy)")]
pub struct Replay {
    /// A pool's policy: with --trace FILE or --synthetic, what it would do with that work. Price and hosts are its own.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Instead of a recorded trace a made one: steps, spikes, ramp, on-off, weekends, batches, steady, batch-jobs or self-similar; --seed varies it.
    #[arg(long, value_name = "SHAPE", requires = "policy", conflicts_with = "trace")]
    pub synthetic: Option<Shape>,
    /// swf (batch log), invocations (a minute, by function), arrivals (with token counts), counts (in each interval).
    /// Default: what the first line shows.
    #[arg(long, value_name = "FORMAT", requires = "policy")]
    pub trace_format: Option<Format>,
    /// invocations: how long functions run. Default: the file beside the trace with _durations for _invocations.
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub durations: Option<PathBuf>,
    /// invocations: memory of functions. Default: the file beside the trace with _memory for _invocations, if it is there.
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub memories: Option<PathBuf>,
    /// swf: cores of one task; a job of P processors is an array of P divided by this.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub task_cores: u32,
    /// Other formats: cores of one task.
    #[arg(long, default_value = "1", value_parser = units::cpu, value_name = "CPUS")]
    pub task_cpu: u64,
    /// Memory of one task, where the trace does not say; what it says is rounded up to a multiple of this.
    #[arg(long, default_value = "256MiB", value_parser = units::size, value_name = "SIZE")]
    pub task_memory: u64,
    /// counts: how long one request runs.
    #[arg(long, default_value = "60s", value_parser = units::duration, value_name = "TIME")]
    pub service: Duration,
    /// arrivals: microseconds of run time for each token that comes in.
    #[arg(long, default_value_t = 125, value_name = "MICROSECONDS")]
    pub input_token: u64,
    /// arrivals: microseconds of run time for each token that is made.
    #[arg(long, default_value_t = 50_000, value_name = "MICROSECONDS")]
    pub output_token: u64,
    /// So many times as many arrivals as the trace has.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub scale: f64,
    /// From a host's order to its first hello, on average.
    #[arg(long, default_value = "45s", value_parser = units::duration, value_name = "TIME")]
    pub boot: Duration,
    /// Boots take up to so much more or less, in percent, each length alike likely; --seed varies them.
    #[arg(long, default_value_t = 30, value_name = "PERCENT", value_parser = clap::value_parser!(u64).range(0..=100))]
    pub boot_spread: u64,
    /// From the order to end a host until it is gone. Hosts cost from their order until then.
    #[arg(long, default_value = "5s", value_parser = units::duration, value_name = "TIME")]
    pub stop: Duration,
    /// Price of a host for an hour. Default: the policy's cost.price_per_hour, else 1.
    #[arg(long, value_name = "PRICE")]
    pub price: Option<f64>,
    /// Report the part up to here (for tuning) and the rest apart; bounds are for the rest.
    #[arg(long, value_name = "PART", requires = "policy")]
    pub split: Option<f64>,
    /// Rules beside the policy: thresholds, concurrency, concurrency-70, concurrency-delay, fixed-peak, demand, or none.
    #[arg(long, value_name = "LIST", value_delimiter = ',', requires = "policy")]
    pub against: Option<Vec<String>>,
    /// A page with table and plots; it needs nothing else.
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub html: Option<PathBuf>,
    /// The plots alone.
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub svg: Option<PathBuf>,
    /// Exit 10 if 99 of 100 tasks wait for longer at most.
    #[arg(long, value_parser = units::duration, value_name = "TIME", requires = "policy")]
    pub max_p99_wait: Option<Duration>,
    /// Exit 10 if it takes more node-hours than so many times the oracle's.
    #[arg(long, value_name = "RATIO", requires = "policy")]
    pub max_node_hours_ratio: Option<f64>,
    /// Exit 10 if its size changes more often.
    #[arg(long, value_name = "N", requires = "policy")]
    pub max_changes_per_hour: Option<f64>,
    /// Exit 10 if more run time is thrown away.
    #[arg(long, value_parser = units::duration, value_name = "TIME", requires = "policy")]
    pub max_work_lost: Option<Duration>,
}

/// Which trace, on how many threads.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The policy's file.
    pub policy: &'a Path,
    /// The trace's file; none: a synthetic one.
    pub trace: Option<&'a Path>,
    /// Of everything that is left to chance.
    pub seed: u64,
    /// None: one a core.
    pub threads: Option<usize>,
}

/// Runs the command.
pub fn run(output: &Output, options: &Replay, task: Task<'_>) -> Result<ExitCode> {
    let policy = policy_of(task.policy)?;
    let (mut workload, begins, name) = workload_of(output, options, task)?;
    let cut = workload.fit(&policy.host.capacity());
    if cut > 0 {
        output.say(&format!("{cut} tasks are larger than a host of the policy; they are played as large as one"));
    }
    for (what, count) in &workload.skipped {
        output.say(&format!("not played: {count} {what}"));
    }
    let conditions = conditions_of(options, task.seed, begins)?;
    let rivals = match options.against.as_deref() {
        None => RIVALS.map(String::from).to_vec(),
        Some([none]) if none == "none" => Vec::new(),
        Some(named) => named.to_vec(),
    };
    let threads = task.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let (line, plays) = (Progress::new(output), Mutex::new(Plays::new(&rivals)));
    let progress = |rule, played| {
        let mut plays = plays.lock().unwrap_or_else(PoisonError::into_inner);
        plays.played[rule] = Some(played);
        line.show(|since| plays.far(since));
    };
    let report = compare(&workload, &policy, &rivals, conditions, threads, &progress).map_err(Failure::usage);
    drop(line);
    let report = report?;
    output.say(&heading(&name, &report, &policy));
    let price = price_of(options, &policy);
    let parts: &[(usize, &str)] =
        if options.split.is_some() { &[(0, "first"), (1, "second"), (2, "whole")] } else { &[(2, "whole")] };
    output.list(&table(&report, parts, price))?;
    let judged = if options.split.is_some() { 1 } else { 2 };
    let better = report.better_than_the_policy(judged);
    if !better.is_empty() {
        output.say(&format!("at least as good in node-hours, p99 wait and changes together: {}", better.join(", ")));
    }
    write_plots(options, &report, &name, parts, price)?;
    let broken = report.broken(&bounds_of(options), judged);
    for sentence in &broken {
        output.say(&format!("worse than its bounds: {sentence}"));
    }
    Ok(if broken.is_empty() { Exit::Ok } else { Exit::Pending }.into())
}

/// How far each rule is on the trace.
#[derive(Debug)]
struct Plays<'a> {
    rules: Vec<&'a str>,
    /// In thousandths; none: its turn has not come.
    played: Vec<Option<u64>>,
}

impl<'a> Plays<'a> {
    fn new(rivals: &'a [String]) -> Self {
        let rules: Vec<&str> = std::iter::once("policy").chain(rivals.iter().map(String::as_str)).collect();
        Self { played: vec![None; rules.len()], rules }
    }

    /// For a person who waits: what is played now comes last, where a narrow terminal cuts.
    fn far(&self, since: Duration) -> String {
        let total = self.rules.len() as u64 * WHOLE;
        let left = time_left(self.played.iter().flatten().sum(), total, since);
        let left = left.map_or_else(String::new, |left| format!(", {left} left"));
        let done = self.played.iter().filter(|played| **played == Some(WHOLE)).count();
        let now: Vec<String> = (self.rules.iter().zip(&self.played))
            .filter_map(|(rule, played)| Some((rule, (*played).filter(|played| *played < WHOLE)?)))
            .map(|(rule, played)| format!("{rule} {}%", played * 100 / WHOLE))
            .collect();
        let now = if now.is_empty() { String::new() } else { format!(": {} of the trace", now.join(", ")) };
        format!("{done}/{} rules{left}{now}", self.rules.len())
    }
}

fn policy_of(path: &Path) -> Result<PoolPolicy> {
    let text = fs::read_to_string(path).map_err(|error| Failure::file("read the policy", path, error))?;
    check_policy(&text).map_err(|why| Failure::usage(format!("the policy {}: {why}", escape::path(path))))
}

fn millis(span: Duration) -> Millis {
    Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

fn permille(part: f64, option: &str, most: f64) -> Result<u64> {
    if !(0.0..=most).contains(&part) {
        return Err(Failure::usage(format!("{option} is {part}: it must be from 0 to {most}")));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Ok((part * 1_000.0).round() as u64)
}

fn conditions_of(options: &Replay, seed: u64, begins: Timestamp) -> Result<Conditions> {
    Ok(Conditions {
        boot: millis(options.boot),
        boot_spread_permille: options.boot_spread * 10,
        stop: millis(options.stop),
        seed,
        split_permille: permille(options.split.unwrap_or(1.0), "--split", 1.0)?,
        begins,
    })
}

fn bounds_of(options: &Replay) -> Bounds {
    Bounds {
        p99_wait: options.max_p99_wait.map(millis),
        node_hours_ratio: options.max_node_hours_ratio,
        changes_per_hour: options.max_changes_per_hour,
        work_lost: options.max_work_lost.map(millis),
    }
}

fn price_of(options: &Replay, policy: &PoolPolicy) -> f64 {
    let own = policy.cost.map(|cost| cost.price_per_hour.0 as f64 / 1e6);
    options.price.or(own).unwrap_or(1.0)
}

fn workload_of(output: &Output, options: &Replay, task: Task<'_>) -> Result<(Workload, Timestamp, String)> {
    let assumptions = Assumptions {
        task_cores: options.task_cores.max(1),
        cpu_milli: u32::try_from(options.task_cpu).unwrap_or(u32::MAX),
        memory_mib: u32::try_from(options.task_memory >> 20).unwrap_or(u32::MAX).max(1),
        service: millis(options.service),
        input_token_us: options.input_token,
        output_token_us: options.output_token,
        scale_permille: permille(options.scale, "--scale", 1e6)?,
        seed: task.seed,
    };
    let Some(path) = task.trace else {
        let shape = options
            .synthetic
            .ok_or_else(|| Failure::usage("--policy asks for a trace: --trace FILE or --synthetic SHAPE"))?;
        let workload = synthetic(shape, task.seed, assumptions.cpu_milli, assumptions.memory_mib);
        return Ok((workload, MONDAY, format!("synthetic {}", shape.name())));
    };
    let trace = text_of(path)?;
    let durations = companion(path, options.durations.as_deref(), "_durations")?;
    let memory = companion(path, options.memories.as_deref(), "_memory")?;
    let named = |(path, text): &(PathBuf, String)| (escape::path(path).to_string(), text.clone());
    let (durations, memory) = (durations.as_ref().map(named), memory.as_ref().map(named));
    let name = escape::path(path).to_string();
    let files = Files {
        trace: Source { name: &name, text: &trace },
        durations: durations.as_ref().map(|(name, text)| Source { name, text }),
        memory: memory.as_ref().map(|(name, text)| Source { name, text }),
    };
    let trace = read(&files, options.trace_format, &assumptions).map_err(|error| Failure::usage(error.to_string()))?;
    if options.trace_format.is_none() {
        output.say(&format!("{name} is read as {}", trace.format.name()));
    }
    Ok((trace.workload, trace.begins.unwrap_or(MONDAY), name))
}

/// A file's text; one that ends in .gz is unpacked.
fn text_of(path: &Path) -> Result<String> {
    let failed = |error| Failure::file("read the trace", path, error);
    let file = fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|extension| extension == "gz") {
        let unpacked = flate2::read::MultiGzDecoder::new(file);
        unpacked.take(TRACE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        file.take(TRACE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    }
    if bytes.len() as u64 == TRACE_BYTES_MAX {
        return Err(Failure::usage(format!("{}: it is larger than 2 GiB", escape::path(path))));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].split(|byte| *byte == b'\n').count();
        Failure::usage(format!("{}:{line}: this is no text (UTF-8)", escape::path(path)))
    })
}

/// The file that was named, or the one beside the trace, if there is one.
fn companion(trace: &Path, named: Option<&Path>, suffix: &str) -> Result<Option<(PathBuf, String)>> {
    if let Some(named) = named {
        return Ok(Some((named.to_owned(), text_of(named)?)));
    }
    let file = trace.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !file.contains("_invocations") {
        return Ok(None);
    }
    let beside = trace.with_file_name(file.replace("_invocations", suffix));
    if beside.exists() { Ok(Some((beside.clone(), text_of(&beside)?))) } else { Ok(None) }
}

fn heading(name: &str, report: &Report, policy: &PoolPolicy) -> String {
    let host = policy.host.capacity();
    format!(
        "{name}: {} tasks in {}; hosts of {} CPU and {}, at most {} of them are needed at once",
        report.tasks,
        report.span,
        muster_core::resources::Cores(host.cpu_milli),
        muster_core::resources::Bytes(host.memory_bytes),
        report.peak
    )
}

/// A table's columns and a row's cells, as text.
const COLUMNS: [&str; 14] = [
    "RULE",
    "PART",
    "NODE-HOURS",
    "RATIO",
    "IDLE",
    "P50",
    "P99",
    "MAX",
    "CHANGES",
    "PER-HOUR",
    "HOSTS",
    "PEAK",
    "LOST",
    "COST",
];

fn cells(report: &Report, row: &Row, (part, name): (usize, &str), price: f64) -> Vec<String> {
    let figures = &row.figures[part];
    let seconds = |span: Millis| format!("{:.1}s", span.0 as f64 / 1_000.0);
    vec![
        row.name.clone(),
        name.to_owned(),
        format!("{:.1}", figures.node_hours()),
        format!("{:.2}", report.ratio(row, part)),
        format!("{:.1}%", figures.idle_permille as f64 / 10.0),
        seconds(figures.waits.p50),
        seconds(figures.waits.p99),
        seconds(figures.waits.max),
        figures.changes.to_string(),
        format!("{:.1}", figures.changes_per_hour()),
        figures.ordered.to_string(),
        if row.name == "oracle" { report.peak.to_string() } else { figures.peak_hosts.to_string() },
        Millis(figures.lost_ms).to_string(),
        format!("{:.2}", figures.node_hours() * price),
    ]
}

fn table(report: &Report, parts: &[(usize, &str)], price: f64) -> List {
    let mut list = List::new("ReplayReport", &COLUMNS);
    for part in parts {
        for row in &report.rows {
            let shown: Vec<Cell> = cells(report, row, *part, price).iter().map(Cell::from).collect();
            list.push(shown, value(report, row, *part, price));
        }
    }
    list
}

fn value(report: &Report, row: &Row, (part, name): (usize, &str), price: f64) -> Value {
    let figures = &row.figures[part];
    json!({
        "rule": row.name,
        "part": name,
        "span_ms": figures.span.0,
        "tasks": figures.waits.tasks,
        "node_hours": figures.node_hours(),
        "node_hours_ratio": report.ratio(row, part),
        "idle_permille": figures.idle_permille,
        "wait_p50_ms": figures.waits.p50.0,
        "wait_p99_ms": figures.waits.p99.0,
        "wait_max_ms": figures.waits.max.0,
        "wait_mean_ms": figures.waits.mean.0,
        "changes": figures.changes,
        "changes_per_hour": figures.changes_per_hour(),
        "hosts_ordered": figures.ordered,
        "hosts_peak": figures.peak_hosts,
        "work_lost_ms": figures.lost_ms,
        "cost": figures.node_hours() * price,
    })
}

fn write_plots(options: &Replay, report: &Report, name: &str, parts: &[(usize, &str)], price: f64) -> Result<()> {
    let write = |path: &Path, text: String| {
        fs::write(path, text).map_err(|error| Failure::file("write the plots", path, error))
    };
    let title = name.rsplit('/').next().unwrap_or(name);
    if let Some(path) = &options.svg {
        write(path, svg(report, title))?;
    }
    if let Some(path) = &options.html {
        let mut rows = vec![COLUMNS.map(String::from).to_vec()];
        rows.extend(parts.iter().flat_map(|part| report.rows.iter().map(|row| cells(report, row, *part, price))));
        write(path, html(report, title, &rows))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_names_the_rules_that_are_played_and_the_time_of_all() {
        let rivals = ["thresholds".to_owned(), "fixed-peak".to_owned(), "concurrency".to_owned()];
        let mut plays = Plays::new(&rivals);
        let far = |plays: &Plays| plays.far(Duration::from_secs(30));
        assert_eq!(far(&plays), "0/4 rules");
        plays.played = vec![Some(0), None, None, None];
        assert_eq!(far(&plays), "0/4 rules: policy 0% of the trace");
        plays.played = vec![Some(WHOLE), Some(439), Some(561), None];
        assert_eq!(far(&plays), "1/4 rules, 30s left: thresholds 43%, fixed-peak 56% of the trace");
        plays.played = vec![Some(WHOLE); 4];
        assert_eq!(far(&plays), "4/4 rules, 0ms left");
    }
}
