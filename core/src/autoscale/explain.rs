//! Why a pool has the size that it has: the same words in history, log,
//! `muster pool explain` and dashboard (FL-14).

use alloc::{format, string::String, vec::Vec};

use super::{
    Ask, AskKind, AskState, Decision, FRESH_PERCENT, Going, GoingWhy, Limits, PoolView, Reading, Soonest, asks, decide,
    disruption_left, going, most_wanted, victims,
};
use crate::{
    policy::{Metric, PERCENT, PoolPolicy, Preset, ProviderKind, ScaleOut},
    time::{Millis, Timestamp},
};

/// Kept hosts that are named.
const KEPT_NAMED: usize = 3;

/// What the scaler looks at now, a line each: its label, then the sentence.
#[must_use]
pub fn explain(policy: &PoolPolicy, view: &PoolView) -> Vec<String> {
    let limits = Limits::of(policy, view);
    let asks = asks(policy, view, &limits);
    let mut lines = Vec::new();
    let mut line = |label: &str, text: String| lines.push(format!("{label:<11} {text}"));
    if let Some(reason) = &view.stopped {
        line("paused", format!("by an operator: {reason}; `muster pool resume` goes on"));
    }
    if let Some(reason) = &view.paused {
        let when = view.trial_at.map_or(Millis(0), |at| at.since(view.at));
        line("paused", format!("{reason}; one is tried in {when}, or at once by `muster pool resume`"));
    }
    if let Some(pinned) = view.pin_in_force() {
        let until =
            pinned.until.map_or_else(|| String::from("until resumed"), |at| format!("for {}", at.since(view.at)));
        line("size", format!("{} by an operator, {until}", pinned.size));
    }
    for ask in &asks {
        match ask.kind {
            AskKind::Minimum => {}
            AskKind::Demand => line("demand", demand_text(view)),
            AskKind::Rule(rule, since) => line("rule", rule_text(view, &rule, since, ask.state)),
        }
    }
    line("limits", limits_text(policy, view, &limits));
    line("scale-out", scale_out_text(policy, view, &limits, &asks));
    line("scale-in", scale_in_text(policy, view, &limits, &asks));
    if !view.asleep.is_empty() {
        let who = policy.wake.as_ref().map_or_else(
            || String::from("the policy has no `wake`: a person starts them"),
            |program| format!("`{program}` wakes them"),
        );
        line("asleep", format!("{} hosts; {who}", view.asleep.len()));
    }
    if !view.kept.is_empty() {
        let named: Vec<&str> = view.kept.iter().take(KEPT_NAMED).map(String::as_str).collect();
        line("kept", format!("{} hosts by their provider: {}", view.kept.len(), named.join(", ")));
    }
    line("metrics", metrics_text(view));
    line("hosts boot", format!("in {} as measured, at most {}", view.boot, policy.boot_deadline));
    lines
}

/// The numbers that a decision was made of, for its line in the history.
#[must_use]
pub fn inputs(view: &PoolView) -> String {
    let asleep = match view.asleep.len() {
        0 => String::new(),
        asleep => format!(", {asleep} asleep"),
    };
    format!(
        "supply {} ({} booting), {} hosts counted, {} draining, {} idle{asleep}; {}; {}",
        view.supply,
        view.booting,
        view.hosts,
        view.draining,
        view.idle.len(),
        demand_text(view),
        metrics_text(view)
    )
}

pub(super) fn out_reason(view: &PoolView, ask: &Ask, limits: &Limits) -> String {
    let mut reason = match ask.kind {
        AskKind::Minimum => format!("{} hosts are fewer than min {}", view.supply, limits.min),
        AskKind::Demand => demand_text(view),
        AskKind::Rule(rule, since) => {
            let held = since.map_or(Millis(0), |since| view.at.since(since));
            format!("{} > {} for {held}", reading_text(view, rule.metric), value_text(rule.metric, rule.above))
        }
    };
    if let AskState::Wants(size) = ask.state
        && size > limits.cap()
    {
        let cut = if limits.affordable < limits.max { "the budget" } else { "max" };
        reason.push_str(&format!("; {size} are asked, {cut} allows {}", limits.cap()));
    }
    reason
}

pub(super) fn in_reason(view: &PoolView, going: &Going) -> String {
    match &going.why {
        GoingWhy::Excess(cap) => format!("{} hosts are more than the {cap} that may be", view.supply),
        GoingWhy::Demand(target) => format!("{} hosts are more than {target}: {}", view.supply, demand_text(view)),
        GoingWhy::Rule(rule) => {
            let longest = view.idle.first().map_or(Millis(0), |host| view.at.since(host.since));
            let mut reason = format!("idle for {longest} (limit {})", rule.idle);
            for one in &rule.when {
                let (reading, below) = (reading_text(view, one.metric), value_text(one.metric, one.below));
                reason.push_str(&format!(", {reading} < {below}"));
            }
            reason
        }
    }
}

fn demand_text(view: &PoolView) -> String {
    let need = &view.need;
    let mut text = format!("{} tasks wait, need {} hosts now", view.readings.queue, need.now);
    if need.missing > 0 {
        text.push_str(&format!(", {} more for what waits", need.missing));
    }
    text.push_str(&format!(", {} within {}", need.recent, need.window));
    if need.rise > 0 {
        text.push_str(&format!(", will rise by {} while a host boots", need.rise));
    }
    if need.pattern > 0 {
        text.push_str(&format!(", {} by the pattern of day and week", need.pattern));
    }
    text
}

fn rule_text(view: &PoolView, rule: &ScaleOut, since: Option<Timestamp>, state: AskState) -> String {
    let reading = reading_text(view, rule.metric);
    let above = value_text(rule.metric, rule.above);
    let held = since.map_or(Millis(0), |since| view.at.since(since));
    match state {
        AskState::Quiet => format!("{reading}, asks above {above} for {}", rule.hold),
        AskState::NoData { .. } => format!("{reading}: asks nothing, and no host goes"),
        AskState::Pending(_) => format!("{reading} > {above} for {held} of {}", rule.hold),
        AskState::Resting(due) => format!("{reading} > {above} for {held}, rests for {}", due.since(view.at)),
        AskState::Wants(size) => format!("{reading} > {above} for {held}: asks for {size} hosts"),
    }
}

fn limits_text(policy: &PoolPolicy, view: &PoolView, limits: &Limits) -> String {
    let mut text = format!("min {}, max {}, {} hosts counted", limits.min, limits.max, view.hosts);
    if let Some(cost) = policy.cost {
        let hour = cost.price_per_hour.of_host_time(u64::from(view.hosts) * 3_600_000);
        text.push_str(&format!("; {hour} an hour"));
        if let Some(budget) = cost.budget_per_hour {
            text.push_str(&format!(" of {budget}"));
        }
        text.push_str(&format!(", {} today", view.spent_today));
        if let Some(budget) = cost.budget_per_day {
            text.push_str(&format!(" of {budget}"));
        }
        if limits.affordable < limits.max {
            text.push_str(&format!(": the budget allows {} hosts", limits.affordable));
        }
    }
    text
}

fn scale_out_text(policy: &PoolPolicy, view: &PoolView, limits: &Limits, asks: &[Ask]) -> String {
    match decide(policy, view) {
        Decision::Out { keep, wake, create, reason } => {
            let made = match policy.provider {
                ProviderKind::Static => format!("{} to be woken", wake.len()),
                ProviderKind::Local | ProviderKind::Exec => format!("{create} to be made"),
            };
            format!("{made}, {} drains to be cancelled: {reason}", keep.len())
        }
        Decision::Hold { .. } | Decision::In { .. } => match most_wanted(asks, limits) {
            Some((wanted, _)) if wanted > view.supply && view.paused.is_some() => {
                format!("none, although {wanted} are wanted: hosts kept failing")
            }
            Some((wanted, _)) if wanted > view.supply && lacks_sleepers(policy, view, limits) => {
                format!("none, although {wanted} are wanted: {}", no_sleeper_text(policy, view))
            }
            Some((wanted, _)) if wanted > view.supply => {
                format!("none, although {wanted} are wanted: {} hosts count against {}", view.hosts, limits.cap())
            }
            Some(_) => String::from("none: at the limit"),
            None => String::from("none: nothing asks for more"),
        },
    }
}

/// There may be more hosts, but they join by themselves and none of them can be woken.
fn lacks_sleepers(policy: &PoolPolicy, view: &PoolView, limits: &Limits) -> bool {
    policy.provider == ProviderKind::Static && view.stopped.is_none() && view.hosts < limits.cap()
}

/// Why none can be had of hosts that join by themselves.
fn no_sleeper_text(policy: &PoolPolicy, view: &PoolView) -> String {
    match (&policy.wake, view.asleep.len()) {
        (Some(_), _) => String::from("no host of the pool is asleep; more have to join"),
        (None, 0) => String::from("its hosts join by themselves"),
        (None, asleep) => format!("{asleep} are asleep, and the policy has no `wake`"),
    }
}

fn scale_in_text(policy: &PoolPolicy, view: &PoolView, limits: &Limits, asks: &[Ask]) -> String {
    if let Decision::In { release, reason, .. } = decide(policy, view) {
        return format!("{} hosts to go: {reason}", release.len());
    }
    let mut soonest = Soonest { now: view.at, at: None };
    let state = format!("{} idle of {}", view.idle.len(), view.supply - view.booting.min(view.supply));
    let why = if view.stopped.is_some() {
        String::from("paused by an operator")
    } else if let Some((why, _)) = &view.silent {
        format!("hold, {why}")
    } else if asks.iter().any(|ask| matches!(ask.state, AskState::NoData { .. })) {
        String::from("hold, a rule for more has no data")
    } else if asks.iter().any(|ask| ask.state.forbids_scale_in()) {
        String::from("a rule asks for more or is about to")
    } else if policy.preset != Preset::Demand && policy.in_rule().is_none() {
        String::from("the policy has no rule for it")
    } else if view.supply <= limits.min {
        format!("at min {}", limits.min)
    } else {
        match going(policy, view, limits, asks, &mut soonest) {
            None => soonest.at.map_or_else(
                || String::from("what is there is needed"),
                |at| format!("not before {} from now", at.since(view.at)),
            ),
            Some(_) if disruption_left(policy, view) == 0 => format!("{} drain already", view.draining),
            Some(going) => {
                let _none = victims(policy, view, going.idle, view.supply, &mut soonest);
                soonest.at.map_or_else(
                    || String::from("no host is idle"),
                    |at| format!("the next host may go in {}", at.since(view.at)),
                )
            }
        }
    };
    format!("none ({state}): {why}")
}

fn metrics_text(view: &PoolView) -> String {
    let metrics = [Metric::CpuUtilization, Metric::MemoryUtilization, Metric::QueueLength, Metric::WaitTime];
    let texts: Vec<String> = metrics.into_iter().map(|metric| reading_text(view, metric)).collect();
    texts.join(", ")
}

fn reading_text(view: &PoolView, metric: Metric) -> String {
    match view.readings.of(metric) {
        Reading::Value(value) => format!("{} {}", metric.name(), value_text(metric, value)),
        Reading::NoData { of: 0, .. } => format!("{} has no data (no node reports)", metric.name()),
        Reading::NoData { fresh, of } => {
            format!("{} has no data ({fresh} of {of} nodes are fresh, {FRESH_PERCENT} % are needed)", metric.name())
        }
        Reading::Never => format!("{} has nothing to measure", metric.name()),
    }
}

fn value_text(metric: Metric, value: u64) -> String {
    match metric {
        Metric::CpuUtilization | Metric::MemoryUtilization | Metric::Pressure => {
            if value.is_multiple_of(PERCENT) {
                format!("{} %", value / PERCENT)
            } else {
                format!("{}.{} %", value / PERCENT, value % PERCENT)
            }
        }
        Metric::QueueLength => format!("{value}"),
        Metric::ExecutionLatency | Metric::WaitTime => format!("{}", Millis(value)),
    }
}
