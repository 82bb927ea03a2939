//! The demo's live display on stderr: what happens, line by line, and below it
//! one line of nodes, tasks and throughput that is drawn again as they change.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use muster_proto::v1::TaskCounts;

use crate::output::now_ms;

/// The moving line is drawn at most this often.
const DRAW_EVERY: Duration = Duration::from_millis(80);
/// Cells of the bar.
const BAR: u64 = 24;

/// Where the demo talks.
#[derive(Debug)]
pub struct Display {
    live: bool,
    quiet: bool,
    started_ms: u64,
    told_tenths: u64,
    drawn: Option<Instant>,
    on_screen: bool,
    line: String,
    nodes: usize,
    tasks_since: Option<Instant>,
}

impl Display {
    /// Nothing to show yet.
    pub fn new(quiet: bool, started_ms: u64) -> Self {
        let live = std::io::stderr().is_terminal() && !quiet;
        Self {
            live,
            quiet,
            started_ms,
            told_tenths: 0,
            drawn: None,
            on_screen: false,
            line: String::new(),
            nodes: 0,
            tasks_since: None,
        }
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        self.say_of(now_ms(), text);
    }

    /// A line that stays, of something that happened then.
    pub fn say_of(&mut self, time_ms: u64, text: &str) {
        if self.quiet {
            return;
        }
        self.wipe();
        let since = time_ms.saturating_sub(self.started_ms) as f64 / 1_000.0;
        drop(writeln!(std::io::stderr(), "{since:>6.1}s  {text}"));
        self.draw(true);
    }

    /// Lines that stay, as they are.
    pub fn block(&mut self, text: &str) {
        if !self.quiet {
            self.wipe();
            drop(writeln!(std::io::stderr(), "{}", text.trim_end()));
        }
    }

    /// Nodes that are there now.
    pub fn nodes(&mut self, nodes: usize) {
        self.nodes = nodes;
    }

    /// The job's tasks moved on.
    pub fn tasks(&mut self, counts: &TaskCounts) {
        let since = *self.tasks_since.get_or_insert_with(Instant::now);
        let done = u64::from(counts.succeeded + counts.failed + counts.cancelled);
        let total = u64::from(counts.total).max(1);
        let rate = done as f64 / since.elapsed().as_secs_f64().max(0.001);
        self.line = format!(
            "[{}] {done}/{total} tasks  {} running  {} waiting  {} nodes  {rate:.0} tasks/s",
            bar(done, total),
            counts.running + counts.placed,
            counts.waiting,
            self.nodes,
        );
        // Where nothing can be drawn again, a line for each tenth.
        let tenths = done * 10 / total;
        if !self.live && tenths > self.told_tenths {
            self.told_tenths = tenths;
            let line = self.line.clone();
            self.say(&line);
        }
        self.draw(done == total);
    }

    /// Results checked so far.
    pub fn checked(&mut self, checked: u64, total: u64) {
        self.line = format!("[{}] {checked}/{total} results checked  {} nodes", bar(checked, total.max(1)), self.nodes);
        self.draw(checked == total);
    }

    /// The moving line goes away.
    pub fn clear(&mut self) {
        self.wipe();
        self.line.clear();
    }

    fn draw(&mut self, now: bool) {
        if !self.live || self.line.is_empty() {
            return;
        }
        if now || self.drawn.is_none_or(|drawn| drawn.elapsed() >= DRAW_EVERY) {
            drop(write!(std::io::stderr(), "\r\x1b[K{}", self.line));
            (self.drawn, self.on_screen) = (Some(Instant::now()), true);
        }
    }

    fn wipe(&mut self) {
        if self.on_screen {
            drop(write!(std::io::stderr(), "\r\x1b[K"));
            self.on_screen = false;
        }
    }
}

fn bar(done: u64, total: u64) -> String {
    let full = done * BAR / total;
    (0..BAR).map(|cell| if cell < full { '#' } else { '.' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_full_only_at_the_end() {
        assert_eq!(bar(0, 10).matches('#').count(), 0);
        assert!(bar(9, 10).ends_with('.'));
        assert_eq!(bar(10, 10).matches('#').count(), BAR as usize);
    }
}
