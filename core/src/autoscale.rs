//! How many hosts a pool should have: one pure function of numbers.
//!
//! Out: the most that any breached rule asks, cut by the maximum; drains that
//! the scaler itself began are cancelled before a host is made. In: only idle
//! hosts (FL-8), only while nothing asks for more, never below the minimum.
//! All hosts that were requested and are not confirmed gone count (FL-11).

use alloc::{format, string::String, vec::Vec};

use crate::{
    ids::NodeId,
    policy::{Metric, PoolPolicy, ScaleIn, ScaleOut},
    time::Timestamp,
};

/// A pool as the decision sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// Hosts that take or will take work: live, eligible, or booting.
    pub supply: u32,
    /// All hosts requested or joined and not confirmed gone.
    pub hosts: u32,
    /// Tasks that wait and that a host of this pool could run.
    pub queue: u64,
    /// For each scale-out rule, since when it is breached.
    pub breached_since: Vec<Option<Timestamp>>,
    /// The last change of the pool's size.
    pub last_scaled: Option<Timestamp>,
    /// Nodes being drained by the scaler that can still be kept.
    pub draining: Vec<NodeId>,
    /// Nodes with nothing on them, and since when; longest first.
    pub idle: Vec<(NodeId, Timestamp)>,
    /// Scale-out rests because hosts kept failing: why.
    pub paused: Option<String>,
}

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
        /// Hosts to make.
        create: u32,
        /// The sentence.
        reason: String,
    },
    /// Fewer hosts.
    In {
        /// Nodes to drain and delete.
        release: Vec<NodeId>,
        /// The sentence.
        reason: String,
    },
}

/// Is the rule breached by these numbers?
#[must_use]
pub const fn is_breached(rule: &ScaleOut, queue: u64) -> bool {
    match rule.metric {
        Metric::QueueLength => queue > rule.above,
    }
}

/// What the pool should do now.
#[must_use]
pub fn decide(policy: &PoolPolicy, view: &PoolView, now: Timestamp) -> Decision {
    if view.supply < policy.min && view.paused.is_none() {
        let wanted = policy.min - view.supply;
        return grow(policy, view, wanted, format!("{} hosts are fewer than min {}", view.supply, policy.min));
    }
    let mut until = None;
    let mut breached = false;
    for (rule, since) in policy.scale_out.iter().zip(&view.breached_since) {
        let Some(since) = *since else { continue };
        breached = true;
        let rested = view.last_scaled.map_or(now, |last| last + rule.cooldown_ms);
        let due = (since + rule.hold_ms).max(rested);
        if due > now {
            until = earlier(until, due);
        } else if view.supply < policy.max && view.paused.is_none() {
            let reason = format!("{} > {} for {}", metric_value(rule, view.queue), rule.above, now.since(since));
            match grow(policy, view, rule.step, reason) {
                Decision::Hold { .. } => {}
                grown => return grown,
            }
        }
    }
    // A pending or breached rule for more forbids fewer.
    match policy.scale_in {
        Some(rule) if !breached && view.queue < rule.queue_below => shrink(policy, &rule, view, now),
        Some(_) | None => Decision::Hold { until },
    }
}

fn metric_value(rule: &ScaleOut, queue: u64) -> String {
    match rule.metric {
        Metric::QueueLength => format!("queue_length {queue}"),
    }
}

fn grow(policy: &PoolPolicy, view: &PoolView, step: u32, reason: String) -> Decision {
    let wanted = step.min(policy.max.saturating_sub(view.supply));
    let keep: Vec<NodeId> = view.draining.iter().copied().take(wanted as usize).collect();
    let kept = u32::try_from(keep.len()).unwrap_or(u32::MAX);
    let create = (wanted - kept).min(policy.max.saturating_sub(view.hosts));
    if kept + create == 0 {
        // At the maximum, counting hosts that are still leaving: their going is an event.
        return Decision::Hold { until: None };
    }
    Decision::Out { keep, create, reason }
}

fn shrink(policy: &PoolPolicy, rule: &ScaleIn, view: &PoolView, now: Timestamp) -> Decision {
    let spare = view.supply.saturating_sub(policy.min).min(rule.step);
    let rested = view.last_scaled.map_or(now, |last| last + rule.cooldown_ms);
    let mut release = Vec::new();
    let mut until = None;
    for (node, since) in &view.idle {
        let due = (*since + rule.idle_ms).max(rested);
        if due > now {
            until = earlier(until, due);
        } else if (release.len() as u64) < u64::from(spare) {
            release.push((*node, *since));
        }
    }
    let Some((_, longest)) = release.first().copied() else { return Decision::Hold { until } };
    Decision::In {
        reason: format!(
            "idle for {} (limit {}), queue_length {} < {}",
            now.since(longest),
            rule.idle_ms,
            view.queue,
            rule.queue_below
        ),
        release: release.into_iter().map(|(node, _)| node).collect(),
    }
}

fn earlier(one: Option<Timestamp>, other: Timestamp) -> Option<Timestamp> {
    Some(one.map_or(other, |one| one.min(other)))
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;
    use crate::{
        ids::PoolName,
        policy::{HostTemplate, PlacementOrder, ProviderKind},
        time::Millis,
    };

    const NOW: Timestamp = Timestamp(1_000_000);

    fn policy() -> PoolPolicy {
        PoolPolicy {
            name: PoolName("batch".into()),
            provider: ProviderKind::Local,
            min: 0,
            max: 4,
            placement: PlacementOrder::Spread,
            host: HostTemplate {
                cpu_milli: 1_000,
                memory_bytes: 1 << 30,
                disk_bytes: 1 << 30,
                labels: Default::default(),
            },
            boot_deadline_ms: Millis::from_secs(60),
            boot_failures: 3,
            scale_out: Vec::from([ScaleOut {
                metric: Metric::QueueLength,
                above: 10,
                hold_ms: Millis::from_secs(5),
                step: 2,
                cooldown_ms: Millis::from_secs(10),
            }]),
            scale_in: Some(ScaleIn { idle_ms: Millis::from_secs(60), queue_below: 1, step: 1, cooldown_ms: Millis(0) }),
        }
    }

    fn view() -> PoolView {
        PoolView { supply: 1, hosts: 1, breached_since: Vec::from([None]), ..PoolView::default() }
    }

    #[test]
    fn scale_out_waits_until_the_rule_has_held() {
        let mut view = PoolView { queue: 50, breached_since: Vec::from([Some(NOW)]), ..view() };
        assert_eq!(decide(&policy(), &view, NOW), Decision::Hold { until: Some(NOW + Millis::from_secs(5)) });
        let later = NOW + Millis::from_secs(5);
        let Decision::Out { keep, create, reason } = decide(&policy(), &view, later) else { panic!("no scale-out") };
        assert_eq!((keep.len(), create, reason.as_str()), (0, 2, "queue_length 50 > 10 for 5s"));
        view.last_scaled = Some(later);
        assert_eq!(decide(&policy(), &view, later), Decision::Hold { until: Some(later + Millis::from_secs(10)) });
    }

    #[test]
    fn hosts_that_are_leaving_still_count_against_the_maximum() {
        let view =
            PoolView { supply: 1, hosts: 4, queue: 50, breached_since: Vec::from([Some(Timestamp(0))]), ..view() };
        assert_eq!(decide(&policy(), &view, NOW), Decision::Hold { until: None });
    }

    #[test]
    fn its_own_drains_are_cancelled_before_a_host_is_made() {
        let view = PoolView {
            supply: 2,
            hosts: 3,
            queue: 50,
            breached_since: Vec::from([Some(Timestamp(0))]),
            draining: Vec::from([NodeId(7)]),
            ..view()
        };
        let Decision::Out { keep, create, .. } = decide(&policy(), &view, NOW) else { panic!("no scale-out") };
        assert_eq!((keep, create), (Vec::from([NodeId(7)]), 1));
    }

    #[test]
    fn only_idle_hosts_go_and_one_at_a_time() {
        let idle = Vec::from([(NodeId(2), Timestamp(0)), (NodeId(3), Timestamp(5))]);
        let Decision::In { release, reason } =
            decide(&policy(), &PoolView { supply: 3, hosts: 3, idle, ..view() }, NOW)
        else {
            panic!("no scale-in")
        };
        assert_eq!(release, [NodeId(2)]);
        assert_eq!(reason.to_string(), "idle for 16m40s (limit 1m00s), queue_length 0 < 1");
    }

    #[test]
    fn nothing_goes_while_a_rule_for_more_is_pending() {
        let idle = Vec::from([(NodeId(2), Timestamp(0))]);
        let pending = PoolView { supply: 2, queue: 50, breached_since: Vec::from([Some(NOW)]), idle, ..view() };
        assert!(matches!(decide(&policy(), &pending, NOW), Decision::Hold { .. }));
    }

    #[test]
    fn the_minimum_is_kept() {
        let at_min = PoolPolicy { min: 1, ..policy() };
        let idle = Vec::from([(NodeId(2), Timestamp(0))]);
        assert_eq!(decide(&at_min, &PoolView { idle, ..view() }, NOW), Decision::Hold { until: None });
        let Decision::Out { create, .. } = decide(&at_min, &PoolView { supply: 0, hosts: 0, ..view() }, NOW) else {
            panic!()
        };
        assert_eq!(create, 1);
    }
}
