//! What a replay came to: hosts that were billed, room that was used, how long tasks waited, how often the size changed.

use muster_core::time::Millis;

/// Points of a plot over the whole span.
pub const BINS: usize = 480;

/// A replay's figures over a part of the trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// The part's length.
    pub span: Millis,
    /// Billed host time, from a host's order until it is gone.
    pub billed_ms: u64,
    /// Part of the billed capacity (of the scarcer of CPU and memory) that no task used, in thousandths.
    pub idle_permille: u64,
    /// Waits from a task's arrival to its start.
    pub waits: Waits,
    /// Moments at which the pool's size was changed; both directions at once are two.
    pub changes: u64,
    /// Hosts that were ordered.
    pub ordered: u64,
    /// The most hosts that were billed at once.
    pub peak_hosts: u32,
    /// Run time of attempts that ended before they were done.
    pub lost_ms: u64,
}

/// How long tasks waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// Tasks that arrived in the part.
    pub tasks: u64,
    /// The middle.
    pub p50: Millis,
    /// 99 of 100 waited no longer.
    pub p99: Millis,
    /// The longest.
    pub max: Millis,
    /// All of them together divided by their number.
    pub mean: Millis,
}

impl Figures {
    /// Billed host-hours.
    #[must_use]
    pub fn node_hours(&self) -> f64 {
        self.billed_ms as f64 / 3_600_000.0
    }

    /// Changes of size in an hour of the trace.
    #[must_use]
    pub fn changes_per_hour(&self) -> f64 {
        self.changes as f64 / (self.span.0 as f64 / 3_600_000.0).max(f64::MIN_POSITIVE)
    }
}

/// One point of a plot.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// Billed hosts, mean.
    pub hosts: f64,
    /// Hosts' worth of tasks that ran, mean.
    pub used: f64,
    /// The longest wait of a task that arrived then.
    pub wait: Millis,
}

/// Collects while the replay runs.
#[derive(Debug)]
pub struct Meter {
    span: Millis,
    split: Millis,
    halves: [Tally; 2],
    bins: Vec<Bin>,
    now: Millis,
    billed: u32,
    used_permille: u64,
    /// Wait of each task, by half.
    waits: [Vec<u32>; 2],
    last_change: [Option<Millis>; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    billed_ms: u64,
    /// Thousandths of a host, times milliseconds.
    used: u64,
    changes: u64,
    ordered: u64,
    peak: u32,
    lost_ms: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    billed_ms: u64,
    used: u64,
    wait: u64,
}

/// Which way a pool's size changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// More hosts.
    Out,
    /// Fewer.
    In,
}

impl Meter {
    /// A meter for a trace of this span, reported in two parts.
    #[must_use]
    pub fn new(span: Millis, split: Millis) -> Self {
        Self {
            span,
            split,
            halves: [Tally::default(); 2],
            bins: vec![Bin::default(); BINS],
            now: Millis(0),
            billed: 0,
            used_permille: 0,
            waits: [Vec::new(), Vec::new()],
            last_change: [None; 2],
        }
    }

    fn half(&self, at: Millis) -> usize {
        usize::from(at >= self.split)
    }

    fn bin(&self, at: Millis) -> usize {
        let bin = u128::from(at.0) * BINS as u128 / u128::from(self.span.0.max(1));
        usize::try_from(bin).map_or(BINS - 1, |bin| bin.min(BINS - 1))
    }

    fn bin_end(&self, bin: usize) -> u64 {
        let end = (bin as u128 + 1) * u128::from(self.span.0) / BINS as u128;
        u64::try_from(end).unwrap_or(u64::MAX)
    }

    /// Time passes with the numbers as they are. What comes after the trace's span is not counted.
    pub fn advance(&mut self, to: Millis) {
        let to = Millis(to.0.min(self.span.0));
        while self.now < to {
            let bin = self.bin(self.now);
            let mut until = to.0.min(self.bin_end(bin).max(self.now.0 + 1));
            if self.now < self.split {
                until = until.min(self.split.0);
            }
            let passed = until - self.now.0;
            let half = self.half(self.now);
            let (billed, used) = (u64::from(self.billed) * passed, self.used_permille * passed);
            self.halves[half].billed_ms += billed;
            self.halves[half].used += used;
            self.halves[half].peak = self.halves[half].peak.max(self.billed);
            self.bins[bin].billed_ms += billed;
            self.bins[bin].used += used;
            self.now = Millis(until);
        }
    }

    /// A host was ordered.
    pub fn ordered(&mut self) {
        let half = self.half(self.now);
        self.halves[half].ordered += 1;
        self.billed += 1;
    }

    /// A host is gone.
    pub const fn gone(&mut self) {
        self.billed = self.billed.saturating_sub(1);
    }

    /// Tasks on hosts take so many thousandths of one host now.
    pub const fn uses(&mut self, permille: u64) {
        self.used_permille = permille;
    }

    /// The size was changed; a second change in the same direction at the same moment is the same one.
    pub fn changed(&mut self, direction: Direction, at: Millis) {
        let last = &mut self.last_change[direction as usize];
        if *last != Some(at) && at < self.span {
            *last = Some(at);
            let half = self.half(at);
            self.halves[half].changes += 1;
        }
    }

    /// A task that arrived then waited so long.
    pub fn waited(&mut self, arrived: Millis, wait: Millis) {
        let half = self.half(arrived);
        self.waits[half].push(u32::try_from(wait.0).unwrap_or(u32::MAX));
        let bin = self.bin(arrived);
        self.bins[bin].wait = self.bins[bin].wait.max(wait.0);
    }

    /// An attempt ended that was not done.
    pub fn lost(&mut self, ran: Millis) {
        let half = self.half(self.now);
        self.halves[half].lost_ms += ran.0;
    }

    /// The figures of the first part, of the second, and of the whole.
    #[must_use]
    pub fn figures(mut self) -> ([Figures; 3], Vec<Point>) {
        self.advance(self.span);
        let [first, second] = self.halves;
        let whole = Tally {
            billed_ms: first.billed_ms + second.billed_ms,
            used: first.used + second.used,
            changes: first.changes + second.changes,
            ordered: first.ordered + second.ordered,
            peak: first.peak.max(second.peak),
            lost_ms: first.lost_ms + second.lost_ms,
        };
        let [early, late] = std::mem::take(&mut self.waits);
        let all = early.iter().chain(&late).copied().collect();
        let rest = Millis(self.span.0 - self.split.0.min(self.span.0));
        let figures = [
            figures(&first, early, Millis(self.split.0.min(self.span.0))),
            figures(&second, late, rest),
            figures(&whole, all, self.span),
        ];
        let points = (0..BINS).map(|bin| self.point(bin)).collect();
        (figures, points)
    }

    fn point(&self, at: usize) -> Point {
        let begun = if at == 0 { 0 } else { self.bin_end(at - 1) };
        let length = (self.bin_end(at) - begun).max(1) as f64;
        let bin = self.bins[at];
        Point { hosts: bin.billed_ms as f64 / length, used: bin.used as f64 / 1_000.0 / length, wait: Millis(bin.wait) }
    }
}

fn figures(tally: &Tally, mut waits: Vec<u32>, span: Millis) -> Figures {
    waits.sort_unstable();
    let at = |permille: usize| {
        let rank = (waits.len() * permille).div_ceil(1_000).max(1) - 1;
        Millis(waits.get(rank).copied().unwrap_or(0).into())
    };
    let sum: u64 = waits.iter().map(|wait| u64::from(*wait)).sum();
    let used_permille = (tally.used).checked_div(tally.billed_ms).unwrap_or(0).min(1_000);
    Figures {
        span,
        billed_ms: tally.billed_ms,
        idle_permille: if tally.billed_ms == 0 { 0 } else { 1_000 - used_permille },
        waits: Waits {
            tasks: waits.len() as u64,
            p50: at(500),
            p99: at(990),
            max: Millis(waits.last().copied().unwrap_or(0).into()),
            mean: Millis(sum.checked_div(waits.len() as u64).unwrap_or(0)),
        },
        changes: tally.changes,
        ordered: tally.ordered,
        peak_hosts: tally.peak,
        lost_ms: tally.lost_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_split_where_it_was_asked() {
        // A second for each point of the plot.
        let at = |second: u64| Millis(second * 1_000);
        let mut meter = Meter::new(at(480), at(200));
        meter.ordered();
        meter.uses(500);
        meter.advance(at(300));
        meter.changed(Direction::In, at(300));
        meter.changed(Direction::In, at(300));
        meter.uses(0);
        meter.gone();
        meter.waited(at(10), Millis(7));
        meter.waited(at(400), Millis(3));
        let ([first, second, whole], points) = meter.figures();
        assert_eq!((first.billed_ms, second.billed_ms, whole.billed_ms), (200_000, 100_000, 300_000));
        assert_eq!((first.changes, second.changes), (0, 1));
        assert_eq!((first.waits.max, second.waits.p50), (Millis(7), Millis(3)));
        assert_eq!(whole.idle_permille, 500);
        assert_eq!((points[299].hosts, points[300].hosts), (1.0, 0.0));
        assert_eq!((points[10].wait, points[400].wait), (Millis(7), Millis(3)));
    }

    #[test]
    fn a_percentile_is_one_of_the_waits() {
        let mut meter = Meter::new(Millis(1_000), Millis(1_000));
        for wait in 1..=200 {
            meter.waited(Millis(0), Millis(wait));
        }
        let ([_, _, whole], _) = meter.figures();
        assert_eq!((whole.waits.p50, whole.waits.p99, whole.waits.max), (Millis(100), Millis(198), Millis(200)));
    }
}
