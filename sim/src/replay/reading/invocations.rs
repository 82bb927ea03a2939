//! Invocations a minute of each function, as the Azure Functions 2019 trace has it (Shahrad and others, "Serverless in
//! the Wild", USENIX ATC 2020), with how long each function runs and how much memory it has in two further files.
//!
//! An invocation falls anywhere in its minute. How long it runs is drawn from its function's percentiles, between
//! two of them evenly; or it is the function's average, if the file has no percentiles.

use std::collections::HashMap;

use muster_core::time::Millis;

use super::{
    Assumptions, Files, Source, TraceError,
    counts::Scale,
    fields::{amount, column},
};
use crate::{
    replay::workload::{Arrival, Workload},
    rng::Rng,
};

const MINUTE: u64 = 60_000;
/// Columns before the first minute.
const MINUTES_FROM: usize = 4;

type Function<'a> = [&'a str; 3];

/// How long a function runs.
struct Duration {
    average_ms: f64,
    /// Percent and milliseconds, rising. The longest of a whole day stretches its last percent too far: it is left out,
    /// and what lies past the last percentile is as long as that.
    percentiles: Vec<(f64, f64)>,
    /// Brings the mean of what is drawn to the average that the file states.
    correction: f64,
}

/// Percentiles from here on are left out.
const PERCENT_MAX: f64 = 100.0;

pub(super) fn read(files: &Files<'_>, assumptions: &Assumptions) -> Result<Workload, TraceError> {
    let source = &files.trace;
    let Some(durations) = &files.durations else {
        return Err(source.wrong_as_a_whole(
            "how long its functions run is in another file: put it beside this one as *_durations.csv, or name it by --durations",
        ));
    };
    let durations = read_durations(durations)?;
    let memory = files.memory.as_ref().map(read_memory).transpose()?.unwrap_or_default();
    let mut lines = source.text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let minutes = lines.next().map_or(0, |(_, header)| header.split(',').count().saturating_sub(MINUTES_FROM));
    if minutes == 0 {
        return Err(source.wrong(1, "the header names no minute after its four columns"));
    }
    let mut rng = Rng::new(assumptions.seed);
    let mut scale = Scale::new(assumptions.scale_permille);
    let mut arrivals = Vec::new();
    let mut skipped = 0;
    for (at, line) in lines.filter(|(_, line)| !line.is_empty()) {
        let columns: Vec<&str> = line.split(',').collect();
        if columns.len() != minutes + MINUTES_FROM {
            return Err(source.wrong(
                at,
                format!("the header has {} columns, and the line has {}", minutes + MINUTES_FROM, columns.len()),
            ));
        }
        let function = [columns[0], columns[1], columns[2]];
        let mut total = 0;
        for (minute, count) in columns[MINUTES_FROM..].iter().enumerate() {
            let count: u64 = count.trim().parse().map_err(|_| {
                let column = minute + MINUTES_FROM + 1;
                source.wrong(at, format!("column {column} is `{}`: it must be a whole number from 0 up", count.trim()))
            })?;
            let Some(duration) = durations.get(&function) else {
                total += count;
                continue;
            };
            let count = scale.of(count);
            if arrivals.len() as u64 + u64::from(count) > super::TASKS_MAX {
                return Err(source.wrong_as_a_whole(format!("more than {} invocations; use --scale", super::TASKS_MAX)));
            }
            for _ in 0..count {
                arrivals.push(Arrival {
                    at: Millis(minute as u64 * MINUTE + rng.between(0, MINUTE)),
                    run: duration.draw(&mut rng),
                    cpu_milli: assumptions.cpu_milli,
                    memory_mib: memory.get(&function).map_or(assumptions.memory_mib, |mib| rounded(*mib, assumptions)),
                    tasks: 1,
                });
            }
        }
        skipped += total;
    }
    let mut workload = Workload::new(arrivals);
    if skipped > 0 {
        workload.skipped.push((String::from("invocations of functions without a duration"), skipped));
    }
    Ok(workload)
}

/// Few sizes of memory instead of one for each function: placement has a line for each.
fn rounded(mib: f64, assumptions: &Assumptions) -> u32 {
    let step = assumptions.memory_mib.max(1);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
    let mib = mib.ceil() as u32;
    mib.max(1).div_ceil(step).saturating_mul(step)
}

/// Columns by their names.
fn header<'a>(source: &Source<'a>) -> HashMap<&'a str, usize> {
    let first = source.text.lines().next().unwrap_or_default();
    first.split(',').enumerate().map(|(at, name)| (name.trim(), at)).collect()
}

fn place(source: &Source<'_>, header: &HashMap<&str, usize>, name: &str) -> Result<usize, TraceError> {
    header.get(name).copied().ok_or_else(|| source.wrong(1, format!("the header has no column {name}")))
}

/// The three columns that name a function.
fn function_columns(source: &Source<'_>, header: &HashMap<&str, usize>) -> Result<[usize; 3], TraceError> {
    Ok([place(source, header, "HashOwner")?, place(source, header, "HashApp")?, place(source, header, "HashFunction")?])
}

fn read_durations<'a>(source: &Source<'a>) -> Result<HashMap<Function<'a>, Duration>, TraceError> {
    let header = header(source);
    let function = function_columns(source, &header)?;
    let average = place(source, &header, "Average")?;
    let mut percentiles: Vec<(f64, usize)> = header
        .iter()
        .filter_map(|(name, at)| Some((name.strip_prefix("percentile_Average_")?.parse().ok()?, *at)))
        .filter(|(percent, _)| *percent < PERCENT_MAX)
        .collect();
    percentiles.sort_by(|one, other| one.0.total_cmp(&other.0));
    by_function(source, function, |at, columns| {
        let average_ms = amount(source, at, column(source, at, columns, average, "Average")?, "Average")?;
        let mut known: Vec<(f64, f64)> = Vec::new();
        for (percent, column_at) in &percentiles {
            let name = format!("percentile_Average_{percent}");
            let value = amount(source, at, column(source, at, columns, *column_at, &name)?, &name)?;
            if known.last().is_some_and(|(_, before)| *before > value) {
                return Err(source.wrong(at, format!("{name} is {value}: less than the percentile before it")));
            }
            known.push((*percent, value));
        }
        Ok(Duration::new(average_ms, known))
    })
}

fn read_memory<'a>(source: &Source<'a>) -> Result<HashMap<Function<'a>, f64>, TraceError> {
    let header = header(source);
    let function = function_columns(source, &header)?;
    let average = place(source, &header, "AverageAllocatedMb")?;
    by_function(source, function, |at, columns| {
        let mib = column(source, at, columns, average, "AverageAllocatedMb")?;
        amount(source, at, mib, "AverageAllocatedMb")
    })
}

/// What `read` makes of each line's number and columns, by the function that the line is of.
fn by_function<'a, T>(
    source: &Source<'a>,
    function: [usize; 3],
    read: impl Fn(usize, &[&'a str]) -> Result<T, TraceError>,
) -> Result<HashMap<Function<'a>, T>, TraceError> {
    let mut found = HashMap::new();
    for (at, line) in source.text.lines().enumerate().skip(1).map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() {
            continue;
        }
        let columns: Vec<&str> = line.split(',').collect();
        let mut named = [""; 3];
        for (name, column_at) in named.iter_mut().zip(function) {
            *name = column(source, at, &columns, column_at, "a hash of the function")?;
        }
        found.insert(named, read(at, &columns)?);
    }
    Ok(found)
}

impl Duration {
    fn new(average_ms: f64, percentiles: Vec<(f64, f64)>) -> Self {
        let between = percentiles.windows(2).map(|pair| (pair[1].0 - pair[0].0) * (pair[0].1 + pair[1].1) / 2.0);
        let below = percentiles.first().map_or(0.0, |(percent, ms)| percent * ms);
        let above = percentiles.last().map_or(0.0, |(percent, ms)| (PERCENT_MAX - percent) * ms);
        let mean = (between.sum::<f64>() + below + above) / PERCENT_MAX;
        let correction = if mean > 0.0 { average_ms / mean } else { 1.0 };
        Self { average_ms, percentiles, correction }
    }

    fn draw(&self, rng: &mut Rng) -> Millis {
        let percent = rng.between(0, 100_000) as f64 / 1_000.0;
        let (Some(first), Some(last)) = (self.percentiles.first(), self.percentiles.last()) else {
            return whole_ms(self.average_ms);
        };
        let after = self.percentiles.iter().position(|(at, _)| *at > percent);
        let ms = match after {
            Some(0) => first.1,
            Some(at) => {
                let ((low, from), (high, to)) = (self.percentiles[at - 1], self.percentiles[at]);
                from + (to - from) * (percent - low) / (high - low)
            }
            None => last.1,
        };
        whole_ms(ms * self.correction)
    }
}

fn whole_ms(ms: f64) -> Millis {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
    Millis(ms.round() as u64)
}
