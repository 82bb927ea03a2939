//! What happened, a line a step: kept only when somebody wants to read it.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hasher},
};

use muster_core::time::Millis;

use crate::agenda::Action;

/// Lines of a run, the last of them, or none.
pub struct Trace {
    kept: Option<usize>,
    lines: VecDeque<String>,
    hasher: DefaultHasher,
}

impl Trace {
    /// Nothing is written.
    pub fn off() -> Self {
        Self { kept: None, lines: VecDeque::new(), hasher: DefaultHasher::new() }
    }

    /// The last lines are kept, and all count for the hash.
    pub fn last(lines: usize) -> Self {
        Self { kept: Some(lines), ..Self::off() }
    }

    pub const fn is_on(&self) -> bool {
        self.kept.is_some()
    }

    pub fn action(&mut self, at: Millis, action: &Action) {
        self.line(|| format!("{:>10.3} {action:?}", at.0 as f64 / 1_000.0));
    }

    pub fn line(&mut self, text: impl FnOnce() -> String) {
        let Some(kept) = self.kept else { return };
        let text = text();
        self.hasher.write(text.as_bytes());
        if self.lines.len() == kept {
            self.lines.pop_front();
        }
        self.lines.push_back(text);
    }

    /// Over all lines, also those that are not kept.
    pub fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    pub fn into_lines(self) -> Vec<String> {
        self.lines.into()
    }
}
