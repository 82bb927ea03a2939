//! A policy as its file has it, and the checks between that and [`PoolPolicy`].
//! Keys of older releases (`hold_ms`, `idle_ms`, ...) are read and never written.

use alloc::{
    collections::BTreeMap,
    format,
    string::{String, ToString as _},
    vec::Vec,
};
use core::fmt;

use serde::{Deserialize, Serialize};

use super::{
    Below, Change, Cost, HostTemplate, Metric, Money, PERCENT, PlacementOrder, PoolPolicy, Preset, ProviderKind,
    ScaleIn, ScaleOut, Share, Sleep, WHOLE, Window,
    amounts::{self, Amount},
    schedule::{self, Day},
};
use crate::{ids::PoolName, limits, time::Millis};

/// Default of `boot_deadline`.
pub(super) const BOOT_DEADLINE: Millis = Millis::from_secs(300);
/// Default of `boot_failures`.
pub(super) const BOOT_FAILURES: u32 = 3;
/// Default of `scale_in.idle`.
const IDLE: Millis = Millis::from_secs(60);
/// Rules, conditions or windows of one policy, at most.
const RULES_MAX: usize = 64;

/// A host's CPU, at most: far more than any has, and what reads back as it was written.
const CPU_MILLI_MAX: u64 = 1_000_000_000;
/// A host's memory or disk, at most.
const BYTES_MAX: u64 = 1 << 60;
/// Bytes of a program's name, at most.
const PROGRAM_BYTES_MAX: usize = 64;

/// A key whose value cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadKey {
    /// The key with the tables that it is in: `scale_out[0].for`.
    pub key: String,
    /// What is wrong with its value.
    pub why: String,
}

impl fmt::Display for BadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.key, self.why)
    }
}

impl core::error::Error for BadKey {}

fn bad<T>(key: impl Into<String>, why: impl Into<String>) -> Result<T, BadKey> {
    Err(BadKey { key: key.into(), why: why.into() })
}

fn at<T>(key: &str, value: Result<T, String>) -> Result<T, BadKey> {
    value.map_err(|why| BadKey { key: String::from(key), why })
}

/// The file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyText {
    name: PoolName,
    provider: ProviderKind,
    program: Option<String>,
    // Not written where they say nothing, so that an older coordinator reads all other policies.
    #[serde(skip_serializing_if = "Option::is_none")]
    sleep: Option<Sleep>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wake: Option<String>,
    min: Option<u32>,
    max: u32,
    preset: Option<Preset>,
    placement: Option<PlacementOrder>,
    boot_deadline: Option<Amount>,
    #[serde(skip_serializing)]
    boot_deadline_ms: Option<u64>,
    boot_failures: Option<u32>,
    max_draining: Option<Amount>,
    host: HostTemplate,
    cost: Option<CostText>,
    scale_in: Option<InText>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    scale_out: Vec<OutText>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    schedule: Vec<WindowText>,
}

/// `[host]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HostText {
    cpu: Option<Amount>,
    #[serde(skip_serializing)]
    cpu_milli: Option<u64>,
    memory: Option<Amount>,
    #[serde(skip_serializing)]
    memory_bytes: Option<u64>,
    disk: Option<Amount>,
    #[serde(skip_serializing)]
    disk_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
}

/// `[[scale_out]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutText {
    metric: Metric,
    above: Amount,
    #[serde(rename = "for")]
    hold: Option<Amount>,
    #[serde(skip_serializing)]
    hold_ms: Option<u64>,
    factor: Option<Amount>,
    step: Option<u32>,
    cooldown: Option<Amount>,
    #[serde(skip_serializing)]
    cooldown_ms: Option<u64>,
}

/// `[scale_in]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InText {
    idle: Option<Amount>,
    #[serde(skip_serializing)]
    idle_ms: Option<u64>,
    #[serde(skip_serializing)]
    queue_below: Option<u64>,
    factor: Option<Amount>,
    step: Option<u32>,
    cooldown: Option<Amount>,
    #[serde(skip_serializing)]
    cooldown_ms: Option<u64>,
    busy: Option<bool>,
    deadline: Option<Amount>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    when: Vec<BelowText>,
}

/// One of `scale_in.when`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BelowText {
    metric: Metric,
    below: Amount,
    #[serde(rename = "for")]
    hold: Option<Amount>,
}

/// `[cost]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostText {
    price_per_hour: Amount,
    billed_by: Option<Amount>,
    budget_per_hour: Option<Amount>,
    budget_per_day: Option<Amount>,
}

/// `[[schedule]]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowText {
    days: Option<Vec<Day>>,
    from: String,
    to: String,
    utc_offset: Option<String>,
    min: Option<u32>,
    max: Option<u32>,
}

/// The key of now, or the one of an older release; none: neither.
fn span(key: &str, now: Option<&Amount>, old_ms: Option<u64>) -> Result<Option<Millis>, BadKey> {
    let span = match (now, old_ms) {
        (Some(_), Some(_)) => return bad(key, format!("and `{key}_ms` are the same thing: leave one out")),
        (Some(now), None) => at(key, now.span())?,
        (None, Some(old)) => Millis(old),
        (None, None) => return Ok(None),
    };
    if span > schedule::SPAN_MAX { bad(key, "is longer than a year") } else { Ok(Some(span)) }
}

/// A threshold in its metric's unit.
fn threshold(key: &str, metric: Metric, amount: &Amount) -> Result<u64, BadKey> {
    match metric {
        Metric::CpuUtilization | Metric::MemoryUtilization | Metric::Pressure => {
            let permille = at(key, amount.scaled(PERCENT, "%"))?;
            if permille > u64::from(WHOLE) { bad(key, "is more than 100 %") } else { Ok(permille) }
        }
        Metric::QueueLength => match amount {
            Amount::Whole(tasks) => Ok(*tasks),
            Amount::Fraction(_) | Amount::Text(_) => bad(key, "is a whole number of tasks"),
        },
        Metric::ExecutionLatency | Metric::WaitTime => at(key, amount.span()).map(|span| span.0),
    }
}

fn threshold_text(metric: Metric, value: u64) -> Amount {
    match metric {
        Metric::CpuUtilization | Metric::MemoryUtilization | Metric::Pressure => Amount::of_scaled(value, PERCENT),
        Metric::QueueLength => Amount::Whole(value),
        Metric::ExecutionLatency | Metric::WaitTime => amounts::span_text(Millis(value)),
    }
}

/// A key that is there is one of this provider's.
fn only_for<T>(key: &str, of: ProviderKind, policy: ProviderKind, value: Option<T>) -> Result<Option<T>, BadKey> {
    if value.is_some() && policy != of {
        return bad(key, format!("is for `provider = \"{}\"` only", of.name()));
    }
    Ok(value)
}

/// The name of a file in the providers' folder, never a path out of it.
fn program(key: &str, name: Option<String>) -> Result<Option<String>, BadKey> {
    let Some(name) = name else { return Ok(None) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > PROGRAM_BYTES_MAX || name.starts_with('.') || !name.bytes().all(plain) {
        return bad(
            key,
            "is the name of a file in the coordinator's folder of providers: letters, digits, `-`, `_`, `.`",
        );
    }
    Ok(Some(name))
}

/// Either a factor or a step.
fn change(table: &str, factor: Option<&Amount>, step: Option<u32>, outwards: bool) -> Result<Change, BadKey> {
    match (factor, step) {
        (Some(_), Some(_)) => bad(format!("{table}.factor"), "and `step` exclude each other: leave one out"),
        (None, Some(0)) => bad(format!("{table}.step"), "is at least 1"),
        (None, Some(step)) => Ok(Change::Step(step)),
        (None, None) => Ok(Change::Step(1)),
        (Some(factor), None) => {
            let key = format!("{table}.factor");
            let permille = at(&key, factor.scaled(u64::from(WHOLE), ""))?;
            let permille = u32::try_from(permille).unwrap_or(u32::MAX);
            match (outwards, permille) {
                (true, 0..=WHOLE) => bad(key, "is more than 1 for scale-out, as in 2 for twice as many hosts"),
                (false, WHOLE..) => bad(key, "is less than 1 for scale-in, as in 0.5 for half of the hosts"),
                (_, permille) if permille > 1_000 * WHOLE => bad(key, "is more than 1000"),
                (_, permille) => Ok(Change::Factor(permille)),
            }
        }
    }
}

fn change_text(change: Change) -> (Option<Amount>, Option<u32>) {
    match change {
        Change::Step(step) => (None, Some(step)),
        Change::Factor(permille) => (Some(Amount::of_scaled(u64::from(permille), u64::from(WHOLE))), None),
    }
}

impl OutText {
    fn read(&self, table: &str) -> Result<ScaleOut, BadKey> {
        let key = |name: &str| format!("{table}.{name}");
        Ok(ScaleOut {
            metric: self.metric,
            above: threshold(&key("above"), self.metric, &self.above)?,
            hold: span(&key("for"), self.hold.as_ref(), self.hold_ms)?.unwrap_or_default(),
            change: change(table, self.factor.as_ref(), self.step, true)?,
            cooldown: span(&key("cooldown"), self.cooldown.as_ref(), self.cooldown_ms)?,
        })
    }

    fn write(rule: &ScaleOut) -> Self {
        let (factor, step) = change_text(rule.change);
        Self {
            metric: rule.metric,
            above: threshold_text(rule.metric, rule.above),
            hold: Some(amounts::span_text(rule.hold)),
            hold_ms: None,
            factor,
            step,
            cooldown: rule.cooldown.map(amounts::span_text),
            cooldown_ms: None,
        }
    }
}

impl InText {
    fn read(&self) -> Result<ScaleIn, BadKey> {
        let mut when = Vec::new();
        if let Some(below) = self.queue_below {
            when.push(Below { metric: Metric::QueueLength, below, hold: Millis(0) });
        }
        for (index, one) in self.when.iter().enumerate() {
            let key = |name: &str| format!("scale_in.when[{index}].{name}");
            when.push(Below {
                metric: one.metric,
                below: threshold(&key("below"), one.metric, &one.below)?,
                hold: span(&key("for"), one.hold.as_ref(), None)?.unwrap_or_default(),
            });
        }
        let deadline = span("scale_in.deadline", self.deadline.as_ref(), None)?;
        let busy = match (self.busy.unwrap_or(false), deadline) {
            (true, deadline) => Some(deadline.unwrap_or(limits::DRAIN_DEADLINE)),
            (false, Some(_)) => {
                return bad("scale_in.deadline", "is for hosts with work on them: it needs `busy = true`");
            }
            (false, None) => None,
        };
        Ok(ScaleIn {
            when,
            idle: span("scale_in.idle", self.idle.as_ref(), self.idle_ms)?.unwrap_or(IDLE),
            change: change("scale_in", self.factor.as_ref(), self.step, false)?,
            cooldown: span("scale_in.cooldown", self.cooldown.as_ref(), self.cooldown_ms)?,
            busy,
        })
    }

    fn write(rule: ScaleIn) -> Self {
        let (factor, step) = change_text(rule.change);
        let when = rule.when.into_iter().map(|one| BelowText {
            metric: one.metric,
            below: threshold_text(one.metric, one.below),
            hold: Some(amounts::span_text(one.hold)),
        });
        Self {
            idle: Some(amounts::span_text(rule.idle)),
            idle_ms: None,
            queue_below: None,
            factor,
            step,
            cooldown: rule.cooldown.map(amounts::span_text),
            cooldown_ms: None,
            busy: rule.busy.map(|_| true),
            deadline: rule.busy.map(amounts::span_text),
            when: when.collect(),
        }
    }
}

impl CostText {
    fn read(&self) -> Result<Cost, BadKey> {
        let money = |key: &str, amount: &Option<Amount>| match amount {
            Some(amount) => at(key, Money::read(amount)).map(Some),
            None => Ok(None),
        };
        let price_per_hour = at("cost.price_per_hour", Money::read(&self.price_per_hour))?;
        if price_per_hour == Money(0) {
            return bad("cost.price_per_hour", "is more than zero");
        }
        let billed_by = span("cost.billed_by", self.billed_by.as_ref(), None)?.unwrap_or(Millis::from_secs(1));
        if billed_by == Millis(0) {
            return bad("cost.billed_by", "is more than zero");
        }
        Ok(Cost {
            price_per_hour,
            billed_by,
            budget_per_hour: money("cost.budget_per_hour", &self.budget_per_hour)?,
            budget_per_day: money("cost.budget_per_day", &self.budget_per_day)?,
        })
    }

    fn write(cost: Cost) -> Self {
        Self {
            price_per_hour: cost.price_per_hour.write(),
            billed_by: Some(amounts::span_text(cost.billed_by)),
            budget_per_hour: cost.budget_per_hour.map(Money::write),
            budget_per_day: cost.budget_per_day.map(Money::write),
        }
    }
}

impl WindowText {
    fn read(&self, table: &str) -> Result<Window, BadKey> {
        let key = |name: &str| format!("{table}.{name}");
        let days = self.days.clone().unwrap_or_else(|| Vec::from(Day::ALL));
        if days.is_empty() {
            return bad(key("days"), "names at least one day");
        }
        if self.min.is_none() && self.max.is_none() {
            return bad(key("min"), "or `max` must be there: else the window changes nothing");
        }
        if self.min > self.max && self.max.is_some() {
            return bad(key("min"), "is more than its `max`");
        }
        Ok(Window {
            days,
            from: at(&key("from"), schedule::time_of_day(&self.from))?,
            to: at(&key("to"), schedule::time_of_day(&self.to))?,
            utc_offset: at(&key("utc_offset"), self.utc_offset.as_deref().map_or(Ok(0), schedule::offset))?,
            min: self.min,
            max: self.max,
        })
    }

    fn write(window: Window) -> Self {
        Self {
            days: Some(window.days),
            from: schedule::time_text(window.from),
            to: schedule::time_text(window.to),
            utc_offset: Some(schedule::offset_text(window.utc_offset)),
            min: window.min,
            max: window.max,
        }
    }
}

impl TryFrom<HostText> for HostTemplate {
    type Error = BadKey;

    fn try_from(text: HostText) -> Result<Self, BadKey> {
        let amount = |key: &str, now: Option<Result<u64, String>>, old: Option<u64>| match (now, old) {
            (Some(now), None) => at(key, now),
            (None, Some(old)) => Ok(old),
            (Some(_), Some(_)) => bad(key, "is there twice, once with its unit in its name: leave one out"),
            (None, None) => bad(key, "is missing: say what a host has"),
        };
        let milli = |amount: &Amount| match amount {
            Amount::Text(text) if text.ends_with('m') => {
                Amount::Text(text.trim_end_matches('m').to_string()).scaled(1, "")
            }
            Amount::Whole(_) | Amount::Fraction(_) | Amount::Text(_) => amount.scaled(1_000, ""),
        };
        let template = Self {
            cpu_milli: amount("host.cpu", text.cpu.as_ref().map(milli), text.cpu_milli)?,
            memory_bytes: amount("host.memory", text.memory.as_ref().map(Amount::size), text.memory_bytes)?,
            disk_bytes: amount("host.disk", text.disk.as_ref().map(Amount::size), text.disk_bytes)?,
            labels: text.labels,
        };
        if template.cpu_milli == 0 {
            return bad("host.cpu", "is more than zero");
        }
        if template.memory_bytes == 0 {
            return bad("host.memory", "is more than zero");
        }
        for (key, amount, most) in [
            ("host.cpu", template.cpu_milli, CPU_MILLI_MAX),
            ("host.memory", template.memory_bytes, BYTES_MAX),
            ("host.disk", template.disk_bytes, BYTES_MAX),
        ] {
            if amount > most {
                return bad(key, "is more than any host has");
            }
        }
        if template.labels.len() > limits::LABELS_MAX {
            return bad("host.labels", format!("are at most {}", limits::LABELS_MAX));
        }
        Ok(template)
    }
}

impl From<HostTemplate> for HostText {
    fn from(host: HostTemplate) -> Self {
        Self {
            cpu: Some(Amount::of_scaled(host.cpu_milli, 1_000)),
            cpu_milli: None,
            memory: Some(amounts::size_text(host.memory_bytes)),
            memory_bytes: None,
            disk: Some(amounts::size_text(host.disk_bytes)),
            disk_bytes: None,
            labels: host.labels,
        }
    }
}

impl PolicyText {
    /// What no preset means: rules that are written out stand alone, also those of a stored
    /// policy from before there were presets, which may be none at all.
    const fn preset(&self) -> Preset {
        let has_rules = !self.scale_out.is_empty() || self.scale_in.is_some() || self.boot_deadline_ms.is_some();
        match self.preset {
            Some(preset) => preset,
            None if has_rules => Preset::None,
            None => Preset::Demand,
        }
    }

    fn max_draining(&self) -> Result<Option<Share>, BadKey> {
        let key = "max_draining";
        match &self.max_draining {
            None => Ok(None),
            Some(Amount::Whole(0)) => bad(key, "is at least 1"),
            Some(Amount::Whole(hosts)) => Ok(Some(Share::Hosts(u32::try_from(*hosts).unwrap_or(u32::MAX)))),
            Some(text @ Amount::Text(written)) if written.ends_with('%') => match at(key, text.scaled(1, "%"))? {
                percent @ 1..=100 => Ok(Some(Share::Percent(u32::try_from(percent).unwrap_or(100)))),
                _out_of_range => bad(key, "is from 1 to 100 %"),
            },
            Some(Amount::Text(_) | Amount::Fraction(_)) => bad(key, "is a number of hosts, or a part like \"10%\""),
        }
    }
}

impl TryFrom<PolicyText> for PoolPolicy {
    type Error = BadKey;

    fn try_from(text: PolicyText) -> Result<Self, BadKey> {
        let preset = text.preset();
        let min = text.min.unwrap_or(match preset {
            Preset::Thresholds => 1.min(text.max),
            Preset::Demand | Preset::None => 0,
        });
        // Work that is spread over all hosts leaves none of them idle.
        let order = match preset {
            Preset::Demand | Preset::Thresholds => PlacementOrder::BinPack,
            Preset::None => PlacementOrder::Spread,
        };
        let out = text.scale_out.iter().enumerate();
        let windows = text.schedule.iter().enumerate();
        let policy = Self {
            min,
            max: text.max,
            preset,
            placement: text.placement.unwrap_or(order),
            boot_deadline: span("boot_deadline", text.boot_deadline.as_ref(), text.boot_deadline_ms)?
                .unwrap_or(BOOT_DEADLINE),
            boot_failures: text.boot_failures.unwrap_or(BOOT_FAILURES),
            scale_out: out.map(|(at, rule)| rule.read(&format!("scale_out[{at}]"))).collect::<Result<_, _>>()?,
            scale_in: text.scale_in.as_ref().map(InText::read).transpose()?,
            max_draining: text.max_draining()?,
            schedule: windows.map(|(at, one)| one.read(&format!("schedule[{at}]"))).collect::<Result<_, _>>()?,
            cost: text.cost.as_ref().map(CostText::read).transpose()?,
            name: text.name,
            provider: text.provider,
            program: program("program", only_for("program", ProviderKind::Exec, text.provider, text.program)?)?,
            sleep: only_for("sleep", ProviderKind::Static, text.provider, text.sleep)?.unwrap_or_default(),
            wake: program("wake", only_for("wake", ProviderKind::Static, text.provider, text.wake)?)?,
            host: text.host,
        };
        policy.check()?;
        Ok(policy)
    }
}

impl From<PoolPolicy> for PolicyText {
    fn from(policy: PoolPolicy) -> Self {
        Self {
            name: policy.name,
            provider: policy.provider,
            program: policy.program,
            sleep: Some(policy.sleep).filter(|sleep| *sleep != Sleep::default()),
            wake: policy.wake,
            min: Some(policy.min),
            max: policy.max,
            preset: Some(policy.preset),
            placement: Some(policy.placement),
            boot_deadline: Some(amounts::span_text(policy.boot_deadline)),
            boot_deadline_ms: None,
            boot_failures: Some(policy.boot_failures),
            max_draining: policy.max_draining.map(|share| match share {
                Share::Hosts(hosts) => Amount::Whole(u64::from(hosts)),
                Share::Percent(percent) => Amount::Text(format!("{percent}%")),
            }),
            host: policy.host,
            cost: policy.cost.map(CostText::write),
            scale_in: policy.scale_in.map(InText::write),
            scale_out: policy.scale_out.iter().map(OutText::write).collect(),
            schedule: policy.schedule.into_iter().map(WindowText::write).collect(),
        }
    }
}

impl PoolPolicy {
    /// What no single key can show.
    ///
    /// # Errors
    /// Names the first key whose value cannot be.
    pub fn check(&self) -> Result<(), BadKey> {
        if self.name.0.is_empty() || self.name.0.len() > limits::NAME_LEN_MAX {
            return bad("name", format!("has 1 to {} bytes", limits::NAME_LEN_MAX));
        }
        if self.min > self.max {
            return bad("min", format!("is {}, more than max {}", self.min, self.max));
        }
        if self.max as usize > limits::NODES_MAX {
            return bad("max", format!("is {}, more than a fleet's {} nodes", self.max, limits::NODES_MAX));
        }
        if self.boot_deadline == Millis(0) {
            return bad("boot_deadline", "is more than zero");
        }
        if self.boot_failures == 0 {
            return bad("boot_failures", "is at least 1");
        }
        let rules =
            [self.scale_out.len(), self.schedule.len(), self.scale_in.as_ref().map_or(0, |rule| rule.when.len())];
        match rules.iter().zip(["scale_out", "schedule", "scale_in.when"]).find(|(count, _)| **count > RULES_MAX) {
            Some((_, key)) => bad(key, format!("has at most {RULES_MAX} entries")),
            None => Ok(()),
        }
    }
}
