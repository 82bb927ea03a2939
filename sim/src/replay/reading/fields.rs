//! Fields of a line: numbers and times.

use super::{Source, TraceError};

/// A column of a line, or what is wrong.
pub(super) fn column<'a>(
    source: &Source<'_>,
    line: usize,
    columns: &[&'a str],
    at: usize,
    name: &str,
) -> Result<&'a str, TraceError> {
    columns.get(at).copied().ok_or_else(|| {
        source.wrong(line, format!("column {} ({name}) is missing: the line has {}", at + 1, columns.len()))
    })
}

/// A number that is not negative.
pub(super) fn amount(source: &Source<'_>, line: usize, text: &str, name: &str) -> Result<f64, TraceError> {
    match text.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        Ok(_) => Err(source.wrong(line, format!("{name} is `{}`: it must be a number from 0 up", text.trim()))),
        Err(_) => Err(source.wrong(line, format!("{name} is `{}`: that is no number", shown(text)))),
    }
}

/// A whole number that may be negative.
pub(super) fn whole(source: &Source<'_>, line: usize, text: &str, name: &str) -> Result<i64, TraceError> {
    let parsed = text.parse::<i64>().ok().or_else(|| {
        // Some logs write 12.00 for 12.
        let number = text.parse::<f64>().ok().filter(|number| number.abs() < 1e15)?;
        #[allow(clippy::cast_possible_truncation, reason = "bounded above")]
        Some(number as i64)
    });
    parsed.ok_or_else(|| source.wrong(line, format!("{name} is `{}`: that is no number", shown(text))))
}

fn shown(text: &str) -> String {
    text.trim().chars().take(40).collect()
}

/// A time such as `2023-11-16 18:17:03.9799600`, in milliseconds since 1970.
pub(super) fn time(source: &Source<'_>, line: usize, text: &str) -> Result<u64, TraceError> {
    parse_time(text.trim())
        .ok_or_else(|| source.wrong(line, format!("the time is `{}`: it must be as 2023-11-16 18:17:03", shown(text))))
}

fn parse_time(text: &str) -> Option<u64> {
    let (date, clock) = text.split_once([' ', 'T'])?;
    let mut date = date.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let clock = clock.trim_end_matches('Z');
    let mut clock = clock.split(':');
    let (hours, minutes) = (clock.next()?.parse::<u64>().ok()?, clock.next()?.parse::<u64>().ok()?);
    let seconds = clock.next().map_or(Some(0.0), |seconds| seconds.parse::<f64>().ok())?;
    let is_possible = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hours < 24
        && minutes < 60
        && (0.0..61.0).contains(&seconds);
    if !is_possible {
        return None;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "less than a minute, not negative")]
    let millis = (seconds * 1_000.0) as u64;
    Some((days(year, month, day) * 24 + hours) * 3_600_000 + minutes * 60_000 + millis)
}

/// Days since 1970 (Hinnant, "chrono-compatible low-level date algorithms").
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year / 400;
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written_in_logs() {
        assert_eq!(parse_time("1970-01-02 00:00:01"), Some(86_401_000));
        assert_eq!(parse_time("2023-11-16 18:17:03.9799600"), Some(1_700_158_623_979));
        assert_eq!(parse_time("2024-02-29T23:59:00Z"), Some(1_709_251_140_000));
        for wrong in ["", "yesterday", "2023-11-16", "2023-13-01 00:00:00", "2023-11-16 25:00:00", "2023-11-16 1:x:0"] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }
}
