//! When this host is closed to work, and when "drained" is true (FL-7).
//!
//! ```text
//! open ──asked──► closing ──persisted──► closed ──empty by the spawner's word──► proved
//!   ▲                                      │
//!   └──────────── persisted ◄──── reopen ──┘
//! ```

use alloc::{format, vec::Vec};

use crate::{event::DrainThen, ids::Revision};

use super::{Host, HostEffect};

/// Whether this host takes work, and what of that is on disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Closure {
    /// Closed in memory from the moment it was asked.
    wanted: Option<Revision>,
    persisted: Option<Revision>,
    /// Writes that are under way, the last of which is what counts.
    writing: u32,
    question: Question,
}

/// How far the answer to the coordinator's question is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Question {
    /// Nobody asks.
    #[default]
    None,
    /// Work is still held, or the closure is not on disk.
    Open,
    /// The spawner is asked for its word.
    Listing,
    /// The spawner holds nothing.
    ListedEmpty,
}

impl Closure {
    pub(super) const fn restored(closed_for: Option<Revision>) -> Self {
        Self { wanted: closed_for, persisted: closed_for, writing: 0, question: Question::None }
    }

    pub(super) const fn is_closed(&self) -> bool {
        self.wanted.is_some()
    }

    pub(super) const fn wanted(&self) -> Option<Revision> {
        self.wanted
    }

    pub(super) const fn on_persisted(&mut self, revision: Option<Revision>) {
        self.persisted = revision;
        self.writing = self.writing.saturating_sub(1);
    }

    fn write(&mut self, revision: Option<Revision>, effects: &mut Vec<HostEffect>) {
        self.wanted = revision;
        self.writing += 1;
        effects.push(HostEffect::PersistClosure { revision });
    }

    /// It is closed for this on disk, and no write that is under way opens it again.
    fn is_closed_on_disk(&self, revision: Revision) -> bool {
        self.persisted == Some(revision) && self.writing == 0
    }

    /// The stream broke: the coordinator asks again on the next one.
    pub(super) const fn forget_question(&mut self) {
        self.question = Question::None;
    }

    /// A list that was not asked for says nothing about the present question.
    pub(super) fn on_listed(&mut self, empty: bool) {
        if self.question == Question::Listing {
            self.question = if empty { Question::ListedEmpty } else { Question::Open };
        }
    }

    /// An older drain's end opens nothing that a newer one closed.
    pub(super) fn reopen(&mut self, revision: Revision, effects: &mut Vec<HostEffect>) {
        if self.wanted.is_some_and(|wanted| wanted <= revision) {
            self.question = Question::None;
            self.write(None, effects);
        }
    }
}

impl Host {
    pub(super) fn on_drain_asked(&mut self, revision: Revision, refusable: bool, effects: &mut Vec<HostEffect>) {
        if self.closure.wanted.is_some_and(|wanted| wanted > revision) {
            return;
        }
        if refusable && !self.attempts.is_empty() {
            let (queued, held) = (self.queue.len(), self.attempts.len());
            let live = self.running().count();
            let reason = format!(
                "it holds work: {live} running, {queued} waiting, {} ended and not yet acknowledged",
                held - queued - live
            );
            effects.push(HostEffect::RefuseDrain { revision, reason });
            return;
        }
        if self.closure.wanted != Some(revision) {
            self.closure.write(Some(revision), effects);
        }
        if self.closure.question != Question::Listing {
            self.closure.question = Question::Open;
        }
        self.give_back_newest(usize::MAX, effects);
    }

    /// Moves an open question on; called after every event.
    pub(super) fn pursue_proof(&mut self, effects: &mut Vec<HostEffect>) {
        let Some(revision) = self.closure.wanted else { return };
        let ready = self.connected && self.attempts.is_empty() && self.closure.is_closed_on_disk(revision);
        match self.closure.question {
            Question::None | Question::Listing => {}
            Question::Open if ready => {
                self.closure.question = Question::Listing;
                // Nothing starts before the list is here: what it could not name yet would count as lost.
                self.spawner = None;
                effects.push(HostEffect::ListSpawner);
            }
            Question::ListedEmpty if ready => {
                self.closure.question = Question::None;
                effects.push(HostEffect::ProveDrained { revision });
            }
            Question::Open | Question::ListedEmpty => {}
        }
    }

    /// A release for a drain that this host is not closed for, or while it holds work, is out of date.
    pub(super) fn on_release(&mut self, revision: Revision, then: DrainThen, effects: &mut Vec<HostEffect>) {
        if self.closure.is_closed_on_disk(revision) && self.attempts.is_empty() {
            effects.push(HostEffect::Release { then });
        }
    }
}
