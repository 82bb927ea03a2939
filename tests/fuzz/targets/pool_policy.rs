//! Pool policies: TOML of people, written back as TOML for them and as JSON for
//! the store, and asked for its limits at some times.

use muster_core::{
    policy::{Bounds, PoolPolicy},
    time::Timestamp,
};

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target = Target {
    name: "pool_policy",
    shape: Shape::Text,
    words: &[
        "name = ",
        "provider = \"exec\"",
        "program = ",
        "min = ",
        "max = ",
        "preset = \"thresholds\"",
        "placement = \"spread\"",
        "boot_deadline = \"",
        "boot_failures = ",
        "max_draining = \"10%\"",
        "[host]\n",
        "cpu = ",
        "memory = \"",
        "disk = ",
        "[host.labels]\n",
        "[cost]\n",
        "price_per_hour = ",
        "billed_by = \"",
        "budget_per_day = ",
        "[scale_in]\n",
        "idle = \"",
        "busy = true",
        "deadline = \"",
        "[[scale_in.when]]\n",
        "[[scale_out]]\n",
        "metric = \"wait_time\"",
        "metric = \"cpu_utilization\"",
        "above = ",
        "below = ",
        "for = \"",
        "factor = ",
        "step = ",
        "cooldown = \"",
        "[[schedule]]\n",
        "days = [\"mon\"]",
        "from = \"08:30\"",
        "to = \"24:00\"",
        "utc_offset = \"+02:00\"",
        "0.5",
        "1e300",
        "nan",
        "-1",
        "1h30m",
        "8GiB",
        "500m",
        "80%",
    ],
    inputs_in_ci: 6_000,
    take,
    seeds,
};

/// Around a change of the year and of a week, and far from now.
const TIMES: [u64; 6] = [0, 1, 1_704_067_199_999, 1_704_067_200_000, 4_102_444_800_000, 253_402_300_799_000];

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(input) else { return Ok(()) };
    let read = toml::from_str::<PoolPolicy>(text);
    match &read {
        Ok(_) => signs.accepted = true,
        // The parser's drawing of the line is of the input's own text.
        Err(error) => signs.note("policy", error.message()),
    }
    let Ok(policy) = read else { return Ok(()) };
    signs.variant("preset", &policy.preset);
    signs.count("rules", policy.scale_out.len());
    policy.check().map_err(|bad| format!("what was read is wrong: {bad}"))?;
    let written = toml::to_string(&policy).map_err(|error| format!("cannot be written: {error}"))?;
    match toml::from_str::<PoolPolicy>(&written) {
        Ok(again) if again == policy => {}
        Ok(_) => return Err("what people are shown reads as another policy".into()),
        Err(error) => return Err(format!("what people are shown does not read: {}", error.message())),
    }
    let stored = serde_json::to_vec(&policy).map_err(|error| format!("cannot be stored: {error}"))?;
    match serde_json::from_slice::<PoolPolicy>(&stored) {
        Ok(again) if again == policy => {}
        Ok(_) => return Err("what is stored reads as another policy".into()),
        Err(error) => return Err(format!("what is stored does not read: {error}")),
    }
    for time in TIMES.map(Timestamp) {
        let bounds = Bounds::at(policy.min, policy.max, &policy.schedule, time);
        if bounds.min > bounds.max || bounds.max > policy.max {
            return Err(format!("{bounds:?} are no limits within {} to {}", policy.min, policy.max));
        }
    }
    Ok(())
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let all = r#"name = "burst"
provider = "exec"
program = "cloud.sh"
min = 1
max = 20
preset = "thresholds"
placement = "bin-pack"
boot_deadline = "5m"
boot_failures = 3
max_draining = "10%"
[host]
cpu = 4
memory = "8GiB"
disk = "1.5GiB"
[host.labels]
zone = "north"
[cost]
price_per_hour = 0.25
billed_by = "1m"
budget_per_hour = 4
budget_per_day = 60.5
[scale_in]
idle = "1m"
factor = 0.5
cooldown = "2m"
busy = true
deadline = "10m"
[[scale_in.when]]
metric = "cpu_utilization"
below = "20%"
for = "5m"
[[scale_out]]
metric = "queue_length"
above = 10
for = "30s"
step = 2
[[scale_out]]
metric = "wait_time"
above = "1m30s"
factor = 1.5
cooldown = "1m"
[[schedule]]
days = ["mon", "fri"]
from = "08:30"
to = "18:00"
utc_offset = "+02:00"
min = 4
max = 10
"#;
    let old = "name = \"old\"\nprovider = \"local\"\nmax = 5\nboot_deadline_ms = 60000\n[host]\ncpu_milli = 4000\n\
               memory_bytes = 8589934592\ndisk_bytes = 0\n[scale_in]\nidle_ms = 8000\nqueue_below = 4\n";
    vec![
        ("all", all.as_bytes().to_vec()),
        ("elastic", super::fleet::POOLS[1].as_bytes().to_vec()),
        ("of_an_older_release", old.as_bytes().to_vec()),
        ("static", super::fleet::POOLS[0].as_bytes().to_vec()),
    ]
}
