//! Numbers as people write them in a policy: spans, sizes, parts, money.

use alloc::{format, string::String};
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::time::Millis;

/// A factor of one, in thousandths.
pub const WHOLE: u32 = 1_000;
/// One hundredth, in thousandths.
pub const PERCENT: u64 = 10;
/// Units of time in milliseconds, the largest first.
const SPANS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
/// Units of size in bytes, the largest first.
const SIZES: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("kB", 1_000),
    ("B", 1),
];
/// Millionths of the currency's unit.
const MICRO: u64 = 1_000_000;

/// The most that a price or budget may be: below it, millionths are whole in a fraction's 53 bits, and so an amount
/// reads back as it was written.
const MONEY_MAX: u64 = 1_000_000_000 * MICRO;

/// An amount of money in millionths of whatever currency the policy's author thinks in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Money(pub u64);

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / MICRO, self.0 % MICRO);
        let digits = format!("{part:06}");
        let short = digits.trim_end_matches('0');
        write!(f, "{whole}.{short:0<2}")
    }
}

/// A value that may be written as a number or with a unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Amount {
    Whole(u64),
    Fraction(f64),
    Text(String),
}

impl Amount {
    /// In `scale`ths; `suffix` may follow it as text.
    pub(super) fn scaled(&self, scale: u64, suffix: &str) -> Result<u64, String> {
        match self {
            Self::Whole(whole) => whole.checked_mul(scale).ok_or_else(|| String::from("is too large")),
            Self::Fraction(fraction) if *fraction >= 0.0 && *fraction < 1e12 => {
                // Bounded above, and a fraction of the scale is rounded to the nearest.
                Ok((*fraction * scale as f64 + 0.5) as u64)
            }
            Self::Fraction(_) => Err(String::from("must be zero or more")),
            Self::Text(text) => {
                let number = text.trim().strip_suffix(suffix).unwrap_or(text).trim();
                decimal(number, scale).ok_or_else(|| format!("`{text}` is not a number like 1.5"))
            }
        }
    }

    /// The shortest form of so many `scale`ths.
    pub(super) fn of_scaled(value: u64, scale: u64) -> Self {
        if value.is_multiple_of(scale) {
            Self::Whole(value / scale)
        } else {
            Self::Fraction(value as f64 / scale as f64)
        }
    }

    /// A span with its unit: "300s", "1h30m".
    pub(super) fn span(&self) -> Result<Millis, String> {
        match self {
            Self::Text(text) => span(text),
            Self::Whole(0) => Ok(Millis(0)),
            Self::Whole(_) | Self::Fraction(_) => Err(String::from("needs a unit, as in \"300s\" or \"10m\"")),
        }
    }

    /// A size in bytes, or with its unit: "8GiB".
    pub(super) fn size(&self) -> Result<u64, String> {
        match self {
            Self::Whole(bytes) => Ok(*bytes),
            Self::Fraction(_) => Err(String::from("needs a unit, as in \"1.5GiB\"")),
            Self::Text(text) => size(text),
        }
    }
}

fn span(text: &str) -> Result<Millis, String> {
    let wrong = || format!("`{text}` is not a span like \"300s\", \"10m\" or \"1h30m\"");
    let mut rest = text.trim();
    let mut total = 0u64;
    let mut last = u64::MAX;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (_, unit) = SPANS.iter().find(|(name, _)| *name == &rest[..letters]).ok_or_else(wrong)?;
        if *unit >= last {
            return Err(wrong());
        }
        last = *unit;
        rest = &rest[letters..];
        total = number.checked_mul(*unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
    }
    Ok(Millis(total))
}

/// A span in the largest unit that loses nothing.
pub(super) fn span_text(span: Millis) -> Amount {
    let (name, unit) = SPANS.iter().find(|(_, unit)| span.0.is_multiple_of(*unit)).unwrap_or(&("ms", 1));
    if span.0 == 0 { Amount::Text(String::from("0s")) } else { Amount::Text(format!("{}{name}", span.0 / unit)) }
}

fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size like \"8GiB\" or \"500MB\"");
    let text = text.trim();
    let (name, unit) = SIZES.iter().find(|(name, _)| text.ends_with(name)).ok_or_else(wrong)?;
    decimal(text[..text.len() - name.len()].trim(), *unit).ok_or_else(wrong)
}

/// A size in the largest binary unit that loses nothing.
pub(super) fn size_text(bytes: u64) -> Amount {
    let binary = || SIZES.iter().take(4);
    match binary().find(|(_, unit)| bytes.is_multiple_of(*unit)) {
        Some((name, unit)) if bytes > 0 => Amount::Text(format!("{}{name}", bytes / unit)),
        Some(_) | None => Amount::Whole(bytes),
    }
}

/// A decimal number times `scale`; what is finer than that is cut off.
fn decimal(text: &str, scale: u64) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > 9 {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let fraction = if part.is_empty() { 0 } else { part.parse::<u128>().ok()? };
    let fraction = fraction * u128::from(scale) / 10u128.pow(u32::try_from(part.len()).ok()?);
    whole.checked_mul(scale)?.checked_add(u64::try_from(fraction).ok()?)
}

impl Money {
    pub(super) fn read(amount: &Amount) -> Result<Self, String> {
        match amount.scaled(MICRO, "")? {
            micro if micro > MONEY_MAX => Err(format!("is more than {}", MONEY_MAX / MICRO)),
            micro => Ok(Self(micro)),
        }
    }

    pub(super) fn write(self) -> Amount {
        Amount::of_scaled(self.0, MICRO)
    }

    /// What so many host-milliseconds cost at this price an hour.
    #[must_use]
    pub fn of_host_time(self, host_ms: u64) -> Self {
        Self(u64::try_from(u128::from(self.0) * u128::from(host_ms) / 3_600_000).unwrap_or(u64::MAX))
    }

    /// How many hosts at this price each can be paid from `budget`.
    #[must_use]
    pub fn hosts_from(self, budget: Self) -> u32 {
        budget.0.checked_div(self.0).map_or(u32::MAX, |hosts| u32::try_from(hosts).unwrap_or(u32::MAX))
    }
}
