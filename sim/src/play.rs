//! Many seeds on many threads: each seed is a world of its own, so what comes
//! out is the same whatever the number of threads.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use muster_core::time::Millis;

use crate::{
    coverage::Coverage,
    setup::{Fault, Setup},
    trace::Trace,
    truth::Violation,
    world,
};

/// What many runs came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds that were played.
    pub seeds: u64,
    /// Steps of all worlds.
    pub steps: u64,
    /// Starts of user code.
    pub starts: u64,
    /// Virtual time of all runs together.
    pub simulated: Millis,
    /// How often each thing occurred.
    pub coverage: Coverage,
    /// The lowest seed that failed, of those that were played.
    pub failure: Option<Failure>,
}

/// A seed that broke a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What it played: as asked, or a smaller world that fails as well.
    pub setup: Setup,
    /// What was broken.
    pub violation: Violation,
}

/// How far many seeds are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Seeds that were played.
    pub seeds: u64,
    /// Those of them that broke a promise.
    pub violations: u64,
}

impl Summary {
    fn join(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.starts += other.starts;
        self.simulated = self.simulated + other.simulated;
        self.coverage.join(&other.coverage);
        self.failure = match (self.failure.take(), other.failure) {
            (Some(mine), Some(theirs)) => Some(if theirs.seed < mine.seed { theirs } else { mine }),
            (one, another) => one.or(another),
        };
    }
}

/// Plays the seeds `first`, `first + 1`, ... until one fails, at most `count`. Tells `progress` how far it is
/// after each.
#[must_use]
pub fn play_all(first: u64, count: u64, threads: usize, setup: Setup, progress: &(dyn Fn(Progress) + Sync)) -> Summary {
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let violations = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let work = || {
        let mut summary = Summary::default();
        while !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            let seed = first + at;
            match world::run(seed, setup) {
                Ok(outcome) => {
                    summary.seeds += 1;
                    summary.steps += outcome.steps;
                    summary.starts += outcome.starts;
                    summary.simulated = summary.simulated + outcome.elapsed;
                    summary.coverage.join(&outcome.coverage);
                }
                Err(violation) => {
                    summary.seeds += 1;
                    failed.store(true, Ordering::Relaxed);
                    violations.fetch_add(1, Ordering::Relaxed);
                    summary.failure = Some(Failure { seed, setup, violation });
                }
            }
            let seeds = done.fetch_add(1, Ordering::Relaxed) + 1;
            progress(Progress { seeds, violations: violations.load(Ordering::Relaxed) });
        }
        summary
    };
    let mut whole = Summary::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            // A panic of a world is a bug of the rules: it stops the run like any other.
            whole.join(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    whole
}

/// A smaller world in which the same seed breaks the same promise, if a few tries find one.
#[must_use]
pub fn shrink(failure: &Failure) -> Failure {
    let mut best = failure.clone();
    let try_setup = |best: &mut Failure, setup: Setup| {
        if let Err(violation) = world::run(best.seed, setup)
            && violation.promise == best.violation.promise
        {
            *best = Failure { setup, violation, ..*best };
        }
    };
    for fault in Fault::ALL {
        let setup = Setup { faults: best.setup.faults.without(*fault), ..best.setup };
        try_setup(&mut best, setup);
    }
    for jobs in [best.setup.jobs / 8, best.setup.jobs / 4, best.setup.jobs / 2] {
        let setup = Setup { jobs, ..best.setup };
        if jobs < best.setup.jobs {
            try_setup(&mut best, setup);
        }
    }
    for hosts in 1..best.setup.hosts {
        let setup = Setup { hosts, ..best.setup };
        if hosts < best.setup.hosts {
            try_setup(&mut best, setup);
        }
    }
    best
}

/// Plays a seed again and returns the last lines of what happened, the hash over all lines, and how it ended.
#[must_use]
pub fn trace(seed: u64, setup: Setup, lines: usize) -> (Vec<String>, u64, Option<Violation>) {
    let (result, trace) = world::play(seed, setup, Trace::last(lines));
    let hash = trace.hash();
    (trace.into_lines(), hash, result.err())
}
