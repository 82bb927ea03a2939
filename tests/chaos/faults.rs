//! What is done to the fleet, and what undoes it. A part that ends by itself is
//! started again, as a service manager would.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use muster_tests::{Cut, WAIT, host::boot_ms, until};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    dice::Dice,
    history::Writer,
    world::{Target, World},
};

const TICK: Duration = Duration::from_millis(50);
/// A service manager's pause before it starts a part again.
const RESTART: Duration = Duration::from_millis(500);

/// How a part is brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cure {
    Launch,
    Continue,
    Mend,
}

/// Faults that were done, and those that wait for their cure.
#[derive(Debug)]
pub struct Faults {
    targets: Vec<Target>,
    down: BTreeMap<Target, (Instant, Cure)>,
    counts: BTreeMap<String, u32>,
    history: Writer,
    dice: Dice,
}

impl Faults {
    /// None yet.
    pub const fn new(targets: Vec<Target>, history: Writer, dice: Dice) -> Self {
        Self { targets, down: BTreeMap::new(), counts: BTreeMap::new(), history, dice }
    }

    /// Does faults up to a moment, and stays until the last one is over.
    pub async fn rage(&mut self, world: &mut World, end: Instant) {
        let mut next = Instant::now() + self.dice.millis(100..800);
        while Instant::now() < end || !self.down.is_empty() || world.is_failing_over() {
            let now = Instant::now();
            self.cure(world, now);
            self.restart_ended(world);
            if now >= next && now < end {
                self.strike(world);
                next = now + self.dice.millis(150..1_200);
            }
            until(now + TICK).await;
        }
    }

    /// Keeps the parts running; to be called again and again.
    pub fn mend(&mut self, world: &mut World) {
        self.cure(world, Instant::now());
        self.restart_ended(world);
    }

    fn strike(&mut self, world: &mut World) {
        let is_busy = |target: &Target| *target == Target::Database && world.is_failing_over();
        let up = self.targets.iter().filter(|target| !self.down.contains_key(*target) && !is_busy(target));
        let up: Vec<&Target> = up.collect();
        // The kind first: a fleet has more hosts than coordinators.
        let kinds: Vec<&str> = ["coordinator", "coordinator", "agent", "spawner", "database", "wire"]
            .into_iter()
            .filter(|kind| up.iter().any(|target| target.kind() == *kind))
            .collect();
        let Some(kind) = self.dice.pick(&kinds).copied() else { return };
        let of_kind: Vec<&Target> = up.into_iter().filter(|target| target.kind() == kind).collect();
        let Some(target) = self.dice.pick(&of_kind).map(|target| (*target).clone()) else { return };
        let now = Instant::now();
        match self.dice.among(0..10) {
            how if let Target::Wire(wire) = target => {
                let (what, cut) = match how {
                    0..3 => ("to", Cut::ToCoordinator),
                    3..6 => ("from", Cut::FromCoordinator),
                    _ => ("both", Cut::Both),
                };
                let away = self.away();
                self.tell(&format!("cut-{what}"), &target);
                world.cut(wire, cut);
                self.down.insert(target, (now + away, Cure::Mend));
            }
            0..6 => {
                self.tell("kill", &target);
                world.kill(&target);
                let away = self.dice.millis(0..2_000);
                self.down.insert(target, (now + away, Cure::Launch));
            }
            6..8 if matches!(target, Target::Coordinator(_) | Target::Agent(_)) => {
                self.tell("restart", &target);
                if let Some(part) = world.part(&target) {
                    part.signal(Signal::SIGTERM);
                    // Its own end is awaited as that of any part that ends by itself.
                }
            }
            _ if target == Target::Database => {
                self.tell("failover", &target);
                world.fail_over();
            }
            _ => {
                let away = self.away();
                self.tell("stop", &target);
                if let Some(part) = world.part(&target) {
                    part.signal(Signal::SIGSTOP);
                }
                self.down.insert(target, (now + away, Cure::Continue));
            }
        }
    }

    /// Rarely for longer than a node's lease; at other times for longer than a leader's, or hardly at all.
    const fn away(&mut self) -> Duration {
        match self.dice.among(0..20) {
            0 => self.dice.millis(15_500..19_000),
            1..7 => self.dice.millis(3_000..5_500),
            _ => self.dice.millis(50..2_000),
        }
    }

    fn cure(&mut self, world: &mut World, now: Instant) {
        let due: Vec<Target> =
            self.down.iter().filter(|(_, (at, _))| *at <= now).map(|(target, _)| target.clone()).collect();
        for target in due {
            let Some((_, cure)) = self.down.remove(&target) else { continue };
            match cure {
                Cure::Launch => {
                    // What is left of the one before has ended, or is ended now: never two at a time.
                    world.kill_rest(&target);
                    world.launch(&target);
                }
                Cure::Mend => {
                    if let Target::Wire(wire) = target {
                        world.cut(wire, Cut::Mended);
                    }
                }
                Cure::Continue => {
                    if let Some(part) = world.part(&target) {
                        part.signal(Signal::SIGCONT);
                    }
                }
            }
        }
    }

    fn restart_ended(&mut self, world: &mut World) {
        for target in self.targets.clone() {
            if self.down.contains_key(&target) {
                continue;
            }
            if let Some(part) = world.part(&target)
                && !part.is_running()
            {
                self.down.insert(target, (Instant::now() + RESTART, Cure::Launch));
            }
        }
    }

    fn tell(&mut self, what: &str, target: &Target) {
        self.history
            .write(&json!({"kind": "fault", "what": what, "target": format!("{target:?}"), "at_ms": boot_ms()}));
        *self.counts.entry(format!("{what} {}", target.kind())).or_default() += 1;
    }

    /// What was done how often.
    pub fn summary(&self) -> String {
        self.counts.iter().map(|(what, count)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
    }
}

impl World {
    fn kill_rest(&mut self, target: &Target) {
        if let Some(part) = self.part(target)
            && part.is_running()
        {
            part.kill9();
            let _ = part.wait(WAIT);
        }
    }
}
