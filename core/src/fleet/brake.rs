//! The brake on evictions: when much of the fleet falls silent at once, nothing is given up for it until the brake's time
//! is over, or an operator says that those hosts are really gone.

use alloc::format;

use super::{Fleet, Output, record};
use crate::{
    effect::{Reply, Subject},
    ids::Actor,
    lease, limits,
    mutation::{self, Mutation},
    node::Liveness,
    time::Timestamp,
};

impl Fleet {
    /// After a brake evictions go on, but not all at once: a person can still answer.
    pub(super) fn pause_after_brake(&mut self, now: Timestamp, out: &mut Output) {
        if self.meta.brake_until.is_some_and(|until| now.since(until) < limits::BRAKE_HOLD) {
            self.meta.brake_until = Some(now + limits::BRAKE_PAUSE);
            out.touched.meta = true;
        }
    }

    /// Evictions and scale-in rest until then.
    pub(super) fn braked_until(&self, now: Timestamp) -> Option<Timestamp> {
        self.meta.brake_until.filter(|until| *until > now)
    }

    /// Much of the fleet silent at once is our fault more likely than theirs: evictions rest (FL-12).
    pub(super) fn apply_brake(&mut self, now: Timestamp, out: &mut Output) {
        if mutation::is_on(Mutation::BrakeOff) {
            return;
        }
        let window = lease::duration();
        let (mut live, mut fresh) = (0usize, 0usize);
        for node in self.nodes.values() {
            match node.record.liveness {
                Liveness::Live => live += 1,
                Liveness::Silent(since) if now.since(since) <= window => fresh += 1,
                Liveness::Silent(_) | Liveness::Joining | Liveness::Lost(_) | Liveness::Gone(_) => {}
            }
        }
        if live + fresh >= limits::BRAKE_NODES_MIN && fresh * 3 > live + fresh {
            let is_news = self.braked_until(now).is_none();
            // One more silence of many holds as long as the first.
            self.meta.brake_until = Some(now + limits::BRAKE_HOLD);
            out.touched.meta = true;
            if !is_news {
                return;
            }
            let sentence = format!(
                "{fresh} of {} nodes fell silent within {window}: no eviction and no scale-in for {}",
                live + fresh,
                limits::BRAKE_HOLD
            );
            record(out, now, Subject::Fleet, "brake", sentence, None);
        }
    }

    /// An operator has looked: evictions go on, at the pace of a brake that has run out.
    pub(super) fn release_brake(&mut self, actor: &Actor, reason: &str, now: Timestamp, out: &mut Output) -> Reply {
        let is_silent = |liveness: Liveness| matches!(liveness, Liveness::Silent(_));
        let silent = self.nodes.values().filter(|node| is_silent(node.record.liveness)).count();
        let silent = u32::try_from(silent).unwrap_or(u32::MAX);
        // No more than that is the pause between two evictions, which stays.
        let Some(until) = self.braked_until(now + limits::BRAKE_PAUSE) else {
            return Reply::BrakeReleased { held: false, silent };
        };
        self.meta.brake_until = (!mutation::is_on(Mutation::ReleasedAtOnce)).then_some(now);
        out.touched.meta = true;
        let sentence = format!("evictions and scale-in go on, {} before their time: {reason}", until.since(now));
        record(out, now, Subject::Fleet, "brake_released", sentence, Some(actor));
        // Lost hosts that their providers are to end have waited as well.
        self.unsettled.extend(self.nodes.keys().copied());
        Reply::BrakeReleased { held: true, silent }
    }
}
