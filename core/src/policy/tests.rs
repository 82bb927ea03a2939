//! What a policy's file means, and how a wrong one is refused.

use std::string::ToString as _;

use proptest::prelude::*;

use super::*;

/// A policy of the first release, as its row was stored.
const OLD_ROW: &str = r#"{"name":"local","provider":"local","min":0,"max":4,"placement":"bin-pack",
"host":{"cpu_milli":500,"memory_bytes":134217728,"disk_bytes":1000,"labels":{"zone":"a"}},
"boot_deadline_ms":60000,"boot_failures":3,
"scale_out":[{"metric":"queue_length","above":4,"hold_ms":1500,"step":1,"cooldown_ms":0}],
"scale_in":{"idle_ms":1000,"queue_below":1,"step":1,"cooldown_ms":400}}"#;

fn read(json: &str) -> Result<PoolPolicy, String> {
    serde_json::from_str(json).map_err(|error| error.to_string())
}

fn with(keys: &str) -> Result<PoolPolicy, String> {
    let host = r#""host":{"cpu":4,"memory":"8GiB","disk":"20GiB"}"#;
    read(&std::format!(r#"{{"name":"batch","provider":"local","max":20,{host}{keys}}}"#))
}

fn written_again(policy: &PoolPolicy) -> PoolPolicy {
    read(&serde_json::to_string(policy).expect("a policy is written")).expect("what was written is read")
}

#[test]
fn a_row_of_the_first_release_means_what_it_meant() {
    let policy = read(OLD_ROW).unwrap();
    assert_eq!((policy.preset, policy.placement), (Preset::None, PlacementOrder::BinPack));
    assert_eq!(
        policy.scale_out,
        [ScaleOut {
            metric: Metric::QueueLength,
            above: 4,
            hold: Millis(1_500),
            change: Change::Step(1),
            cooldown: Some(Millis(0)),
        }]
    );
    let below = Below { metric: Metric::QueueLength, below: 1, hold: Millis(0) };
    let rule = ScaleIn { when: Vec::from([below]), cooldown: Some(Millis(400)), ..ScaleIn::one_by_one(Millis(1_000)) };
    assert_eq!(policy.scale_in, Some(rule));
    assert_eq!(written_again(&policy), policy);
}

#[test]
fn an_old_row_without_rules_does_not_begin_to_scale() {
    let row = OLD_ROW.split(r#""scale_out""#).next().unwrap().trim_end().trim_end_matches(',').to_string() + "}";
    assert!(read(&row).unwrap().is_fixed());
}

#[test]
fn the_least_that_a_policy_says_is_its_maximum() {
    let policy = with("").unwrap();
    assert_eq!((policy.min, policy.max, policy.preset), (0, 20, Preset::Demand));
    assert_eq!(policy.placement, PlacementOrder::BinPack);
    let without = r#"{"name":"b","provider":"local","host":{"cpu":4,"memory":"8GiB","disk":0}}"#;
    assert!(read(without).unwrap_err().contains("missing field `max`"));
}

#[test]
fn the_preset_thresholds_is_as_it_is_documented() {
    let policy = with(r#","preset":"thresholds""#).unwrap();
    assert_eq!(policy.min, 1);
    let out: Vec<(&str, u64, Millis, Change)> =
        policy.out_rules().iter().map(|rule| (rule.metric.name(), rule.above, rule.hold, rule.change)).collect();
    let twice = Change::Factor(2_000);
    assert_eq!(
        out,
        [
            ("cpu_utilization", 700, Millis::from_secs(300), twice),
            ("queue_length", 100, Millis::from_secs(60), twice),
            ("execution_latency", 1_000, Millis::from_secs(120), twice),
        ]
    );
    let rule = policy.in_rule().unwrap();
    assert_eq!((rule.change, rule.busy), (Change::Factor(500), None));
    let when: Vec<(&str, u64, Millis)> = rule.when.iter().map(|one| (one.metric.name(), one.below, one.hold)).collect();
    assert_eq!(when, [("cpu_utilization", 300, Millis::from_secs(600)), ("queue_length", 10, Millis::from_secs(300))]);
}

#[test]
fn values_that_cannot_be_are_refused_by_their_key() {
    let cases = [
        (r#","min":21"#, "`min` is 21, more than max 20"),
        (r#","boot_deadline":300"#, "`boot_deadline` needs a unit"),
        (r#","boot_deadline":"5 parsecs""#, "`boot_deadline` `5 parsecs` is not a span"),
        (r#","boot_failures":0"#, "`boot_failures` is at least 1"),
        (r#","max_draining":"0%""#, "`max_draining` is from 1 to 100 %"),
        (r#","scale_out":[{"metric":"queue_length","above":"2s"}]"#, "`scale_out[0].above` is a whole number"),
        (r#","scale_out":[{"metric":"wait_time","above":2}]"#, "`scale_out[0].above` needs a unit"),
        (r#","scale_out":[{"metric":"cpu_utilization","above":170}]"#, "`scale_out[0].above` is more than 100 %"),
        (r#","scale_out":[{"metric":"queue_length","above":2,"step":0}]"#, "`scale_out[0].step` is at least 1"),
        (r#","scale_out":[{"metric":"queue_length","above":2,"factor":0.5}]"#, "`scale_out[0].factor` is more than 1"),
        (r#","scale_in":{"factor":2}"#, "`scale_in.factor` is less than 1"),
        (r#","scale_in":{"step":1,"factor":0.5}"#, "`scale_in.factor` and `step` exclude each other"),
        (r#","scale_in":{"deadline":"5m"}"#, "`scale_in.deadline` is for hosts with work"),
        (r#","scale_in":{"when":[{"metric":"wait_time","below":"x"}]}"#, "`scale_in.when[0].below` `x` is not"),
        (r#","cost":{"price_per_hour":0}"#, "`cost.price_per_hour` is more than zero"),
        (r#","schedule":[{"from":"8:00","to":"18:00","min":1}]"#, "`schedule[0].from` `8:00` is not a time of day"),
        (r#","schedule":[{"from":"08:00","to":"18:00"}]"#, "`schedule[0].min` or `max` must be there"),
        (r#","shceme":1"#, "unknown field `shceme`"),
        (r#","scale_in":{"idel":"5m"}"#, "unknown field `idel`"),
        (r#","scale_out":[{"metric":"cpu","above":70}]"#, "unknown variant `cpu`"),
    ];
    for (keys, sentence) in cases {
        let error = with(keys).expect_err(keys);
        assert!(error.contains(sentence), "{keys}: {error}");
    }
}

#[test]
fn every_key_is_written_as_it_is_read() {
    let policy = with(
        r#","min":1,"placement":"spread","boot_deadline":"2m","boot_failures":5,"max_draining":"10%",
        "scale_out":[{"metric":"cpu_utilization","above":"72.5%","for":"90s","factor":1.5},
                     {"metric":"wait_time","above":"2s","step":3,"cooldown":"1h30m"}],
        "scale_in":{"when":[{"metric":"memory_utilization","below":30,"for":"10m"}],"idle":"45s","factor":0.75,
                    "busy":true,"deadline":"20m"},
        "schedule":[{"days":["mon","fri"],"from":"08:00","to":"18:30","utc_offset":"-05:00","min":4,"max":9}],
        "cost":{"price_per_hour":0.19,"billed_by":"1h","budget_per_hour":"3.00","budget_per_day":40}"#,
    )
    .unwrap();
    assert_eq!(policy.scale_out[0].above, 725);
    assert_eq!(policy.scale_out[1].cooldown, Some(Millis::from_secs(5_400)));
    assert_eq!(policy.scale_in.as_ref().and_then(|rule| rule.busy), Some(Millis::from_secs(1_200)));
    let cost = policy.cost.expect("a cost");
    assert_eq!((cost.price_per_hour, cost.budget_per_hour), (Money(190_000), Some(Money(3_000_000))));
    assert_eq!((cost.price_per_hour.to_string(), Money(3_000_000).to_string()), ("0.19".into(), "3.00".into()));
    assert_eq!(cost.price_per_hour.hosts_from(Money(3_000_000)), 15);
    assert_eq!(written_again(&policy), policy);
}

#[test]
fn factors_round_up_and_always_change_something() {
    assert_eq!(Change::Factor(1_500).applied_to(3, true), 5);
    assert_eq!(Change::Factor(1_001).applied_to(3, true), 4);
    assert_eq!(Change::Factor(500).applied_to(5, false), 3);
    assert_eq!(Change::Factor(999).applied_to(1, false), 0);
    assert_eq!(Change::Factor(2_000).applied_to(0, true), 1);
}

proptest! {
    #[test]
    fn spans_and_sizes_come_back_as_they_were(ms in 0u64..10_000_000_000, bytes in 0u64..1 << 50) {
        prop_assert_eq!(amounts::span_text(Millis(ms)).span(), Ok(Millis(ms)));
        prop_assert_eq!(amounts::size_text(bytes).size(), Ok(bytes));
    }
}

#[test]
fn a_program_is_a_plain_name_and_for_exec_only() {
    let with = |provider: &str, program: &str| {
        let host = serde_json::json!({"cpu": 1, "memory": "1GiB", "disk": "1GiB"});
        let text =
            serde_json::json!({"name": "batch", "provider": provider, "program": program, "max": 1u32, "host": host});
        serde_json::from_value::<PoolPolicy>(text).map_err(|error| error.to_string())
    };
    let policy = with("exec", "qemu-2").unwrap();
    assert_eq!(policy.program(), "qemu-2");
    assert_eq!(written_again(&policy), policy);
    for bad in ["../x", "", ".hidden", "a b", "a/b"] {
        assert!(with("exec", bad).unwrap_err().contains("`program`"), "{bad}");
    }
    assert!(with("local", "qemu").unwrap_err().contains("`program`"));
}

#[test]
fn sleep_and_wake_are_for_static_pools_only() {
    let with = |provider: &str, key: &str, value: &str| {
        let host = serde_json::json!({"cpu": 1, "memory": "1GiB", "disk": "1GiB"});
        let mut text = serde_json::json!({"name": "rack", "provider": provider, "max": 1u32, "host": host});
        text[key] = value.into();
        serde_json::from_value::<PoolPolicy>(text).map_err(|error| error.to_string())
    };
    let woken = with("static", "wake", "wake-on-lan").unwrap();
    assert_eq!((woken.sleep, woken.wake.as_deref()), (Sleep::Stop, Some("wake-on-lan")));
    assert_eq!(written_again(&woken), woken);
    let off = with("static", "sleep", "poweroff").unwrap();
    assert_eq!((off.sleep, &off.wake), (Sleep::Poweroff, &None));
    assert_eq!(written_again(&off), off);
    for (provider, key, value) in [("exec", "wake", "w"), ("local", "sleep", "stop"), ("exec", "sleep", "poweroff")] {
        let error = with(provider, key, value).unwrap_err();
        assert_eq!(error, std::format!("`{key}` is for `provider = \"static\"` only"));
    }
    assert!(with("static", "wake", "../x").unwrap_err().starts_with("`wake` is the name of a file"));
    assert!(with("static", "sleep", "hibernate").unwrap_err().contains("hibernate"));
    // An older coordinator refuses keys that it does not know: where they say nothing they are not written.
    let plain = serde_json::to_string(&with("static", "sleep", "stop").unwrap()).unwrap();
    assert!(!plain.contains("sleep") && !plain.contains("wake"), "{plain}");
}
