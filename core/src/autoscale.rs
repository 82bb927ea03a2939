//! How many hosts a pool should have: one pure function of numbers, used by
//! the coordinator, by `explain`, by the replay of traces and by tests.
//!
//! Out: the most that any rule asks, cut by maximum and budget; drains that
//! the scaler itself began are cancelled before a host is made or woken. In: only idle
//! hosts (FL-8) unless the policy names busy ones, only while no rule for more
//! is breached, pending or without data (FL-12), never below the minimum.
//! All hosts that were requested and are not confirmed gone count (FL-11).

pub mod demand;
mod explain;
pub mod flow;
pub mod foresight;
pub mod packing;
pub mod pattern;
mod view;
pub mod waits;

use alloc::{format, string::String, vec::Vec};

pub use explain::{explain, inputs};
pub use view::{BusyHost, IdleHost, Need, Pinned, PoolView, Reading, Readings};

use crate::{
    ids::NodeId,
    mutation::{self, Mutation},
    policy::{Bounds, Money, PoolPolicy, Preset, ProviderKind, ScaleIn, ScaleOut, Share},
    time::{Millis, Timestamp},
};

/// A pool's metric needs this part of its nodes to be fresh, in hundredths.
pub const FRESH_PERCENT: u64 = 80;
/// Busy hosts that drain at once when the policy says nothing.
const BUSY_DRAINING: Share = Share::Percent(10);
/// A host that is paid by pieces longer than this is kept until its piece ends.
const PIECE_MIN: Millis = Millis::from_secs(120);
/// So long before its piece ends such a host may go.
const PIECE_END: Millis = Millis::from_secs(120);

/// What the pool should do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Hold {
        /// Look again then, if nothing happens before.
        until: Option<Timestamp>,
    },
    /// More hosts.
    Out {
        /// Drains to cancel first.
        keep: Vec<NodeId>,
        /// Nodes to wake, of a pool whose hosts joined by themselves.
        wake: Vec<NodeId>,
        /// Hosts to make.
        create: u32,
        /// The sentence.
        reason: String,
    },
    /// Fewer hosts.
    In {
        /// Nodes to drain and delete.
        release: Vec<NodeId>,
        /// Some have work on them: what is left after this long is evicted.
        busy: Option<Millis>,
        /// The sentence.
        reason: String,
    },
}

/// What the pool should do now.
#[must_use]
pub fn decide(policy: &PoolPolicy, view: &PoolView) -> Decision {
    let now = view.at;
    let mut soonest = Soonest { now, at: None };
    if view.stopped.is_some() && !mutation::is_on(Mutation::PauseIgnored) {
        return Decision::Hold { until: None };
    }
    let limits = Limits::of(policy, view);
    soonest.see(limits.until);
    soonest.see(view.trial_at);
    if policy.preset == Preset::Demand {
        soonest.see(view.need.pattern_until);
    }
    let asks = asks(policy, view, &limits);
    for ask in &asks {
        soonest.see(ask.state.due());
    }
    if let Some((wanted, reason)) = most_wanted(&asks, &limits)
        && wanted > view.supply
        && let Some(grown) = grow(policy, view, wanted, &limits, reason)
    {
        return grown;
    }
    match shrink(policy, view, &limits, &asks, &mut soonest) {
        Some(shrunk) => shrunk,
        None => Decision::Hold { until: soonest.at },
    }
}

/// The size that the pool would have if nothing stood in its way but its limits.
#[must_use]
pub fn wanted(policy: &PoolPolicy, view: &PoolView) -> u32 {
    let count = |hosts: &[NodeId]| u32::try_from(hosts.len()).unwrap_or(u32::MAX);
    let limits = Limits::of(policy, view);
    match decide(policy, view) {
        Decision::In { release, .. } => view.supply.saturating_sub(count(&release)),
        Decision::Out { .. } | Decision::Hold { .. } => {
            let most = most_wanted(&asks(policy, view, &limits), &limits).map(|(wanted, _)| wanted);
            most.unwrap_or(view.supply).max(view.supply)
        }
    }
}

/// The earliest time at which to look again.
struct Soonest {
    now: Timestamp,
    at: Option<Timestamp>,
}

impl Soonest {
    fn see(&mut self, at: Option<Timestamp>) {
        if let Some(at) = at.filter(|at| *at > self.now) {
            self.at = Some(self.at.map_or(at, |soonest| soonest.min(at)));
        }
    }
}

/// Between which sizes the pool may be now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    min: u32,
    max: u32,
    /// Hosts that the budget allows.
    affordable: u32,
    /// Schedule or pin may change them then.
    until: Option<Timestamp>,
}

impl Limits {
    fn of(policy: &PoolPolicy, view: &PoolView) -> Self {
        let bounds = Bounds::at(policy.min, policy.max, &policy.schedule, view.at);
        let pinned = view.pin_in_force();
        let until = bounds.until.into_iter().chain(pinned.and_then(|pinned| pinned.until)).min();
        let affordable = affordable(policy, view.spent_today).max(bounds.min);
        match pinned {
            Some(pinned) => {
                let size = pinned.size.min(policy.max);
                Self { min: size, max: size, affordable: u32::MAX, until }
            }
            None if mutation::is_on(Mutation::MinimumIgnored) => Self { min: 0, max: bounds.max, affordable, until },
            None => Self { min: bounds.min, max: bounds.max, affordable, until },
        }
    }

    /// The most that may be there.
    fn cap(&self) -> u32 {
        self.max.min(self.affordable)
    }
}

/// Hosts that the budgets allow: an hour's, and what the rest of the day's pays for an hour.
fn affordable(policy: &PoolPolicy, spent_today: Money) -> u32 {
    let Some(cost) = policy.cost else { return u32::MAX };
    let hour = cost.budget_per_hour.map_or(u32::MAX, |budget| cost.price_per_hour.hosts_from(budget));
    let day = cost
        .budget_per_day
        .map_or(u32::MAX, |budget| cost.price_per_hour.hosts_from(Money(budget.0.saturating_sub(spent_today.0))));
    hour.min(day)
}

/// What one rule, or the demand, or a minimum asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    kind: AskKind,
    state: AskState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AskKind {
    Minimum,
    Demand,
    Rule(ScaleOut, Option<Timestamp>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AskState {
    /// It asks for nothing more.
    Quiet,
    /// Its metric has no data.
    NoData { fresh: u32, of: u32 },
    /// Breached, but not for long enough.
    Pending(Timestamp),
    /// Breached, and resting after the last scale-out.
    Resting(Timestamp),
    /// It asks for so many hosts.
    Wants(u32),
}

impl AskState {
    const fn due(self) -> Option<Timestamp> {
        match self {
            Self::Pending(due) | Self::Resting(due) => Some(due),
            Self::Quiet | Self::NoData { .. } | Self::Wants(_) => None,
        }
    }

    /// A rule in this state forbids fewer hosts.
    const fn forbids_scale_in(self) -> bool {
        match self {
            Self::NoData { .. } | Self::Pending(_) | Self::Resting(_) | Self::Wants(_) => true,
            Self::Quiet => false,
        }
    }
}

fn asks(policy: &PoolPolicy, view: &PoolView, limits: &Limits) -> Vec<Ask> {
    let mut asks = Vec::new();
    let wants = |size: u32| if size > view.supply { AskState::Wants(size) } else { AskState::Quiet };
    asks.push(Ask { kind: AskKind::Minimum, state: wants(limits.min) });
    if policy.preset == Preset::Demand {
        let wanted = view.need.target().max(view.supply.saturating_add(view.need.missing));
        asks.push(Ask { kind: AskKind::Demand, state: wants(wanted) });
    }
    let rules = policy.out_rules();
    for (index, rule) in rules.into_iter().enumerate() {
        let since = view.breached_since.get(index).copied().flatten();
        asks.push(Ask { kind: AskKind::Rule(rule, since), state: rule_state(&rule, since, view) });
    }
    asks
}

fn rule_state(rule: &ScaleOut, since: Option<Timestamp>, view: &PoolView) -> AskState {
    let now = view.at;
    match (view.readings.breach(rule), view.readings.of(rule.metric)) {
        (Some(true), _) => {}
        (None, Reading::NoData { fresh, of }) => return AskState::NoData { fresh, of },
        (Some(false) | None, _) => return AskState::Quiet,
    }
    let held = since.unwrap_or(now) + rule.hold;
    if held > now {
        return AskState::Pending(held);
    }
    let rest = rule.cooldown.unwrap_or(rule.hold.max(view.boot));
    let rested = view.last_out.map_or(now, |last| last + rest);
    if rested > now {
        return AskState::Resting(rested);
    }
    AskState::Wants(rule.change.applied_to(view.supply, true))
}

/// The most that is asked, cut by the limits, and who asks it.
fn most_wanted<'a>(asks: &'a [Ask], limits: &Limits) -> Option<(u32, &'a Ask)> {
    let wanted = asks.iter().filter_map(|ask| match ask.state {
        AskState::Wants(size) => Some((size, ask)),
        AskState::Quiet | AskState::NoData { .. } | AskState::Pending(_) | AskState::Resting(_) => None,
    });
    // Among equals the first, which is the simplest to understand.
    let most = wanted.reduce(|one, other| if other.0 > one.0 { other } else { one });
    most.map(|(size, ask)| (size.min(limits.cap()), ask))
}

fn grow(policy: &PoolPolicy, view: &PoolView, wanted: u32, limits: &Limits, ask: &Ask) -> Option<Decision> {
    let more = wanted - view.supply;
    let keep: Vec<NodeId> = view.cancellable.iter().copied().take(more as usize).collect();
    let kept = u32::try_from(keep.len()).unwrap_or(u32::MAX);
    // At the maximum, counting hosts that are still leaving: their going is an event.
    let room = limits.cap().saturating_sub(view.hosts);
    let may = (more - kept).min(room).min(view.may_make());
    let (wake, create): (Vec<NodeId>, u32) = match policy.provider {
        ProviderKind::Static => (sleepers(policy, view).iter().copied().take(may as usize).collect(), 0),
        ProviderKind::Local | ProviderKind::Exec => (Vec::new(), may),
    };
    let mut reason = explain::out_reason(view, ask, limits);
    if policy.wake.is_some() && wake.len() < may as usize {
        reason.push_str(&format!("; {may} are to be woken, {} are asleep", wake.len()));
    }
    let is_one_made = create > 0 || !wake.is_empty();
    if view.paused.is_some() && is_one_made {
        reason.push_str("; a trial, because hosts kept failing");
    }
    (kept > 0 || is_one_made).then_some(Decision::Out { keep, wake, create, reason })
}

/// The hosts that somebody can wake.
fn sleepers<'a>(policy: &PoolPolicy, view: &'a PoolView) -> &'a [NodeId] {
    if policy.wake.is_some() { &view.asleep } else { &[] }
}

fn shrink(
    policy: &PoolPolicy,
    view: &PoolView,
    limits: &Limits,
    asks: &[Ask],
    soonest: &mut Soonest,
) -> Option<Decision> {
    if let Some((_, until)) = &view.silent {
        soonest.see(*until);
        return None;
    }
    let going = going(policy, view, limits, asks, soonest)?;
    let count = view.supply.saturating_sub(going.to.max(limits.min));
    let count = count.min(disruption_left(policy, view));
    if count == 0 {
        return None;
    }
    let mut release = victims(policy, view, going.idle, count, soonest);
    let idle = u32::try_from(release.len()).unwrap_or(u32::MAX);
    let mut busy = None;
    if let Some(deadline) = going.busy
        && idle < count
    {
        let share = policy.max_draining.unwrap_or(BUSY_DRAINING).of(view.hosts);
        let more = (count - idle).min(share.saturating_sub(view.draining + idle));
        let mut hosts = view.busy.clone();
        hosts.sort_by_key(|host| (host.work, host.node));
        release.extend(hosts.into_iter().take(more as usize).map(|host| host.node));
        busy = (more > 0).then_some(deadline);
    }
    (!release.is_empty()).then(|| Decision::In { reason: explain::in_reason(view, &going), release, busy })
}

/// Fewer hosts: how many are left, and which may go.
#[derive(Clone, Debug)]
pub(crate) struct Going {
    why: GoingWhy,
    to: u32,
    /// Without work for this long.
    idle: Millis,
    busy: Option<Millis>,
}

#[derive(Clone, Debug)]
enum GoingWhy {
    /// More than the maximum, the budget or the operator's size.
    Excess(u32),
    /// A rule's conditions hold.
    Rule(ScaleIn),
    /// More than the work needs.
    Demand(u32),
}

fn going(policy: &PoolPolicy, view: &PoolView, limits: &Limits, asks: &[Ask], soonest: &mut Soonest) -> Option<Going> {
    let cap = limits.cap();
    if view.supply > cap {
        return Some(Going { why: GoingWhy::Excess(cap), to: cap, idle: Millis(0), busy: None });
    }
    let rule = policy.in_rule();
    let demand = policy.preset == Preset::Demand;
    if asks.iter().any(|ask| ask.state.forbids_scale_in()) || (rule.is_none() && !demand) {
        return None;
    }
    let target = if demand {
        soonest.see(view.need.recent_until);
        view.need.target()
    } else {
        0
    };
    if view.supply <= target.max(limits.min) {
        return None;
    }
    let rest = rule.as_ref().map_or(view.boot, |rule| rule.cooldown.unwrap_or(rule.longest_hold().max(view.boot)));
    let rested = view.last_scaled.map_or(soonest.now, |last| last + rest);
    if rested > soonest.now {
        soonest.see(Some(rested));
        return None;
    }
    let Some(rule) = rule else {
        return Some(Going { why: GoingWhy::Demand(target), to: target, idle: Millis(0), busy: None });
    };
    if !conditions_hold(&rule, view, soonest) {
        return None;
    }
    let to = rule.change.applied_to(view.supply, false).max(target);
    Some(Going { to, idle: rule.idle, busy: rule.busy, why: GoingWhy::Rule(rule) })
}

fn conditions_hold(rule: &ScaleIn, view: &PoolView, soonest: &mut Soonest) -> bool {
    if rule.when.is_empty() && view.readings.queue > 0 {
        return false;
    }
    let mut all = true;
    for (index, condition) in rule.when.iter().enumerate() {
        let since = view.below_since.get(index).copied().flatten();
        match (view.readings.is_below(condition), since.unwrap_or(soonest.now) + condition.hold) {
            (Some(true), due) if due <= soonest.now => {}
            (Some(true), due) => {
                soonest.see(Some(due));
                all = false;
            }
            (Some(false) | None, _) => all = false,
        }
    }
    all
}

/// How many more hosts may drain.
fn disruption_left(policy: &PoolPolicy, view: &PoolView) -> u32 {
    policy.max_draining.map_or(u32::MAX, |share| share.of(view.hosts).saturating_sub(view.draining))
}

/// Idle hosts by what their going saves: those whose paid piece ends first, then those that have been
/// idle for longest, then the oldest.
fn victims(policy: &PoolPolicy, view: &PoolView, idle: Millis, count: u32, soonest: &mut Soonest) -> Vec<NodeId> {
    let piece = policy.cost.map(|cost| cost.billed_by).filter(|piece| *piece > PIECE_MIN);
    let mut ready = Vec::new();
    for host in &view.idle {
        let due = host.since + idle;
        if due > soonest.now {
            soonest.see(Some(due));
            continue;
        }
        let left = piece.map_or(0, |piece| piece.0 - soonest.now.since(host.joined).0 % piece.0);
        if left > PIECE_END.0 {
            // It is paid for: keeping it costs nothing yet.
            soonest.see(Some(soonest.now + Millis(left - PIECE_END.0)));
            continue;
        }
        ready.push((left, host.since, host.joined, host.node));
    }
    ready.sort_unstable();
    ready.into_iter().take(count as usize).map(|(_, _, _, node)| node).collect()
}

#[cfg(test)]
mod tests;
