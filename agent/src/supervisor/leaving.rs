//! What is known of this host's end, who is told of it, and what a drain means here: jobs hear of it, and the end of one
//! may be the end of this agent.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use muster_core::event::DrainThen;
use muster_proto::v1;

use super::{Left, Supervisor, notify};
use crate::{interruption::Interruption, spawner::protocol::Request, state};

/// A notice that is repeated is a new one only if it says that the host goes sooner by this much.
const SOONER: Duration = Duration::from_secs(1);

/// This host goes.
#[derive(Clone, Debug)]
pub(super) struct Leaving {
    at: Instant,
    reason: String,
    /// The spawner waits for the drain, and ends then.
    pub(super) spawner_waits: bool,
}

impl Supervisor {
    /// The host's own system stops the spawner, which waits for the drain and then ends.
    pub(super) fn spawner_waits(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.spawner_waits)
    }

    /// The spawner is told to stop by the host's own system: the coordinator drains this node in the time there is.
    pub(super) fn on_leaving(&mut self, within_ms: u64) {
        let known = self.leaving.as_mut().map(|leaving| std::mem::replace(&mut leaving.spawner_waits, true));
        if *self.drained.borrow() {
            // It is empty, and the coordinator knows: there is nothing to wait for.
            self.ask_spawner(&Request::Drained);
        }
        // Said again on each new link, and to be told once: a second notice would begin a second drain.
        if known != Some(true) {
            tracing::info!(within_ms, "this host's system stops the node");
            self.leave_within(Duration::from_millis(within_ms), "its own system stops it", true);
        }
    }

    /// Somebody knows that this host goes.
    pub(super) fn on_interruption(&mut self, told: Interruption) {
        self.leave_within(told.within, &told.reason, false);
    }

    /// The coordinator drains this node in the time there is; a later word counts if it says sooner.
    fn leave_within(&mut self, within: Duration, reason: &str, spawner_waits: bool) {
        let at = Instant::now() + within;
        let spawner_waits = match &self.leaving {
            Some(known) if at + SOONER > known.at => return,
            Some(known) => known.spawner_waits || spawner_waits,
            None => spawner_waits,
        };
        tracing::info!(within_s = within.as_secs(), reason, "this host goes");
        self.leaving = Some(Leaving { at, reason: reason.to_owned(), spawner_waits });
        self.say_leaving();
    }

    /// Also first thing on a new stream, because it may not have arrived on the old one.
    pub(super) fn say_leaving(&mut self) {
        let Some(leaving) = &self.leaving else { return };
        let left = leaving.at.saturating_duration_since(Instant::now());
        let within_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        let reason = leaving.reason.clone();
        self.say(v1::agent_message::Message::StopNotice(v1::StopNotice { reason, within_ms: Some(within_ms) }));
    }

    /// Jobs may know that this host drains. The deadline is told as a span, and is one of this host's own clock here.
    pub(super) fn note_drain(&mut self, notice: Option<v1::DrainNotice>) {
        let deadline = |within_ms: u64| {
            let at = SystemTime::now().checked_add(Duration::from_millis(within_ms))?;
            at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs())
        };
        self.drain = notice.map(|notice| notice.within_ms.and_then(deadline));
        self.tell_drain();
    }

    /// Also to a spawner that is new, or comes back.
    pub(super) fn tell_drain(&mut self) {
        self.ask_spawner(&match self.drain {
            Some(deadline_unix_s) => Request::NoticeDrain { deadline_unix_s },
            None => Request::NoticeNoDrain,
        });
    }

    /// The drain is off. Should this host go all the same, a word of it counts anew.
    pub(super) fn stays(&mut self) {
        self.drained.send_replace(false);
        self.leaving.take_if(|leaving| !leaving.spawner_waits);
    }

    /// The coordinator has the proof: whoever waits for it may end this host.
    fn may_go(&mut self) {
        self.drained.send_replace(true);
        if self.spawner_waits() {
            self.ask_spawner(&Request::Drained);
        }
    }

    pub(super) fn release(&mut self, then: DrainThen) {
        let sentence = match then {
            DrainThen::Nothing => {
                self.may_go();
                notify(&[sd_notify::NotifyState::Status("drained; closed to work")]);
                return;
            }
            // It ends when its provider ends the host, which nobody here holds up; should the provider fail, it is told to
            // open again.
            DrainThen::Delete => {
                self.may_go();
                notify(&[sd_notify::NotifyState::Status("drained; waits for its provider to delete this host")]);
                return;
            }
            DrainThen::Stop => "this host was drained and told to stay down",
            DrainThen::Poweroff => "this host was drained and is powered off",
        };
        tracing::info!("{sentence}");
        let until_reboot =
            (then == DrainThen::Poweroff).then(|| self.facts.as_ref().map(|facts| facts.boot_id.clone()));
        // As it goes it opens itself: whoever brings it back wants it to work, and its hello has to say so.
        let marked = state::mark_released(self.state.root(), sentence, until_reboot.flatten().as_deref())
            .and_then(|()| self.state.set_closed_for(None));
        if then == DrainThen::Poweroff {
            self.ask_spawner(&Request::Poweroff);
        }
        self.outcome = Some(marked.map(|()| Left::Released).map_err(Into::into));
    }
}
