//! Decisions by example, and what no decision may ever be.

use std::{collections::BTreeMap, string::ToString as _};

use proptest::prelude::*;

use super::*;
use crate::{
    ids::PoolName,
    policy::{Below, Change, Cost, HostTemplate, Metric, ProviderKind, Window},
};

const NOW: Timestamp = Timestamp(1_000_000_000);

fn empty(max: u32) -> PoolPolicy {
    let host =
        HostTemplate { cpu_milli: 1_000, memory_bytes: 1 << 30, disk_bytes: 1 << 30, labels: BTreeMap::default() };
    PoolPolicy::fixed(PoolName("batch".into()), ProviderKind::Local, 0, max, host)
}

fn queue_rule() -> ScaleOut {
    ScaleOut {
        metric: Metric::QueueLength,
        above: 10,
        hold: Millis::from_secs(5),
        change: Change::Step(2),
        cooldown: Some(Millis::from_secs(10)),
    }
}

fn policy() -> PoolPolicy {
    PoolPolicy {
        scale_out: Vec::from([queue_rule()]),
        scale_in: Some(ScaleIn {
            when: Vec::from([Below { metric: Metric::QueueLength, below: 1, hold: Millis(0) }]),
            cooldown: Some(Millis(0)),
            ..ScaleIn::one_by_one(Millis::from_secs(60))
        }),
        ..empty(4)
    }
}

fn demand(max: u32) -> PoolPolicy {
    PoolPolicy { preset: Preset::Demand, ..empty(max) }
}

fn queue(queue: u64) -> Readings {
    Readings { queue, ..Readings::default() }
}

fn view() -> PoolView {
    PoolView { at: NOW, supply: 1, hosts: 1, boot: Millis::from_secs(40), ..PoolView::default() }
}

fn idle(since: &[u64]) -> Vec<IdleHost> {
    let host = |(at, since): (usize, &u64)| IdleHost {
        node: NodeId(at as u64 + 1),
        since: Timestamp(*since),
        joined: Timestamp(*since),
    };
    since.iter().enumerate().map(host).collect()
}

fn at(view: &PoolView, at: Timestamp) -> PoolView {
    PoolView { at, ..view.clone() }
}

fn created(decision: &Decision) -> u32 {
    match decision {
        Decision::Out { create, .. } => *create,
        Decision::Hold { .. } | Decision::In { .. } => 0,
    }
}

fn released(decision: &Decision) -> usize {
    match decision {
        Decision::In { release, .. } => release.len(),
        Decision::Hold { .. } | Decision::Out { .. } => 0,
    }
}

#[test]
fn scale_out_waits_until_the_rule_has_held_and_rests_afterwards() {
    let mut view = PoolView { readings: queue(50), breached_since: Vec::from([Some(NOW)]), ..view() };
    let held = NOW + Millis::from_secs(5);
    assert_eq!(decide(&policy(), &view), Decision::Hold { until: Some(held) });
    let Decision::Out { keep, create, reason, .. } = decide(&policy(), &at(&view, held)) else {
        panic!("no scale-out")
    };
    assert_eq!((keep.len(), create, reason.as_str()), (0, 2, "queue_length 50 > 10 for 5s"));
    view.last_out = Some(held);
    let rested = held + Millis::from_secs(10);
    assert_eq!(decide(&policy(), &at(&view, held)), Decision::Hold { until: Some(rested) });
    assert_eq!(created(&decide(&policy(), &at(&view, rested))), 2);
}

#[test]
fn a_rule_without_a_cooldown_rests_while_its_hosts_boot() {
    let mut policy = policy();
    policy.scale_out[0].cooldown = None;
    let view = PoolView {
        readings: queue(50),
        breached_since: Vec::from([Some(Timestamp(0))]),
        last_out: Some(NOW),
        ..view()
    };
    assert_eq!(decide(&policy, &view), Decision::Hold { until: Some(NOW + view.boot) });
}

#[test]
fn the_most_that_any_rule_asks_is_wanted() {
    let mut policy = PoolPolicy { max: 20, ..policy() };
    policy.scale_out.push(ScaleOut { change: Change::Factor(3_000), ..queue_rule() });
    let since = Vec::from([Some(Timestamp(0)), Some(Timestamp(0))]);
    let view = PoolView { supply: 4, hosts: 4, readings: queue(50), breached_since: since, ..view() };
    assert_eq!(created(&decide(&policy, &view)), 8);
    assert_eq!(created(&decide(&PoolPolicy { max: 9, ..policy }, &view)), 5);
}

#[test]
fn hosts_that_are_leaving_still_count_against_the_maximum() {
    let view = PoolView { hosts: 4, readings: queue(50), breached_since: Vec::from([Some(Timestamp(0))]), ..view() };
    assert_eq!(decide(&policy(), &view), Decision::Hold { until: None });
}

#[test]
fn its_own_drains_are_cancelled_before_a_host_is_made() {
    let view = PoolView {
        supply: 2,
        hosts: 3,
        readings: queue(50),
        breached_since: Vec::from([Some(Timestamp(0))]),
        cancellable: Vec::from([NodeId(7)]),
        ..view()
    };
    let Decision::Out { keep, create, .. } = decide(&policy(), &view) else { panic!("no scale-out") };
    assert_eq!((keep, create), (Vec::from([NodeId(7)]), 1));
}

#[test]
fn only_idle_hosts_go_and_one_at_a_time() {
    let view = PoolView { supply: 3, hosts: 3, idle: idle(&[0, 5]), ..view() };
    let Decision::In { release, busy, reason } = decide(&policy(), &view) else { panic!("no scale-in") };
    assert_eq!((release, busy), (Vec::from([NodeId(1)]), None));
    assert_eq!(reason.to_string(), "idle for 11d (limit 1m00s), queue_length 0 < 1");
}

#[test]
fn nothing_goes_while_a_rule_for_more_is_pending_or_without_data() {
    let view = PoolView { supply: 2, idle: idle(&[0]), ..view() };
    assert_eq!(released(&decide(&policy(), &view)), 1);
    let pending = PoolView { readings: queue(50), breached_since: Vec::from([Some(NOW)]), ..view.clone() };
    assert_eq!(released(&decide(&policy(), &pending)), 0);
    let mut blind = policy();
    blind.scale_out.push(ScaleOut { metric: Metric::CpuUtilization, ..queue_rule() });
    assert_eq!(decide(&blind, &view), Decision::Hold { until: None });
    assert!(explain(&blind, &view).iter().any(|line| line.contains("a rule for more has no data")));
}

#[test]
fn silence_holds_with_its_reason() {
    let silent = Some(("only 2 of 5 nodes are heard".to_string(), None));
    let view = PoolView { supply: 5, idle: idle(&[0, 0]), silent, ..view() };
    for policy in [policy(), demand(9)] {
        assert_eq!(released(&decide(&policy, &view)), 0);
        assert!(explain(&policy, &view).iter().any(|line| line.contains("hold, only 2 of 5 nodes are heard")));
    }
}

#[test]
fn the_minimum_is_kept() {
    let at_min = PoolPolicy { min: 1, ..policy() };
    assert_eq!(decide(&at_min, &PoolView { idle: idle(&[0]), ..view() }), Decision::Hold { until: None });
    let Decision::Out { create, reason, .. } = decide(&at_min, &PoolView { supply: 0, hosts: 0, ..view() }) else {
        panic!("no scale-out")
    };
    assert_eq!((create, reason.as_str()), (1, "0 hosts are fewer than min 1"));
}

#[test]
fn conditions_must_hold_for_their_time_all_of_them() {
    let mut policy = PoolPolicy { preset: Preset::Thresholds, ..empty(20) };
    policy.min = 1;
    let readings = Readings { cpu: Reading::Value(100), ..queue(0) };
    let (long, short) = (Timestamp(NOW.0 - 600_000), Timestamp(NOW.0 - 299_000));
    let mut view = PoolView {
        supply: 8,
        hosts: 8,
        readings,
        idle: idle(&[0, 0, 0, 0, 0, 0]),
        below_since: Vec::from([Some(long), Some(short)]),
        ..view()
    };
    assert_eq!(decide(&policy, &view), Decision::Hold { until: Some(NOW + Millis::from_secs(1)) });
    view.below_since = Vec::from([Some(long), Some(long)]);
    assert_eq!(released(&decide(&policy, &view)), 4);
    view.readings.cpu = Reading::NoData { fresh: 3, of: 8 };
    assert_eq!(released(&decide(&policy, &view)), 0);
}

#[test]
fn thresholds_double_up_to_the_maximum() {
    let policy = PoolPolicy { preset: Preset::Thresholds, ..empty(20) };
    let readings = Readings { cpu: Reading::Value(701), ..queue(0) };
    let since = Vec::from([Some(Timestamp(NOW.0 - 300_000)), None, None]);
    let view = PoolView { supply: 8, hosts: 8, readings, breached_since: since, ..view() };
    assert_eq!(created(&decide(&policy, &view)), 8);
    let large = PoolView { supply: 15, hosts: 15, ..view };
    assert_eq!(created(&decide(&policy, &large)), 5);
}

#[test]
fn demand_makes_what_waiting_tasks_would_fill_and_keeps_what_was_lately_needed() {
    let need = Need { now: 6, missing: 3, recent: 6, ..Need::default() };
    let busy = PoolView { supply: 3, hosts: 3, readings: queue(9), need, ..view() };
    assert_eq!(created(&decide(&demand(20), &busy)), 3);
    let need = Need { now: 1, recent: 4, recent_until: Some(NOW + Millis(500)), ..Need::default() };
    let calm = PoolView { supply: 6, hosts: 6, idle: idle(&[0, 0, 0, 0, 0]), need, ..view() };
    assert_eq!(released(&decide(&demand(20), &calm)), 2);
    let at_need = PoolView { supply: 4, ..calm };
    assert_eq!(decide(&demand(20), &at_need), Decision::Hold { until: Some(NOW + Millis(500)) });
}

#[test]
fn budgets_cut_what_is_wanted_and_send_away_what_they_do_not_pay() {
    let cost = Cost {
        price_per_hour: Money(200_000),
        billed_by: Millis::from_secs(1),
        budget_per_hour: Some(Money(1_000_000)),
        budget_per_day: Some(Money(10_000_000)),
    };
    let policy = PoolPolicy { cost: Some(cost), min: 1, ..demand(20) };
    let need = Need { now: 9, missing: 8, recent: 9, ..Need::default() };
    let view = PoolView { need, ..view() };
    let Decision::Out { create, reason, .. } = decide(&policy, &view) else { panic!("no scale-out") };
    assert_eq!(create, 4);
    assert!(reason.ends_with("9 are asked, the budget allows 5"), "{reason}");
    let late = PoolView { spent_today: Money(9_500_000), supply: 5, hosts: 5, idle: idle(&[0, 0, 0, 0, 0]), ..view };
    assert_eq!(released(&decide(&policy, &late)), 3, "what is left of the day pays for two");
    let over = PoolView { spent_today: Money(11_000_000), ..late };
    assert_eq!(released(&decide(&policy, &over)), 4, "the minimum stays");
}

#[test]
fn a_host_that_is_paid_for_stays_until_its_piece_ends() {
    let cost = Cost {
        price_per_hour: Money(200_000),
        billed_by: Millis::from_secs(3_600),
        budget_per_hour: None,
        budget_per_day: None,
    };
    let policy = PoolPolicy { cost: Some(cost), ..policy() };
    let half = NOW.0 - 1_800_000;
    let ending = NOW.0 - 3_500_000;
    let view = PoolView { supply: 3, hosts: 3, idle: idle(&[half, ending]), ..view() };
    let Decision::In { release, .. } = decide(&policy, &view) else { panic!("no scale-in") };
    assert_eq!(release, [NodeId(2)]);
    let paid = PoolView { idle: idle(&[half]), ..view };
    assert_eq!(decide(&policy, &paid), Decision::Hold { until: Some(NOW + Millis(1_800_000 - PIECE_END.0)) });
}

#[test]
fn busy_hosts_go_only_if_the_policy_names_them_the_least_work_first() {
    let mut policy = policy();
    let work = |node, seconds| BusyHost { node: NodeId(node), work: Millis::from_secs(seconds) };
    let busy = Vec::from([work(1, 90), work(2, 10), work(3, 50)]);
    let view = PoolView { supply: 4, hosts: 40, busy, ..view() };
    policy.max = 40;
    assert_eq!(released(&decide(&policy, &view)), 0);
    if let Some(rule) = &mut policy.scale_in {
        rule.busy = Some(Millis::from_secs(600));
        rule.change = Change::Step(2);
    }
    let Decision::In { release, busy, .. } = decide(&policy, &view) else { panic!("no scale-in") };
    assert_eq!((release, busy), (Vec::from([NodeId(2), NodeId(3)]), Some(Millis::from_secs(600))));
    let draining = PoolView { draining: 3, ..view };
    assert_eq!(released(&decide(&policy, &draining)), 1, "a tenth of the pool at once");
}

#[test]
fn at_most_so_many_drain_at_once() {
    let mut policy = policy();
    policy.max_draining = Some(Share::Percent(20));
    if let Some(rule) = &mut policy.scale_in {
        rule.change = Change::Step(9);
    }
    let view = PoolView { supply: 10, hosts: 10, idle: idle(&[0, 0, 0, 0]), draining: 1, ..view() };
    assert_eq!(released(&decide(&policy, &view)), 1);
    assert_eq!(released(&decide(&policy, &PoolView { draining: 2, ..view })), 0);
}

#[test]
fn an_operators_size_stands_until_its_time_and_a_pause_stops_all() {
    let policy = PoolPolicy { min: 1, ..demand(20) };
    let pinned = Some(Pinned { size: 7, until: Some(NOW + Millis(5)) });
    let view = PoolView { pinned, ..view() };
    assert_eq!(created(&decide(&policy, &view)), 6);
    assert_eq!(created(&decide(&policy, &at(&view, NOW + Millis(5)))), 0);
    let many = PoolView { supply: 9, hosts: 9, idle: idle(&[0, 0, 0]), ..view };
    assert_eq!(released(&decide(&policy, &many)), 2);
    let stopped = PoolView { stopped: Some("by ana".to_string()), ..many };
    assert_eq!(decide(&policy, &stopped), Decision::Hold { until: None });
}

#[test]
fn a_schedule_moves_the_limits_and_wakes_at_its_edge() {
    let day = NOW.0 - NOW.0 % 86_400_000;
    let window = Window {
        days: Vec::from(crate::policy::Day::ALL),
        from: 8 * 60,
        to: 18 * 60,
        utc_offset: 0,
        min: Some(3),
        max: None,
    };
    let policy = PoolPolicy { schedule: Vec::from([window]), ..demand(20) };
    let hour = |hour: u64| Timestamp(day + hour * 3_600_000);
    assert_eq!(decide(&policy, &at(&view(), hour(7))), Decision::Hold { until: Some(hour(8)) });
    assert_eq!(created(&decide(&policy, &at(&view(), hour(8)))), 2);
}

#[test]
fn hosts_that_keep_failing_are_tried_one_at_a_time() {
    let need = Need { now: 6, missing: 5, recent: 6, ..Need::default() };
    let view = PoolView { need, paused: Some("3 hosts failed".to_string()), trial_at: Some(NOW + Millis(9)), ..view() };
    assert_eq!(decide(&demand(20), &view), Decision::Hold { until: Some(NOW + Millis(9)) });
    let due = at(&view, NOW + Millis(9));
    assert_eq!(created(&decide(&demand(20), &due)), 1);
    let tried = PoolView { supply: 2, booting: 1, hosts: 2, ..due };
    assert_eq!(created(&decide(&demand(20), &tried)), 0, "it boots");
    let kept = PoolView { cancellable: Vec::from([NodeId(9)]), ..view };
    assert!(matches!(decide(&demand(20), &kept), Decision::Out { create: 0, .. }), "a drain can be cancelled");
}

fn some_policy() -> impl Strategy<Value = PoolPolicy> {
    let preset = prop_oneof![Just(Preset::Demand), Just(Preset::Thresholds), Just(Preset::None)];
    (preset, 0u32..5, 0u32..20, any::<bool>(), proptest::option::of(1u32..6)).prop_map(
        |(preset, min, more, rules, drains)| PoolPolicy {
            preset,
            min,
            max_draining: drains.map(Share::Hosts),
            scale_out: if rules { policy().scale_out } else { Vec::new() },
            scale_in: if rules { policy().scale_in } else { None },
            ..empty(min + more)
        },
    )
}

prop_compose! {
    fn some_view()(
        booting in 0u32..5, working in 0u32..10, free in 0usize..10, leaving in 0u32..5, kept in 0usize..3,
        queue in 0u64..300, cpu in 0u64..1_000, blind in any::<bool>(), needs in (0u32..30, 0u32..30, 0u32..30),
        held in proptest::option::of(0u64..900_000), rested in proptest::option::of(0u64..100_000),
        paused in any::<bool>(), silent in any::<bool>(),
    ) -> PoolView {
        let ago = |ms: Option<u64>| ms.map(|ms| Timestamp(NOW.0 - ms));
        let supply = booting + working + free as u32;
        PoolView {
            supply,
            booting,
            hosts: supply + leaving + kept as u32,
            draining: leaving + kept as u32,
            cancellable: (0..kept as u64).map(|at| NodeId(100 + at)).collect(),
            idle: idle(&std::vec![0; free]),
            readings: Readings {
                cpu: if blind { Reading::NoData { fresh: 0, of: supply } } else { Reading::Value(cpu) },
                ..self::queue(queue)
            },
            need: Need { now: needs.0, missing: needs.1, recent: needs.2, ..Need::default() },
            breached_since: std::vec![ago(held); 4],
            below_since: std::vec![ago(held); 4],
            last_scaled: ago(rested),
            last_out: ago(rested),
            paused: paused.then(|| "hosts failed".to_string()),
            silent: silent.then(|| ("nobody is heard".to_string(), None)),
            ..view()
        }
    }
}

proptest! {
    #[test]
    fn no_decision_leads_above_the_maximum_or_below_the_minimum(policy in some_policy(), view in some_view()) {
        match decide(&policy, &view) {
            Decision::Hold { .. } => {}
            Decision::Out { keep, create, .. } => {
                prop_assert!(create == 0 || view.hosts + create <= policy.max, "FL-11: {create} of {}", view.hosts);
                prop_assert!(view.supply + keep.len() as u32 + create <= policy.max);
                prop_assert!(view.paused.is_none() || create == 0);
                prop_assert!(keep.iter().all(|node| view.cancellable.contains(node)));
            }
            Decision::In { release, busy, .. } => {
                prop_assert!(view.supply - release.len() as u32 >= policy.min);
                prop_assert!(release.iter().all(|node| view.idle.iter().any(|host| host.node == *node)), "FL-8");
                prop_assert!(busy.is_none());
                prop_assert!(view.silent.is_none(), "FL-12");
                if let Some(Share::Hosts(most)) = policy.max_draining {
                    prop_assert!(view.draining + release.len() as u32 <= most);
                }
            }
        }
    }

    #[test]
    fn below_the_minimum_it_grows_unless_that_is_impossible(policy in some_policy(), view in some_view()) {
        let room = view.hosts < policy.max || !view.cancellable.is_empty();
        if view.supply < policy.min && view.paused.is_none() && room {
            let grows = matches!(decide(&policy, &view), Decision::Out { .. });
            prop_assert!(grows);
        }
    }

    #[test]
    fn missing_data_never_sends_a_host_away(policy in some_policy(), view in some_view()) {
        let mut blind = view;
        blind.readings.cpu = Reading::NoData { fresh: 1, of: 9 };
        let excess = blind.supply > policy.max;
        if policy.preset == Preset::Thresholds && !excess {
            prop_assert_eq!(released(&decide(&policy, &blind)), 0);
        }
    }

    #[test]
    fn nothing_flaps_within_the_cooldown(policy in some_policy(), view in some_view()) {
        // Whatever has just been decided, the same numbers ask for nothing opposite at once.
        let fresh = PoolView { last_scaled: Some(NOW), last_out: Some(NOW), ..view };
        let pool = PoolPolicy { scale_in: None, ..policy };
        if fresh.supply <= pool.max {
            prop_assert_eq!(released(&decide(&pool, &fresh)), 0);
        }
    }

    #[test]
    fn the_explanation_never_contradicts_the_decision(policy in some_policy(), view in some_view()) {
        let lines = explain(&policy, &view).join("\n");
        match decide(&policy, &view) {
            Decision::In { release, .. } => {
                let sentence = std::format!("{} hosts to go", release.len());
                prop_assert!(lines.contains(&sentence));
            }
            Decision::Out { create, .. } => {
                let sentence = std::format!("{create} to be made");
                prop_assert!(lines.contains(&sentence));
            }
            Decision::Hold { .. } => {
                prop_assert!(lines.contains("scale-in    none") && lines.contains("scale-out   none"), "{lines}");
            }
        }
    }
}

fn rack(min: u32) -> PoolPolicy {
    PoolPolicy { provider: ProviderKind::Static, wake: Some("wake".into()), min, ..empty(4) }
}

fn woken(policy: &PoolPolicy, view: &PoolView) -> Vec<NodeId> {
    match decide(policy, view) {
        Decision::Out { wake, create: 0, .. } => wake,
        Decision::Out { .. } => panic!("nobody makes a host of a static pool"),
        Decision::Hold { .. } | Decision::In { .. } => Vec::new(),
    }
}

#[test]
fn a_static_pool_wakes_as_many_as_it_wants_and_no_more_than_sleep() {
    let asleep = Vec::from([NodeId(8), NodeId(7)]);
    let view = PoolView { asleep: asleep.clone(), ..view() };
    assert_eq!(woken(&rack(2), &view), [NodeId(8)], "the first in order");
    assert_eq!(woken(&rack(4), &view), asleep, "one more is wanted");
    let told = explain(&rack(4), &view).join("\n");
    assert!(told.contains("2 to be woken, 0 drains to be cancelled: 1 hosts are fewer than min 4"), "{told}");
    assert!(told.contains("3 are to be woken, 2 are asleep") && told.contains("2 hosts; `wake` wakes them"), "{told}");
    let kept = PoolView { cancellable: Vec::from([NodeId(3)]), hosts: 2, draining: 1, ..view.clone() };
    assert_eq!(woken(&rack(3), &kept), [NodeId(8)], "its own drain is cancelled first");
    assert_eq!(woken(&rack(3), &PoolView { hosts: 4, ..view.clone() }), [], "what still leaves counts against max 4");
    let waking = PoolView { supply: 3, booting: 2, hosts: 3, asleep: Vec::new(), ..view };
    assert_eq!(decide(&rack(4), &waking), Decision::Hold { until: None });
    let told = explain(&rack(4), &waking).join("\n");
    assert!(told.contains("none, although 4 are wanted: no host of the pool is asleep"), "{told}");
}

#[test]
fn a_static_pool_that_nobody_can_wake_asks_for_nothing_and_says_so() {
    let policy = PoolPolicy { wake: None, ..rack(2) };
    let view = PoolView { asleep: Vec::from([NodeId(7)]), ..view() };
    assert_eq!(decide(&policy, &view), Decision::Hold { until: None });
    let told = explain(&policy, &view).join("\n");
    assert!(told.contains("none, although 2 are wanted: 1 are asleep, and the policy has no `wake`"), "{told}");
    assert!(told.contains("1 hosts; the policy has no `wake`: a person starts them"), "{told}");
}

#[test]
fn a_paused_static_pool_wakes_one_at_a_time() {
    let asleep = Vec::from([NodeId(8), NodeId(7)]);
    let paused = PoolView { asleep, paused: Some("no route".into()), trial_at: Some(NOW), ..view() };
    assert_eq!(woken(&rack(4), &paused), [NodeId(8)]);
    assert_eq!(woken(&rack(4), &PoolView { booting: 1, supply: 2, ..paused.clone() }), []);
    assert_eq!(woken(&rack(4), &PoolView { trial_at: Some(NOW + Millis(1)), ..paused }), []);
}
