//! All rules on one trace, side by side: what each came to, against the oracle, and whether that is within bounds.

use std::thread;

use muster_core::{
    policy::{PoolPolicy, Preset},
    time::Millis,
};

use super::{
    measure::{BINS, Figures, Point, Waits},
    oracle::{self, Level, Plan},
    rules::{Concurrency, Rule},
    workload::Workload,
    world::{self, Conditions, Outcome},
};

/// The rules that a policy is compared with, by the words of the command line.
pub const RIVALS: [&str; 5] = ["thresholds", "concurrency", "concurrency-70", "concurrency-delay", "fixed-peak"];
/// Below how much a concurrency rule with a delay does not go for how long.
const DELAY: Millis = Millis::from_secs(300);

/// One rule's results.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its word.
    pub name: String,
    /// Of the first part, the second, the whole.
    pub figures: [Figures; 3],
    /// Over the whole span.
    pub points: Vec<Point>,
}

/// All rules on one trace.
#[derive(Clone, Debug)]
pub struct Report {
    /// Tasks of the trace.
    pub tasks: u64,
    /// Its span.
    pub span: Millis,
    /// Hosts that its demand needs at its highest.
    pub peak: u32,
    /// The policy first, then its rivals, then the oracle.
    pub rows: Vec<Row>,
    /// Hosts that the demand needs, for plots.
    pub demand: Vec<f64>,
}

/// Plays a workload under a policy and the named rivals, on as many threads. Tells `progress` how far each is: its place (0 is
/// the policy, then the rivals in their order) and thousandths of the trace, as [`world::play`] does.
///
/// # Errors
/// A sentence that names the rule that came to nothing.
pub fn compare(
    workload: &Workload,
    policy: &PoolPolicy,
    rivals: &[String],
    conditions: Conditions,
    threads: usize,
    progress: &(dyn Fn(usize, u64) + Sync),
) -> Result<Report, String> {
    let levels = oracle::demand(workload, &policy.host.capacity());
    let peak = oracle::peak(&levels);
    let mut rules = vec![(String::from("policy"), Rule::Policy(Box::new(policy.clone())))];
    for rival in rivals {
        rules.push((rival.clone(), rule(rival, policy, peak)?));
    }
    let mut outcomes: Vec<Option<Result<Outcome, String>>> = rules.iter().map(|_| None).collect();
    let mut jobs: Vec<_> = rules.iter().zip(&mut outcomes).enumerate().collect();
    for chosen in jobs.chunks_mut(threads.max(1)) {
        thread::scope(|scope| {
            for (at, ((_, rule), place)) in chosen {
                let tell = |played| progress(*at, played);
                scope.spawn(move || **place = Some(world::play(workload, policy, rule, conditions, &tell)));
            }
        });
    }
    let mut rows = Vec::new();
    for ((name, _), outcome) in rules.into_iter().zip(outcomes) {
        let outcome = outcome.unwrap_or_else(|| Err(String::from("was not played")));
        let Outcome { first, second, whole, points, .. } = outcome.map_err(|why| format!("{name}: {why}"))?;
        rows.push(Row { name, figures: [first, second, whole], points });
    }
    let span = workload.span();
    let plan = oracle::plan(&levels, conditions.boot, conditions.stop);
    rows.push(oracle_row(workload, &plan, policy, conditions));
    Ok(Report { tasks: workload.tasks(), span, peak, rows, demand: drawn(&levels, span) })
}

fn rule(name: &str, policy: &PoolPolicy, peak: u32) -> Result<Rule, String> {
    let concurrency = |target_permille, scale_in_delay| {
        Rule::Concurrency(Concurrency {
            stable: Millis::from_secs(60),
            panic: Millis::from_secs(6),
            panic_permille: 2_000,
            target_permille,
            scale_in_delay,
            min: policy.min,
            max: policy.max,
        })
    };
    match name {
        "thresholds" => {
            // Its metrics are of nodes: from none it would never begin. One is the preset's own minimum.
            let thresholds = PoolPolicy { preset: Preset::Thresholds, min: policy.min.max(1), ..plain(policy) };
            Ok(Rule::Policy(Box::new(thresholds)))
        }
        "demand" => Ok(Rule::Policy(Box::new(PoolPolicy { preset: Preset::Demand, ..plain(policy) }))),
        "concurrency" => Ok(concurrency(1_000, Millis(0))),
        "concurrency-70" => Ok(concurrency(700, Millis(0))),
        "concurrency-delay" => Ok(concurrency(1_000, DELAY)),
        "fixed-peak" => Ok(Rule::Fixed(peak.min(policy.max))),
        other => Err(format!("there is no rule `{other}`; known are demand, {}", RIVALS.join(", "))),
    }
}

/// The same pool without rules of its own.
fn plain(policy: &PoolPolicy) -> PoolPolicy {
    PoolPolicy {
        scale_out: Vec::new(),
        scale_in: None,
        schedule: Vec::new(),
        cost: None,
        max_draining: None,
        ..policy.clone()
    }
}

/// Nobody waits, by definition.
fn oracle_row(workload: &Workload, plan: &Plan, policy: &PoolPolicy, conditions: Conditions) -> Row {
    let span = workload.span();
    let split = conditions.split_of(span);
    let parts = [(Millis(0), split), (split, span), (Millis(0), span)];
    let figures = parts.map(|(from, to)| {
        let billed_ms = plan.billed_ms(from, to);
        let used = used_permille_ms(workload, policy, from, to);
        let arrived = workload.arrivals.iter().filter(|arrival| arrival.at >= from && (arrival.at < to || to == span));
        Figures {
            span: Millis(to.0 - from.0),
            billed_ms,
            idle_permille: 1_000u64.saturating_sub(used.checked_div(billed_ms).unwrap_or(1_000)),
            waits: Waits { tasks: arrived.map(|arrival| u64::from(arrival.tasks)).sum(), ..Waits::default() },
            changes: plan.changes(from, to),
            ordered: plan.ordered(from, to),
            peak_hosts: 0,
            lost_ms: 0,
        }
    });
    Row { name: String::from("oracle"), figures, points: Vec::new() }
}

/// Thousandths of a host times milliseconds that the tasks take, if none waits.
fn used_permille_ms(workload: &Workload, policy: &PoolPolicy, from: Millis, to: Millis) -> u64 {
    let host = policy.host.capacity();
    let mut used = 0;
    for arrival in &workload.arrivals {
        let end = (arrival.at + arrival.run).0.min(to.0);
        let ran = end.saturating_sub(arrival.at.0.max(from.0)) * u64::from(arrival.tasks);
        let request = arrival.request();
        let part = |taken: u64, have: u64| (taken * 1_000).checked_div(have).unwrap_or(0);
        let permille = part(request.cpu_milli, host.cpu_milli).max(part(request.memory_bytes, host.memory_bytes));
        used += ran * permille;
    }
    used
}

/// The most that each point's time needs.
fn drawn(levels: &[Level], span: Millis) -> Vec<f64> {
    let mut drawn = vec![0.0; BINS];
    let bin = |at: u64| {
        let bin = u128::from(at) * BINS as u128 / u128::from(span.0.max(1));
        usize::try_from(bin).map_or(BINS - 1, |bin| bin.min(BINS - 1))
    };
    for (at, level) in levels.iter().enumerate() {
        let end = levels.get(at + 1).map_or(span.0, |next| next.at.0);
        for point in drawn.iter_mut().take(bin(end) + 1).skip(bin(level.at.0)) {
            *point = f64::max(*point, f64::from(level.hosts));
        }
    }
    drawn
}

/// What a policy may come to at most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// Wait of 99 of 100 tasks.
    pub p99_wait: Option<Millis>,
    /// Node-hours, in those of the oracle.
    pub node_hours_ratio: Option<f64>,
    /// Changes of size in an hour.
    pub changes_per_hour: Option<f64>,
    /// Run time of work that was lost.
    pub work_lost: Option<Millis>,
}

impl Report {
    /// Node-hours of a row in those of the oracle, of one part.
    #[must_use]
    pub fn ratio(&self, row: &Row, part: usize) -> f64 {
        let oracle = self.rows.last().map_or(0.0, |oracle| oracle.figures[part].node_hours());
        row.figures[part].node_hours() / oracle.max(f64::MIN_POSITIVE)
    }

    /// Rivals that are at least as good as the policy in node-hours, p99 wait and changes together, and better in one.
    /// The oracle is none: it sees the future.
    #[must_use]
    pub fn better_than_the_policy(&self, part: usize) -> Vec<&str> {
        let key = |row: &Row| {
            let figures = &row.figures[part];
            (figures.billed_ms, figures.waits.p99, figures.changes)
        };
        let Some(own) = self.rows.first().map(key) else { return Vec::new() };
        let rivals = self.rows.iter().skip(1).filter(|row| row.name != "oracle");
        let better = rivals.filter(|row| {
            let theirs = key(row);
            theirs.0 <= own.0 && theirs.1 <= own.1 && theirs.2 <= own.2 && theirs != own
        });
        better.map(|row| row.name.as_str()).collect()
    }

    /// A sentence for each bound that the policy breaks, in one part.
    #[must_use]
    pub fn broken(&self, bounds: &Bounds, part: usize) -> Vec<String> {
        let Some(row) = self.rows.first() else { return Vec::new() };
        let figures = &row.figures[part];
        let mut broken = Vec::new();
        if let Some(most) = bounds.p99_wait.filter(|most| figures.waits.p99 > *most) {
            broken.push(format!("99 of 100 tasks wait up to {}, and {most} is allowed", figures.waits.p99));
        }
        let ratio = self.ratio(row, part);
        if let Some(most) = bounds.node_hours_ratio.filter(|most| ratio > *most) {
            broken.push(format!("it takes {ratio:.2} times the oracle's node-hours, and {most} is allowed"));
        }
        let changes = figures.changes_per_hour();
        if let Some(most) = bounds.changes_per_hour.filter(|most| changes > *most) {
            broken.push(format!("its size changes {changes:.1} times an hour, and {most} is allowed"));
        }
        if let Some(most) = bounds.work_lost.filter(|most| figures.lost_ms > most.0) {
            broken.push(format!("work of {} is lost, and {most} is allowed", Millis(figures.lost_ms)));
        }
        broken
    }
}
