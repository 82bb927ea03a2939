//! Limits that hold at certain times of the week.

use alloc::{format, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::time::{Millis, Timestamp};

const MINUTE: u64 = 60_000;
const MINUTES_OF_DAY: u64 = 24 * 60;
const MINUTES_OF_WEEK: u64 = 7 * MINUTES_OF_DAY;
/// The first day of time was a Thursday, and weeks here begin on Monday.
const FIRST_WEEKDAY: u64 = 3;
/// No place on earth is further from UTC than this.
const OFFSET_MAX: i32 = 14 * 60;

/// Limits from one time of the day to another, on certain days.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// On these days; those on which it begins, if it goes past midnight.
    pub days: Vec<Day>,
    /// Minute of the day at which it begins.
    pub from: u32,
    /// Minute of the day at which it ends, of the next day if that is not later.
    pub to: u32,
    /// Minutes by which the times of day are ahead of UTC.
    pub utc_offset: i32,
    /// Never fewer hosts than this; none: as otherwise.
    pub min: Option<u32>,
    /// Never more hosts than this; none: as otherwise.
    pub max: Option<u32>,
}

/// A day of the week.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the days speak for themselves")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    /// The whole week.
    pub const ALL: [Self; 7] = [Self::Mon, Self::Tue, Self::Wed, Self::Thu, Self::Fri, Self::Sat, Self::Sun];
}

/// Limits in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// At least.
    pub min: u32,
    /// At most.
    pub max: u32,
    /// They may change then.
    pub until: Option<Timestamp>,
}

impl Bounds {
    /// Of several windows in force, the highest minimum and the lowest maximum; the maximum wins.
    #[must_use]
    pub fn at(min: u32, max: u32, schedule: &[Window], now: Timestamp) -> Self {
        let (mut floor, mut cap) = (None, None);
        let mut until = None;
        for window in schedule {
            let (active, edge) = window.state(now);
            until = Some(until.map_or(edge, |until: Timestamp| until.min(edge)));
            if active {
                floor = floor.max(window.min);
                cap = match (cap, window.max) {
                    (Some(one), Some(other)) => Some(u32::min(one, other)),
                    (one, other) => one.or(other),
                };
            }
        }
        let max = cap.unwrap_or(max).min(max);
        Self { min: floor.unwrap_or(min).min(max), max, until }
    }
}

impl Window {
    /// Is it in force, and when does that change next?
    fn state(&self, now: Timestamp) -> (bool, Timestamp) {
        let shifted =
            (now.0 / MINUTE).saturating_add_signed(i64::from(self.utc_offset)) + FIRST_WEEKDAY * MINUTES_OF_DAY;
        let minute = shifted % MINUTES_OF_WEEK;
        let length = match u64::from((self.to + 1_440 - self.from) % 1_440) {
            0 => MINUTES_OF_DAY,
            length => length,
        };
        let mut active = false;
        let mut edge = MINUTES_OF_WEEK;
        for day in &self.days {
            let begin = *day as u64 * MINUTES_OF_DAY + u64::from(self.from);
            let into = (minute + MINUTES_OF_WEEK - begin) % MINUTES_OF_WEEK;
            if into < length {
                active = true;
                edge = edge.min(length - into);
            } else {
                edge = edge.min(MINUTES_OF_WEEK - into);
            }
        }
        (active, Timestamp((now.0 / MINUTE + edge) * MINUTE))
    }
}

/// "08:30" as a minute of the day; "24:00" is midnight at its end.
pub(super) fn time_of_day(text: &str) -> Result<u32, String> {
    let wrong = || format!("`{text}` is not a time of day like \"08:30\"");
    let (hours, minutes) = text.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| if text.len() == 2 { text.parse::<u32>().ok() } else { None };
    match (number(hours), number(minutes)) {
        (Some(24), Some(0)) => Ok(0),
        (Some(hours @ 0..24), Some(minutes @ 0..60)) => Ok(hours * 60 + minutes),
        (_, _) => Err(wrong()),
    }
}

/// "+02:00" as minutes.
pub(super) fn offset(text: &str) -> Result<i32, String> {
    let wrong = || format!("`{text}` is not an offset from UTC like \"+02:00\" or \"-05:30\"");
    if text == "Z" || text == "UTC" {
        return Ok(0);
    }
    let (sign, rest) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(rest), _) => (1, rest),
        (_, Some(rest)) => (-1, rest),
        (None, None) => return Err(wrong()),
    };
    let minutes = i32::try_from(time_of_day(rest).map_err(|_| wrong())?).map_err(|_| wrong())?;
    if minutes > OFFSET_MAX { Err(wrong()) } else { Ok(sign * minutes) }
}

pub(super) fn time_text(minute: u32) -> String {
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

pub(super) fn offset_text(minutes: i32) -> String {
    let sign = if minutes < 0 { '-' } else { '+' };
    format!("{sign}{}", time_text(minutes.unsigned_abs()))
}

/// The longest that a policy's span may be: a year is a mistake.
pub(super) const SPAN_MAX: Millis = Millis::from_secs(366 * 86_400);

#[cfg(test)]
mod tests {
    use super::*;

    /// Monday, 2024-01-01, 00:00 UTC.
    const MONDAY: u64 = 1_704_067_200_000;

    fn at(day: u64, hour: u64) -> Timestamp {
        Timestamp(MONDAY + (day * 24 + hour) * 3_600_000)
    }

    fn office() -> Window {
        Window {
            days: Vec::from([Day::Mon, Day::Fri]),
            from: 8 * 60,
            to: 18 * 60,
            utc_offset: 0,
            min: Some(4),
            max: None,
        }
    }

    #[test]
    fn a_window_holds_on_its_days_alone() {
        let bounds = |now| Bounds::at(1, 9, &[office()], now);
        assert_eq!(bounds(at(0, 7)), Bounds { min: 1, max: 9, until: Some(at(0, 8)) });
        assert_eq!(bounds(at(0, 8)), Bounds { min: 4, max: 9, until: Some(at(0, 18)) });
        assert_eq!(bounds(at(0, 18)), Bounds { min: 1, max: 9, until: Some(at(4, 8)) });
        assert_eq!(bounds(at(4, 17)).min, 4);
        assert_eq!(bounds(at(6, 12)), Bounds { min: 1, max: 9, until: Some(at(7, 8)) });
    }

    #[test]
    fn a_night_belongs_to_the_day_on_which_it_begins() {
        let night = Window { days: Vec::from([Day::Sun]), from: 22 * 60, to: 6 * 60, max: Some(2), ..office() };
        let max = |now| Bounds::at(0, 9, core::slice::from_ref(&night), now).max;
        assert_eq!((max(at(6, 21)), max(at(6, 23)), max(at(7, 5)), max(at(7, 6))), (9, 2, 2, 9));
    }

    #[test]
    fn offsets_move_the_window() {
        let east = Window { utc_offset: 120, ..office() };
        assert_eq!(Bounds::at(1, 9, &[east], at(0, 6)).min, 4);
        assert_eq!((offset("+02:00"), offset("-05:30"), offset("UTC")), (Ok(120), Ok(-330), Ok(0)));
        assert!(offset("02:00").is_err() && offset("+15:00").is_err());
    }

    #[test]
    fn the_maximum_wins_over_a_minimum() {
        let closed = Window { max: Some(2), ..office() };
        assert_eq!(Bounds::at(1, 9, &[office(), closed], at(0, 9)), Bounds { min: 2, max: 2, until: Some(at(0, 18)) });
    }

    #[test]
    fn a_window_of_all_days_and_hours_is_always_in_force() {
        let always = Window { days: Vec::from(Day::ALL), from: 0, to: 0, ..office() };
        assert_eq!(Bounds::at(1, 9, &[always], at(3, 3)).min, 4);
    }
}
