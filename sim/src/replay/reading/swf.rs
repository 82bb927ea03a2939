//! Standard Workload Format 2.2 (Chapin and others, JSSPP 1999; the Parallel Workloads Archive): `;` header lines,
//! then a line of 18 numbers for each job, -1 for what is not known.
//!
//! A job of P processors becomes an array of tasks that arrive together and run as long as it did. What is not known
//! or was never run is skipped and counted.

use muster_core::time::{Millis, Timestamp};

use super::{Assumptions, Source, TraceError, fields::whole};
use crate::replay::workload::{Arrival, Workload};

/// Fields of a job's line.
pub(super) const FIELDS: usize = 18;
/// Later or longer than this is taken for an error.
const SECONDS_MAX: i64 = 50 * 366 * 86_400;

pub(super) fn read(
    source: &Source<'_>,
    assumptions: &Assumptions,
) -> Result<(Workload, Option<Timestamp>), TraceError> {
    let mut arrivals = Vec::new();
    let mut unknown = 0;
    let mut begins = None;
    for (at, line) in source.text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
        if let Some(header) = line.strip_prefix(';') {
            if let Some(seconds) = header.trim().strip_prefix("UnixStartTime:") {
                begins = seconds.trim().parse::<u64>().ok().map(|seconds| Timestamp(seconds * 1_000));
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.len() != FIELDS {
            return Err(source.wrong(at, format!("a job has {FIELDS} fields, and the line has {}", fields.len())));
        }
        match job(source, at, &fields, assumptions)? {
            Some(arrival) => arrivals.push(arrival),
            None => unknown += 1,
        }
    }
    let first = arrivals.iter().map(|arrival: &Arrival| arrival.at).min().unwrap_or_default();
    for arrival in &mut arrivals {
        arrival.at = Millis(arrival.at.0 - first.0);
    }
    let mut workload = Workload::new(arrivals);
    if unknown > 0 {
        workload.skipped.push((String::from("jobs without run time or processors"), unknown));
    }
    Ok((workload, begins.map(|begins| begins + first)))
}

fn job(
    source: &Source<'_>,
    line: usize,
    fields: &[&str],
    assumptions: &Assumptions,
) -> Result<Option<Arrival>, TraceError> {
    let field = |at: usize, name: &str| whole(source, line, fields[at - 1], name);
    let submit = field(2, "field 2 (submit time)")?;
    let run = field(4, "field 4 (run time)")?;
    let allocated = field(5, "field 5 (processors)")?;
    let requested = field(8, "field 8 (requested processors)")?;
    let memory_kib = field(10, "field 10 (requested memory)")?;
    if !(0..SECONDS_MAX).contains(&submit) {
        return Err(
            source.wrong(line, format!("field 2 (submit time) is {submit}: it must be from 0 s up to 50 years"))
        );
    }
    if run >= SECONDS_MAX {
        return Err(source.wrong(line, format!("field 4 (run time) is {run} s: that is longer than 50 years")));
    }
    let processors = if allocated > 0 { allocated } else { requested };
    let (Ok(run), Ok(processors @ 1..)) = (u64::try_from(run), u32::try_from(processors)) else { return Ok(None) };
    let cores = processors.min(assumptions.task_cores.max(1));
    let tasks = u64::from(processors.div_ceil(cores)) * assumptions.scale_permille / 1_000;
    let memory = u64::try_from(memory_kib).unwrap_or(0).saturating_mul(cores.into()) >> 10;
    Ok(Some(Arrival {
        at: Millis::from_secs(submit.unsigned_abs()),
        run: Millis::from_secs(run),
        cpu_milli: cores.saturating_mul(1_000),
        memory_mib: u32::try_from(memory).unwrap_or(u32::MAX).max(assumptions.memory_mib),
        tasks: u32::try_from(tasks.max(1)).unwrap_or(u32::MAX),
    }))
}
