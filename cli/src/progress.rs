//! One line on the terminal's stderr that tells how far a long command is: drawn over itself, cut to the terminal's
//! width, and gone when the command has its answer. Without a terminal there is nothing, not even an empty line.

use std::{
    io::{self, IsTerminal as _, Write as _},
    os::fd::AsRawFd as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use muster_core::time::Millis;

use crate::output::{Format, Output};

/// It is drawn again at most this often.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// Of a terminal that does not say how wide it is.
const USUAL_COLUMNS: usize = 80;

/// The line. It goes away with this value.
#[derive(Debug)]
pub struct Progress {
    begun: Instant,
    /// None: nobody watches.
    drawn: Option<Mutex<Drawn>>,
}

/// What stands on the terminal.
#[derive(Debug, Default)]
struct Drawn {
    at: Option<Instant>,
    width: usize,
}

impl Progress {
    /// A line, if somebody watches: stderr is a terminal that can draw over itself, and the answer is asked for people.
    /// It has no colour, so NO_COLOR changes nothing.
    pub fn new(output: &Output) -> Self {
        let for_people = match output.format {
            Format::Table | Format::Wide => !output.quiet,
            Format::Json | Format::Jsonl | Format::Name => false,
        };
        let able = std::env::var_os("TERM").is_some_and(|name| !name.is_empty() && name != "dumb");
        let watched = for_people && able && io::stderr().is_terminal();
        Self { begun: Instant::now(), drawn: watched.then(Mutex::default) }
    }

    /// Draws the line that `text` makes of the time since the beginning, unless it was drawn just now.
    pub fn show(&self, text: impl FnOnce(Duration) -> String) {
        let Some(drawn) = &self.drawn else { return };
        // Whoever panicked with it has only drawn less.
        let mut drawn = drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if drawn.at.is_none_or(|at| at.elapsed() >= DRAW_EVERY) {
            drawn.draw(&text(self.begun.elapsed()), columns());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(drawn) = &self.drawn {
            drawn.lock().unwrap_or_else(PoisonError::into_inner).draw("", columns());
        }
    }
}

impl Drawn {
    fn draw(&mut self, text: &str, columns: usize) {
        let (bytes, width) = over(text, self.width, columns);
        // Nobody listens on stderr: nothing to be done about it.
        drop(io::stderr().write_all(bytes.as_bytes()));
        (self.at, self.width) = (Some(Instant::now()), width);
    }
}

/// What draws a text over one of that width, and how wide it is now. The last column stays free: a terminal that is full to
/// the edge begins a new line. No text leaves the cursor where the line began.
fn over(text: &str, before: usize, columns: usize) -> (String, usize) {
    let room = columns.saturating_sub(1);
    let text: String = text.chars().take(room).collect();
    let width = text.chars().count();
    let rest = before.min(room).saturating_sub(width);
    let back = if text.is_empty() { "\r" } else { "" };
    (format!("\r{text}{:rest$}{back}", ""), width)
}

/// How wide the terminal is now.
fn columns() -> usize {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ only fills the structure, which is ours.
    let answer = unsafe { libc::ioctl(io::stderr().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if answer == 0 && size.ws_col > 0 { usize::from(size.ws_col) } else { USUAL_COLUMNS }
}

/// How long the rest takes if it goes on as it went; none before anything is done.
pub fn time_left(done: u64, total: u64, since: Duration) -> Option<Millis> {
    let since = u64::try_from(since.as_millis()).ok()?;
    let rest = u128::from(since) * u128::from(total.saturating_sub(done));
    u64::try_from(rest.checked_div(u128::from(done))?).ok().map(Millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_covers_the_one_before_and_never_reaches_the_edge() {
        assert_eq!(over("12 of 20", 0, 80), (String::from("\r12 of 20"), 8));
        assert_eq!(over("done", 8, 80), (String::from("\rdone    "), 4), "a shorter one");
        assert_eq!(over("", 4, 80), (String::from("\r    \r"), 0), "none");
        assert_eq!(over("12 of 20", 0, 6), (String::from("\r12 of"), 5), "cut");
        assert_eq!(over("ab", 70, 6), (String::from("\rab   "), 2), "the terminal became narrower");
        assert_eq!(over("ab", 2, 0), (String::from("\r\r"), 0));
    }

    #[test]
    fn the_rest_takes_as_long_as_what_was() {
        assert_eq!(time_left(0, 10, Duration::from_secs(3)), None);
        assert_eq!(time_left(3, 12, Duration::from_secs(3)), Some(Millis(9_000)));
        assert_eq!(time_left(10, 10, Duration::from_secs(3)), Some(Millis(0)));
        assert_eq!(time_left(1, u64::MAX, Duration::from_secs(3)), None, "beyond telling");
    }
}
