//! Amounts as people write them: sizes, cores, durations, ranges, `k=v`.
//! Every refusal is a sentence that says what would be right.

use std::time::Duration;

use muster_core::spec::CHECKPOINT_SIGNALS;

/// Bytes: `512`, `256K`, `256M`, `1.5G`, `2T`. K, M, G, T count by 1,024
/// (also written Ki or KiB); KB, MB, GB, TB count by 1,000.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size; write it like 512K, 256M or 1.5G");
    let (number, unit) = split_number(text).ok_or_else(wrong)?;
    let factor: u64 = match unit {
        "" | "B" => 1,
        "K" | "Ki" | "KiB" | "k" => 1 << 10,
        "M" | "Mi" | "MiB" => 1 << 20,
        "G" | "Gi" | "GiB" => 1 << 30,
        "T" | "Ti" | "TiB" => 1 << 40,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    scaled(number, factor).ok_or_else(wrong)
}

/// Thousandths of a core: `500m`, `2`, `0.5`.
pub fn cpu(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no amount of CPU; write it like 500m, 2 or 0.5");
    let (number, unit) = split_number(text).ok_or_else(wrong)?;
    let milli = match unit {
        "m" => scaled(number, 1),
        "" => scaled(number, 1_000),
        _ => None,
    };
    milli.filter(|milli| *milli > 0).ok_or_else(wrong)
}

/// A number of things without which there is nothing to do.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| format!("`{text}` is no number of 1 or more"))
}

/// A span: `250ms`, `90s`, `10m`, `1h30m`, `2d`. A bare number is refused: it has no unit.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration; write it with units, like 250ms, 90s, 10m or 1h30m");
    let mut rest = text;
    let mut total_ms: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
        let unit_ms: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        total_ms = number.checked_mul(unit_ms).and_then(|part| total_ms.checked_add(part)).ok_or_else(wrong)?;
        rest = &rest[letters..];
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_millis(total_ms)) }
}

/// Indexes of an array: `0-999`, or one number. Both ends belong to it.
pub fn array(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("`{text}` is no range of task indexes; write it like 0-999");
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let first: u32 = first.parse().map_err(|_| wrong())?;
    let last: u32 = last.parse().map_err(|_| wrong())?;
    let tasks = u64::from(last) + 1;
    if last < first {
        return Err(format!("the range {text} ends before it begins"));
    }
    if tasks - u64::from(first) > u64::from(muster_core::limits::TASKS_MAX) {
        return Err(format!("the range {text} has more than {} tasks", muster_core::limits::TASKS_MAX));
    }
    Ok((first, last))
}

/// A label, constraint or setting: `key=value`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not of the form key=value")),
    }
}

fn split_number(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// `number` (digits, perhaps a point and at most nine more) times `factor`, exact.
fn scaled(number: &str, factor: u64) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || part.is_empty() || part.len() > 9 {
        return None;
    }
    let whole: u128 = whole.parse().ok()?;
    let divisor = 10u128.pow(u32::try_from(part.len()).ok()?);
    let part: u128 = part.parse().ok()?;
    let factor = u128::from(factor);
    u64::try_from(whole.checked_mul(factor)? + part * factor / divisor).ok()
}

/// A number, or a part of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// So many.
    Count(u32),
    /// So many of a hundred.
    Percent(u32),
}

impl Part {
    /// So many of `whole`; a part is rounded down, and is at least 1.
    pub fn of(self, whole: usize) -> u32 {
        let whole = u32::try_from(whole).unwrap_or(u32::MAX);
        match self {
            Self::Count(count) => count,
            Self::Percent(percent) => {
                u32::try_from(u64::from(whole) * u64::from(percent) / 100).unwrap_or(u32::MAX).max(1)
            }
        }
    }
}

/// `10` or `10%`: at least 1.
pub fn part(text: &str) -> Result<Part, String> {
    let number = |digits: &str| digits.parse().ok().filter(|number| *number > 0);
    let read = match text.strip_suffix('%') {
        Some(digits) => number(digits).filter(|percent| *percent <= 100).map(Part::Percent),
        None => number(text).map(Part::Count),
    };
    read.ok_or_else(|| String::from("write a number like 10, or a part like 10%; at least 1"))
}

/// `USR1` or `SIGUSR1`: a signal that may ask a job to save, as Linux's number.
pub fn signal(text: &str) -> Result<u8, String> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let known = CHECKPOINT_SIGNALS.iter().find(|(known, _)| *known == name);
    known.map(|(_, number)| *number).ok_or_else(|| {
        let names: Vec<&str> = CHECKPOINT_SIGNALS.iter().map(|(name, _)| *name).collect();
        format!("there is no signal {text:?} to save by; there are {}", names.join(", "))
    })
}

/// `r3`, or `3`: a rolling drain.
pub fn rolling(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix('r').unwrap_or(text);
    digits.parse().map_err(|_| String::from("write it as `muster drain list` does: r3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_a_number_or_percent_and_never_none() {
        assert_eq!(part("10"), Ok(Part::Count(10)));
        assert_eq!(part("10%").map(|part| part.of(25)), Ok(2));
        assert_eq!(part("1%").map(|part| part.of(25)), Ok(1), "at least one");
        for wrong in ["0", "0%", "101%", "-1", "ten", ""] {
            assert!(part(wrong).is_err(), "{wrong}");
        }
        assert_eq!((signal("USR1"), signal("SIGTERM"), signal("KILL").is_err()), (Ok(10), Ok(15), true));
        assert_eq!((rolling("r3"), rolling("3"), rolling("x3").is_err()), (Ok(3), Ok(3), true));
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("256M", 256 << 20),
            ("1.5G", 3 << 29),
            ("2MB", 2_000_000),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1,5G", "-1", "5X", "1.2.3", "99999999999T", "1e3"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cores_are_thousandths_or_whole() {
        for (text, milli) in [("500m", 500), ("2", 2_000), ("0.5", 500), ("1.25", 1_250)] {
            assert_eq!(cpu(text), Ok(milli), "{text}");
        }
        for text in ["0", "0m", "x", "-1", "1k", ""] {
            assert!(cpu(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_units() {
        for (text, ms) in [("250ms", 250), ("90s", 90_000), ("1h30m", 5_400_000), ("2d", 172_800_000), ("0s", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "10", "m", "1w", "10 m", "99999999999999999999s", "1.5h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn arrays_have_both_ends() {
        assert_eq!(array("0-999"), Ok((0, 999)));
        assert_eq!(array("7"), Ok((7, 7)));
        for text in ["", "9-1", "a-b", "1-", "0-4294967295"] {
            assert!(array(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pairs_need_a_key() {
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(pair("=b").is_err());
        assert!(pair("b").is_err());
    }
}
