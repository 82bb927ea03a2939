//! Traces that nobody recorded, for what recorded ones do not show: each shape by itself, as large as its seed says.
//! Arrivals are a Poisson process whose rate follows the shape; runs are spread evenly between a half and one and a half
//! times their mean.

use muster_core::time::Millis;

use super::workload::{Arrival, Workload};
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
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Steps, Self::Spikes, Self::Ramp, Self::OnOff, Self::Weekends, Self::Batches, Self::Steady];

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
        }
    }

    /// How long the trace is.
    const fn span_minutes(self) -> u64 {
        match self {
            Self::Steps => 5 * 60,
            Self::Spikes => 24 * 60,
            Self::Ramp => 2 * 4 * 60,
            Self::OnOff | Self::Batches | Self::Steady => 8 * 60,
            Self::Weekends => 21 * 24 * 60,
        }
    }

    /// Mean seconds of a run.
    const fn run_seconds(self) -> u64 {
        match self {
            Self::Steps | Self::Ramp | Self::OnOff => 20,
            Self::Spikes | Self::Steady => 5,
            Self::Weekends => 300,
            Self::Batches => 90,
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
    let mut arrivals = Vec::new();
    let mut spike = Spike { from: rng.between(5, 30), until: 0, level: 0 };
    for minute in 0..shape.span_minutes() {
        let mean_ms = shape.run_seconds() * 1_000;
        let level = level(shape, minute, &mut spike, &mut rng);
        if shape == Shape::Batches {
            if level > 0 {
                let run = Millis(mean_ms / 2 + rng.between(0, mean_ms));
                let tasks = u32::try_from(level).unwrap_or(u32::MAX);
                arrivals.push(Arrival { at: Millis(minute * 60_000), run, cpu_milli, memory_mib, tasks });
            }
            continue;
        }
        // By Little's law: so many at once, each so long.
        let expected = level as f64 * 60_000.0 / mean_ms as f64;
        for _ in 0..poisson(expected, &mut rng) {
            let at = Millis(minute * 60_000 + rng.between(0, 60_000));
            let run = Millis(mean_ms / 2 + rng.between(0, mean_ms));
            arrivals.push(Arrival { at, run, cpu_milli, memory_mib, tasks: 1 });
        }
    }
    Workload::new(arrivals)
}

struct Spike {
    from: u64,
    until: u64,
    level: u64,
}

/// Tasks at once, in that minute.
fn level(shape: Shape, minute: u64, spike: &mut Spike, rng: &mut Rng) -> u64 {
    match shape {
        Shape::Steps => [4, 40, 12, 80, 4][usize::try_from(minute / 30 % 5).unwrap_or(0)],
        Shape::Spikes => {
            if minute == spike.from {
                spike.level = 4 * rng.between(10, 31);
                spike.until = minute + 3;
                spike.from = minute + rng.between(20, 61);
            }
            if minute < spike.until { spike.level } else { 4 }
        }
        Shape::Ramp => {
            let of_ramp = minute % 240;
            if of_ramp < 120 { of_ramp * 100 / 120 } else { (240 - of_ramp) * 100 / 120 }
        }
        Shape::OnOff => {
            if (minute / 5).is_multiple_of(2) {
                40
            } else {
                0
            }
        }
        Shape::Weekends => {
            let (day, hour) = (minute / 1_440 % 7, minute / 60 % 24);
            let peak = if day < 5 { 120 } else { 15 };
            let part = [3, 2, 2, 2, 3, 5, 10, 25, 60, 90, 100, 100, 80, 90, 100, 95, 80, 60, 40, 25, 15, 10, 6, 4];
            peak * part[usize::try_from(hour).unwrap_or(0)] / 100
        }
        Shape::Batches => {
            if minute % 30 == 10 {
                200
            } else {
                0
            }
        }
        Shape::Steady => 40,
    }
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
