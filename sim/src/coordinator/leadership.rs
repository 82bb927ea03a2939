//! The life of a coordinator process: who starts, leads, steps down and dies.

use muster_core::{
    event::Event,
    fleet::{Fleet, Image},
    ids::{NodeId, Term},
    leadership::{self, Leadership},
    limits,
    time::Timestamp,
};

use super::{Leader, Role};
use crate::{agenda::Action, truth::Violation, world::World};

impl World {
    pub(crate) fn start_member(&mut self, member: usize) -> Result<(), Violation> {
        if !matches!(self.members[member].role, Role::Down) {
            return Ok(());
        }
        let wall = (self.now.0.cast_signed() + self.members[member].wall_offset).max(0).cast_unsigned();
        let last = self.store.last;
        let is_alone = self.members.len() == 1;
        let known = &mut self.members[member];
        known.life += 1;
        known.role = Role::Standby;
        known.clock.base = Timestamp(wall.max(last.0 + 1));
        known.clock.from = self.now;
        (known.busy_until, known.is_acting) = (self.now, false);
        known.wakes_at = None;
        known.inbox.clear();
        known.shown = NodeId(0);
        known.seen_since = known.clock.at(self.now);
        known.seen = (u64::MAX, 0);
        if is_alone {
            // An embedded store: its lock is the leadership.
            return self.lead(member, Leadership::locked());
        }
        let life = known.life;
        self.after(0, 500, Action::Leadership { member, life });
        Ok(())
    }

    fn lead(&mut self, member: usize, leadership: Leadership) -> Result<(), Violation> {
        let term = self.store.leader.term + 1;
        self.store.leader.term = term;
        self.store.leader.renewals += 1;
        let fleet = Fleet::restore(self.whole_image()?).map_err(|damage| Violation::new("FL-1", damage.to_string()))?;
        let known = &mut self.members[member];
        // Another machine's clock may have been ahead of ours when it stored last.
        let shown = known.clock.at(self.now).max(Timestamp(self.store.last.0 + 1));
        known.clock.base = shown;
        known.clock.from = self.now;
        // What is stored as a time of day moves with a clock that was set between two leaders.
        let passed = self.now.since(self.store.last_really);
        let jumped = shown.since(self.store.last).0 > passed.0 * 11 / 10 + 5_000;
        self.truth.led(self.now, jumped);
        let commits = self.store.commits;
        known.role = Role::Leads(Box::new(Leader { fleet, term, leadership, commits }));
        self.count("coordinator", "led");
        self.step(member, vec![Event::Stored { commits }, Event::Led { term: Term(term) }])
    }

    /// What is stored. FL-1: a repair finds nothing in it to repair.
    fn whole_image(&self) -> Result<Image, Violation> {
        let mut image = self.store.image();
        let meta = image.meta.clone();
        let said = image.mend(self.store.last);
        if said.is_empty() && image.meta == meta {
            return Ok(image);
        }
        let detail = format!("a repair changes a store that is whole: {said:?}, {meta:?} to {:?}", image.meta);
        Err(Violation::new("FL-1", detail))
    }

    /// A standby looks at the row, a leader renews it.
    pub(crate) fn look_at_leadership(&mut self, member: usize, life: u64) -> Result<(), Violation> {
        if self.members[member].life != life || matches!(self.members[member].role, Role::Down) {
            return Ok(());
        }
        if self.members[member].paused_until > self.now {
            self.at(self.members[member].paused_until, Action::Leadership { member, life });
            return Ok(());
        }
        let is_cut = self.members[member].cut_from_store > self.now;
        if self.members[member].leader().is_some() {
            let sent = self.members[member].time(self.now);
            if !is_cut {
                let latency = self.store_latency();
                self.at(self.now + latency, Action::Renewed { member, life, sent });
            }
            self.at(self.now + limits::LEADERSHIP_RENEWAL, Action::Leadership { member, life });
            return Ok(());
        }
        self.after(300, 700, Action::Leadership { member, life });
        if is_cut {
            return Ok(());
        }
        let row = (self.store.leader.term, self.store.leader.renewals);
        let time = self.members[member].time(self.now);
        let known = &mut self.members[member];
        if known.seen != row {
            known.seen = row;
            known.seen_since = time;
        } else if time.since(known.seen_since) >= leadership::takeover_after() {
            self.count("coordinator", "took over");
            return self.lead(member, Leadership::taken(time));
        }
        Ok(())
    }

    /// The renewal's transaction: refused if another leads by now.
    pub(crate) fn renewed(&mut self, member: usize, life: u64, sent: Timestamp) {
        let row = self.store.leader.term;
        let known = &mut self.members[member];
        let Role::Leads(leader) = &mut known.role else { return };
        if known.life != life {
            return;
        }
        if leader.term == row {
            self.store.leader.renewals += 1;
            leader.leadership.renewed(sent);
        } else if known.paused_until <= self.now {
            self.step_down(member);
        }
    }

    /// Another leads: nothing of what is in memory counts.
    pub(super) fn step_down(&mut self, member: usize) {
        self.count("coordinator", "stepped down");
        self.close_streams_of(member);
        let known = &mut self.members[member];
        known.role = Role::Standby;
        known.is_acting = false;
        known.inbox.clear();
        known.life += 1;
        known.seen = (u64::MAX, 0);
        known.seen_since = known.clock.at(self.now);
        let life = known.life;
        self.after(0, 500, Action::Leadership { member, life });
    }

    pub(crate) fn kill_member(&mut self, member: usize) {
        if matches!(self.members[member].role, Role::Down) {
            return;
        }
        self.close_streams_of(member);
        let known = &mut self.members[member];
        known.role = Role::Down;
        known.life += 1;
        known.inbox.clear();
        known.paused_until = self.now;
        let patience = if self.rng.chance(100) { 60_000 } else { 12_000 };
        self.after(200, patience, Action::MemberStarts { member });
    }
}
