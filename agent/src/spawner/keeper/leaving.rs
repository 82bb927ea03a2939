//! The host's own system stops this node: the coordinator hears of it through the
//! agent and drains the node, what runs may finish in the time that there is, and
//! only then this process ends.
//!
//! ```text
//! SIGTERM ──► told (Event::Leaving) ──► nothing is held, and the drain is proved ──► ends
//!                  └── the time is over, or a second SIGTERM: each job's own grace ──► the same, or patience is over ──► ends
//! ```

use super::Keeper;
use crate::{
    sandbox::sys,
    spawner::{attempt::Stage, protocol::Event},
};

/// The coordinator's deadline comes first by this much, so that attempts end as drained and not as stopped.
const LATER_US: u64 = 5_000_000;
/// So long an agent has to come back for ends that nobody has, or the coordinator to take the proof when none are held.
const SETTLE_US: u64 = 10_000_000;
/// The same when nothing is held and no agent is there: it connects anew for a proof, in far less.
const RECONNECT_US: u64 = 1_000_000;
/// The service manager hears of us so often, and would end us this long after the last time.
const EXTEND_EVERY_US: u64 = 10_000_000;
const EXTEND_BY_US: u32 = 60_000_000;

/// What is known of a stop that is under way.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Microseconds of CLOCK_BOOTTIME, as all here: what runs then gets its grace.
    deadline_us: u64,
    extend_at_us: u64,
    /// Until when we wait, with nothing left to do but to be heard.
    patience_us: Option<u64>,
    /// The agent has said that the drain is proved.
    proved: bool,
    /// Nothing is left to tell, or nobody listened for long enough.
    heard: bool,
}

impl Leaving {
    /// What the agent may tell the coordinator of the time that is left.
    fn within_ms(&self, now: u64) -> u64 {
        self.deadline_us.saturating_sub(LATER_US).saturating_sub(now) / 1_000
    }
}

impl Keeper {
    /// The first signal drains, if the owner gives time for it; a second one means that the time is over.
    pub(super) fn on_terminate(&mut self) {
        let now = sys::boottime_us();
        let again = self.leaving.is_some();
        let time_us = u64::from(self.policy.drain_at_stop_seconds) * 1_000_000;
        // An upgrade that waits for its moment would start over what ends here.
        self.upgrading = false;
        let leaving = self.leaving.get_or_insert(Leaving {
            deadline_us: now + time_us + LATER_US,
            extend_at_us: now,
            patience_us: None,
            proved: false,
            heard: false,
        });
        let within_ms = leaving.within_ms(now);
        self.extend_stop_timeout(now);
        if again || time_us == 0 {
            return self.end_all(u64::MAX);
        }
        tracing::info!(within_ms, "told to stop: what runs may finish");
        self.end_spares();
        self.tell(&Event::Leaving { within_ms }, Vec::new());
    }

    /// For an agent that comes while this goes on.
    pub(super) fn leaving_event(&self) -> Option<Event> {
        let within_ms = self.leaving.as_ref().filter(|_| !self.stopping)?.within_ms(sys::boottime_us());
        Some(Event::Leaving { within_ms })
    }

    /// The agent's word alone ends nothing: that nothing is held is seen here.
    pub(super) fn note_drained(&mut self) {
        match &mut self.leaving {
            Some(leaving) => leaving.proved = true,
            None => self.deny(None, "nobody has told this host to stop"),
        }
    }

    /// After every turn of the loop: is it time to go?
    pub(super) fn pursue_leaving(&mut self) {
        if self.leaving.is_none() {
            return;
        }
        let now = sys::boottime_us();
        self.extend_stop_timeout(now);
        let runs = self.attempts.values().any(|attempt| matches!(attempt.stage, Stage::Live(_)));
        let none_held = self.attempts.is_empty();
        // With an agent an end is held until the coordinator has it; without one nobody will ever ask. When the time is
        // over, too, ends that are not fetched yet would be lost with us.
        let settled = !runs && (none_held || self.agent.is_none() || self.stopping);
        let patience = if none_held && self.agent.is_none() { RECONNECT_US } else { SETTLE_US };
        let Some(leaving) = &mut self.leaving else { return };
        leaving.patience_us = settled.then(|| leaving.patience_us.unwrap_or(now + patience).min(now + patience));
        leaving.heard = leaving.patience_us.is_some_and(|until| (leaving.proved && none_held) || until <= now);
        if !self.stopping && (leaving.heard || leaving.deadline_us <= now) {
            self.end_all(u64::MAX);
        }
    }

    /// All that runs is ended: is there nothing left to tell either, or no time was given for it?
    pub(super) fn may_go(&self) -> bool {
        self.policy.drain_at_stop_seconds == 0 || self.leaving.as_ref().is_none_or(|leaving| leaving.heard)
    }

    pub(super) fn leaving_due_us(&self) -> Option<u64> {
        let leaving = self.leaving.as_ref()?;
        let deadline = leaving.patience_us.map_or(leaving.deadline_us, |until| until.min(leaving.deadline_us));
        let next = if self.stopping { leaving.patience_us.unwrap_or(u64::MAX) } else { deadline };
        Some(leaving.extend_at_us.min(next))
    }

    /// However long jobs may take: the service manager must not lose patience while we work.
    fn extend_stop_timeout(&mut self, now: u64) {
        let Some(leaving) = self.leaving.as_mut().filter(|leaving| leaving.extend_at_us <= now) else { return };
        leaving.extend_at_us = now + EXTEND_EVERY_US;
        let status = if self.stopping { "ending what runs" } else { "draining: what runs may finish" };
        let _no_systemd = sd_notify::notify(&[
            sd_notify::NotifyState::Stopping,
            sd_notify::NotifyState::ExtendTimeoutUsec(EXTEND_BY_US),
            sd_notify::NotifyState::Status(status),
        ]);
    }
}
