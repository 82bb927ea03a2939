//! A simulated host: the real `Host` as its agent, and a spawner with processes.

use std::collections::BTreeMap;

use muster_core::{
    effect::StopReason,
    end::End,
    event::{DrainThen, Held, Hello},
    host::{Adopted, AdoptedPhase, Boottime, Host, HostEffect, HostEvent, StartOrder, Verdict},
    ids::{AttemptId, Epoch, NodeId, Revision, SessionId},
    resources::Resources,
    time::Timestamp,
};

/// A process, or what the spawner keeps of it.
#[derive(Clone, Debug)]
pub struct Sandbox {
    pub order: StartOrder,
    pub stopping: Option<StopReason>,
    /// None: it runs.
    pub verdict: Option<Verdict>,
}

/// What the agent says to the coordinator.
#[derive(Clone, Debug)]
pub enum Report {
    Hello(Box<Hello>),
    Heartbeat { sequence: u64, held: Vec<Held> },
    Started(AttemptId, Epoch),
    Ended(AttemptId, Epoch, End),
    GivenBack(Vec<AttemptId>),
    Proved(Revision),
    Refused(Revision, String),
}

/// What a host asks of the world.
#[derive(Clone, Debug)]
pub enum Wish {
    Say(Report),
    /// User code begins.
    Begin(AttemptId),
    /// SIGTERM was sent: it will end by that.
    Terminate(AttemptId),
    /// Collect outputs and logs.
    Seal(AttemptId),
    /// Write the closure to the disk.
    Persist(Option<Revision>),
    /// Connect to the spawner anew.
    List,
    /// The spawner's lease timer moves.
    Lease(Boottime),
    Leave(DrainThen),
}

#[derive(Debug)]
pub struct SimHost {
    pub name: String,
    pub node: NodeId,
    pub capacity: Resources,
    /// None while the agent is down.
    pub agent: Option<Host>,
    pub agent_start: u64,
    pub boot: u64,
    pub spawner: u64,
    /// The stream as this side sees it.
    pub session: Option<SessionId>,
    pub sequence: u64,
    pub sandboxes: BTreeMap<AttemptId, Sandbox>,
    pub closed_for: Option<Revision>,
    /// The spawner's own lease timer.
    pub lease: Boottime,
    pub left: bool,
    pub partitioned_until: Timestamp,
    /// Its clock runs this many thousandths fast.
    pub drift: i64,
    pub clock_offset: u64,
}

impl SimHost {
    /// This host's CLOCK_BOOTTIME.
    pub fn boottime(&self, now: Timestamp) -> Boottime {
        let elapsed = i64::try_from(now.0).unwrap_or(i64::MAX);
        Boottime(self.clock_offset + u64::try_from(elapsed + elapsed * self.drift / 1_000).unwrap_or(0))
    }

    /// When this host's clock shows `deadline`.
    pub fn when(&self, deadline: Boottime) -> Timestamp {
        let shown = i64::try_from(deadline.0.saturating_sub(self.clock_offset)).unwrap_or(i64::MAX);
        Timestamp(u64::try_from(shown * 1_000 / (1_000 + self.drift) + 1).unwrap_or(0))
    }

    /// A new agent process: it knows only what the disk and the spawner tell.
    pub fn start_agent(&mut self, now: Timestamp) -> Vec<Wish> {
        self.agent_start += 1;
        self.agent = Some(Host::new(self.capacity, self.closed_for));
        self.session = None;
        self.list(now)
    }

    /// The spawner lists all that it holds.
    pub fn list(&mut self, now: Timestamp) -> Vec<Wish> {
        let held = self
            .sandboxes
            .values()
            .map(|sandbox| Adopted {
                order: sandbox.order,
                phase: sandbox.verdict.clone().map_or(AdoptedPhase::Running, AdoptedPhase::Ended),
                stopping: sandbox.stopping,
            })
            .collect();
        let mut spawner = [0; 16];
        spawner[..8].copy_from_slice(&self.spawner.to_le_bytes());
        self.apply(HostEvent::SpawnerListed { spawner, held }, now)
    }

    pub fn hello(&self) -> Report {
        let held = self.agent.as_ref().map(|agent| agent.held().collect()).unwrap_or_default();
        Report::Hello(Box::new(Hello {
            boot_id: format!("boot-{}", self.boot),
            agent_start: self.agent_start,
            instance: self.name.clone(),
            capacity: self.capacity,
            labels: BTreeMap::new(),
            fences: std::iter::once("lease.timer".to_owned()).collect(),
            held,
            closed_for_drain: self.closed_for.unwrap_or_default(),
            version: "simulated".into(),
        }))
    }

    /// Tells the agent, carries out what is local, and returns the rest.
    pub fn apply(&mut self, event: HostEvent, now: Timestamp) -> Vec<Wish> {
        let boottime = self.boottime(now);
        let Some(agent) = &mut self.agent else { return Vec::new() };
        let effects = agent.apply(event, boottime);
        effects.into_iter().filter_map(|effect| self.carry_out(effect)).collect()
    }

    fn carry_out(&mut self, effect: HostEffect) -> Option<Wish> {
        match effect {
            HostEffect::Start { attempt } => Some(Wish::Begin(attempt)),
            HostEffect::Stop { attempt, reason, .. } => {
                let sandbox = self.sandboxes.get_mut(&attempt)?;
                sandbox.stopping.get_or_insert(reason);
                Some(Wish::Terminate(attempt))
            }
            HostEffect::Seal { attempt } => Some(Wish::Seal(attempt)),
            HostEffect::ReportStarted { attempt, epoch } => Some(Wish::Say(Report::Started(attempt, epoch))),
            HostEffect::ReportEnded { attempt, epoch, end } => Some(Wish::Say(Report::Ended(attempt, epoch, end))),
            HostEffect::Forget { attempt } => {
                self.sandboxes.remove(&attempt);
                None
            }
            HostEffect::GiveBack { attempts } => Some(Wish::Say(Report::GivenBack(attempts))),
            HostEffect::RenewLease { deadline } => Some(Wish::Lease(deadline)),
            HostEffect::PersistClosure { revision } => Some(Wish::Persist(revision)),
            HostEffect::ListSpawner => Some(Wish::List),
            HostEffect::ProveDrained { revision } => Some(Wish::Say(Report::Proved(revision))),
            HostEffect::RefuseDrain { revision, reason } => Some(Wish::Say(Report::Refused(revision, reason))),
            HostEffect::Release { then } => Some(Wish::Leave(then)),
            HostEffect::Ignore { .. } => None,
        }
    }
}
