//! Requests in each interval: `timestamp,value`, as the Numenta Anomaly Benchmark has it. An interval lasts until the
//! next line's time, the last one as long as the one before. Requests fall anywhere in theirs; how long one runs is not
//! in the trace.

use muster_core::time::{Millis, Timestamp};

use super::{
    Assumptions, Source, TraceError,
    fields::{amount, column, time},
};
use crate::{
    replay::workload::{Arrival, Workload},
    rng::Rng,
};

/// An interval that follows a gap in the log is no longer than this many times the usual.
const GAP: u64 = 2;

pub(super) fn read(
    source: &Source<'_>,
    assumptions: &Assumptions,
) -> Result<(Workload, Option<Timestamp>), TraceError> {
    let mut counts: Vec<(u64, f64)> = Vec::new();
    for (at, line) in source.text.lines().enumerate().skip(1).map(|(at, line)| (at + 1, line.trim())) {
        if line.is_empty() {
            continue;
        }
        let columns: Vec<&str> = line.split(',').collect();
        let when = time(source, at, column(source, at, &columns, 0, "timestamp")?)?;
        let count = amount(source, at, column(source, at, &columns, 1, "value")?, "value")?;
        if let Some((before, _)) = counts.last()
            && when <= *before
        {
            return Err(source.wrong(at, "its time is not later than the line's before it"));
        }
        counts.push((when, count));
    }
    if counts.len() < 2 {
        return Err(source.wrong_as_a_whole("it needs two intervals at least: their distance is their length"));
    }
    let mut lengths: Vec<u64> = counts.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    lengths.push(lengths[lengths.len() - 1]);
    let mut sorted = lengths.clone();
    sorted.sort_unstable();
    let usual = sorted[sorted.len() / 2];
    let first = counts[0].0;
    let mut rng = Rng::new(assumptions.seed);
    let mut scale = Scale::new(assumptions.scale_permille);
    let mut arrivals = Vec::new();
    for ((when, count), length) in counts.iter().zip(lengths) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
        let tasks = scale.of((*count).round() as u64);
        if arrivals.len() as u64 + u64::from(tasks) > super::TASKS_MAX {
            return Err(source.wrong_as_a_whole(format!("more than {} requests; use --scale", super::TASKS_MAX)));
        }
        for _ in 0..tasks {
            let at = Millis(when - first + rng.between(0, length.min(usual * GAP)));
            arrivals.push(Arrival {
                at,
                run: assumptions.service,
                cpu_milli: assumptions.cpu_milli,
                memory_mib: assumptions.memory_mib,
                tasks: 1,
            });
        }
    }
    Ok((Workload::new(arrivals), Some(Timestamp(first))))
}

/// Multiplies numbers by a part and carries what is left over, so that the sum is right.
pub(super) struct Scale {
    permille: u64,
    left: u64,
}

impl Scale {
    pub(super) const fn new(permille: u64) -> Self {
        Self { permille, left: 0 }
    }

    pub(super) fn of(&mut self, count: u64) -> u32 {
        let scaled = count.saturating_mul(self.permille).saturating_add(self.left);
        self.left = scaled % 1_000;
        u32::try_from(scaled / 1_000).unwrap_or(u32::MAX)
    }
}
