//! Traces that nobody recorded, for what recorded ones do not show: each shape by itself, as large as its seed says.
//! Arrivals are a Poisson process whose rate follows the shape; runs are spread evenly between a half and one and a half
//! times their mean.

use muster_core::time::Millis;

use super::{
    models,
    workload::{Arrival, Workload},
};
use crate::rng::Rng;

/// A shape of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Levels that hold for half an hour each: 4, 40, 12, 80, 4 tasks at once.
    Steps,
    /// A low level, and every 20 to 60 minutes three minutes of ten to thirty times that.
    Spikes,
    /// From nothing up to 100 tasks at once and down again, over four hours.
    Ramp,
    /// Five minutes of 40 tasks at once, five minutes of nothing.
    OnOff,
    /// Three weeks: a hump each working day, little at night, less at weekends.
    Weekends,
    /// An array of 200 tasks at once every half hour, and nothing between.
    Batches,
    /// A constant rate.
    Steady,
    /// Three weeks of a machine of 128 processors: jobs of many sizes and lengths, by a model of recorded logs.
    BatchJobs,
    /// Four days of tasks of a minute that come in bursts of every length, by a model of recorded traffic.
    SelfSimilar,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Steps,
        Self::Spikes,
        Self::Ramp,
        Self::OnOff,
        Self::Weekends,
        Self::Batches,
        Self::Steady,
        Self::BatchJobs,
        Self::SelfSimilar,
    ];

    /// The word of the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::Spikes => "spikes",
            Self::Ramp => "ramp",
            Self::OnOff => "on-off",
            Self::Weekends => "weekends",
            Self::Batches => "batches",
            Self::Steady => "steady",
            Self::BatchJobs => "batch-jobs",
            Self::SelfSimilar => "self-similar",
        }
    }
}

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = Self::ALL.iter().map(|shape| shape.name()).collect();
        let known = Self::ALL.into_iter().find(|shape| shape.name() == text);
        known.ok_or_else(|| format!("there is no shape `{text}`; known are {}", names.join(", ")))
    }
}

/// Makes a trace.
#[must_use]
pub fn synthetic(shape: Shape, seed: u64, cpu_milli: u32, memory_mib: u32) -> Workload {
    let mut rng = Rng::new(seed);
    let mut spike = Spike { from: rng.between(5, 30), until: 0, level: 0 };
    let rng = &mut rng;
    let tasks = match shape {
        Shape::Steps => flow(5 * 60, 20, rng, |minute, _| [4, 40, 12, 80, 4][index(minute / 30 % 5)]),
        Shape::Spikes => flow(DAY, 5, rng, |minute, rng| spike.level(minute, rng)),
        Shape::Ramp => flow(8 * 60, 20, rng, |minute, _| {
            let of_ramp = minute % 240;
            of_ramp.min(240 - of_ramp) * 100 / 120
        }),
        Shape::OnOff => flow(8 * 60, 20, rng, |minute, _| if (minute / 5).is_multiple_of(2) { 40 } else { 0 }),
        Shape::Weekends => flow(21 * DAY, 300, rng, |minute, _| week(minute)),
        Shape::Batches => batches(8 * 60, 90, rng),
        Shape::Steady => flow(8 * 60, 5, rng, |_, _| 40),
        Shape::BatchJobs => models::rigid_jobs(Millis(21 * DAY * MINUTE_MS), 128, rng),
        Shape::SelfSimilar => {
            let volumes = models::b_model(120_000.0, 0.7, index(4 * DAY), rng);
            flow(4 * DAY, 60, rng, |minute, _| volumes[index(minute)])
        }
    };
    let arrival = |Task { at, run, tasks }| Arrival { at, run, cpu_milli, memory_mib, tasks };
    Workload::new(tasks.into_iter().map(arrival).collect())
}

const MINUTE_MS: u64 = 60_000;
/// In minutes.
const DAY: u64 = 24 * 60;

/// What comes at once: so many tasks, each so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) at: Millis,
    pub(super) run: Millis,
    pub(super) tasks: u32,
}

/// Single tasks of about so many seconds, of which `level` run at once, minute by minute.
fn flow(minutes: u64, run_seconds: u64, rng: &mut Rng, mut level: impl FnMut(u64, &mut Rng) -> u64) -> Vec<Task> {
    let mean_ms = run_seconds * 1_000;
    let mut tasks = Vec::new();
    for minute in 0..minutes {
        // By Little's law: so many at once, each so long.
        let expected = level(minute, rng) as f64 * MINUTE_MS as f64 / mean_ms as f64;
        for _ in 0..poisson(expected, rng) {
            let at = Millis(minute * MINUTE_MS + rng.between(0, MINUTE_MS));
            tasks.push(Task { at, run: Millis(mean_ms / 2 + rng.between(0, mean_ms)), tasks: 1 });
        }
    }
    tasks
}

/// 200 tasks at once, every half hour.
fn batches(minutes: u64, run_seconds: u64, rng: &mut Rng) -> Vec<Task> {
    let mean_ms = run_seconds * 1_000;
    (0..minutes)
        .filter(|minute| minute % 30 == 10)
        .map(|minute| {
            let run = Millis(mean_ms / 2 + rng.between(0, mean_ms));
            Task { at: Millis(minute * MINUTE_MS), run, tasks: 200 }
        })
        .collect()
}

struct Spike {
    from: u64,
    until: u64,
    level: u64,
}

impl Spike {
    fn level(&mut self, minute: u64, rng: &mut Rng) -> u64 {
        if minute == self.from {
            self.level = 4 * rng.between(10, 31);
            self.until = minute + 3;
            self.from = minute + rng.between(20, 61);
        }
        if minute < self.until { self.level } else { 4 }
    }
}

fn week(minute: u64) -> u64 {
    let (day, hour) = (minute / DAY % 7, minute / 60 % 24);
    let peak = if day < 5 { 120 } else { 15 };
    let part = [3, 2, 2, 2, 3, 5, 10, 25, 60, 90, 100, 100, 80, 90, 100, 95, 80, 60, 40, 25, 15, 10, 6, 4];
    peak * part[index(hour)] / 100
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// A Poisson number; by a sum of uniform ones where the mean is large, which is near enough there.
fn poisson(mean: f64, rng: &mut Rng) -> u64 {
    let mut uniform = || rng.between(1, 1 << 53) as f64 / (1u64 << 53) as f64;
    if mean > 200.0 {
        // The sum of twelve uniform numbers less six has mean 0 and variance 1.
        let normal = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float's cast saturates")]
        return (mean + normal * mean.sqrt()).round() as u64;
    }
    let limit = (-mean).exp();
    let mut product = uniform();
    let mut count = 0;
    while product > limit {
        product *= uniform();
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_has_the_load_that_it_says() {
        for shape in Shape::ALL {
            let workload = synthetic(shape, 7, 1_000, 256);
            assert_eq!(synthetic(shape, 7, 1_000, 256), workload, "the same seed is the same trace");
            assert!(workload.tasks() > 1_000, "{}: {} tasks", shape.name(), workload.tasks());
        }
        let steady = synthetic(Shape::Steady, 1, 1_000, 256);
        let work: u64 = steady.arrivals.iter().map(|arrival| arrival.run.0).sum();
        let at_once = work as f64 / steady.span().0 as f64;
        assert!((at_once - 40.0).abs() < 1.0, "{at_once}");
    }
}
