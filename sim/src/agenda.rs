//! What happens next, in the order of time; at one time, in the order of asking.

use std::{cmp::Reverse, collections::BinaryHeap};

use muster_core::{
    effect::{Effect, StopReason},
    event::Event,
    host::{HostEvent, StartOrder, Verdict},
    ids::{AttemptId, HostRequestId, NodeId, PoolName, Revision, SessionId},
    time::{Millis, Timestamp},
};

use crate::network::{Message, Report};

/// One thing that happens.
#[derive(Debug)]
pub enum Action {
    /// A coordinator process starts.
    MemberStarts { member: usize },
    /// A timer of the core, the end of a pause or of a slow commit.
    MemberWakes { member: usize, life: u64 },
    /// What follows a commit that took its time.
    Effects { member: usize, life: u64, effects: Vec<Effect> },
    /// A leader renews its leadership, a standby looks at the row.
    Leadership { member: usize, life: u64 },
    /// A renewal that was sent then is committed.
    Renewed { member: usize, life: u64, sent: Timestamp },

    /// Something of a host reaches the coordinator.
    Up { session: SessionId, report: Report },
    /// Something of the coordinator reaches a host.
    Down { session: SessionId, message: Message },
    /// The coordinator's end of a stream closes.
    UpEnds { session: SessionId },
    /// The host's end of a stream closes.
    DownEnds { session: SessionId },
    /// An agent dials.
    Connect { host: usize },
    /// An agent waited for its welcome.
    WelcomeDue { host: usize, session: SessionId },
    /// A heartbeat is due.
    Heartbeat { host: usize, session: SessionId },

    /// An agent process starts.
    AgentStarts { host: usize },
    /// Something local reaches the agent: its disk or its spawner.
    ToAgent { host: usize, agent_start: u64, event: HostEvent },
    /// The closure is on the host's disk.
    Persisted { host: usize, agent_start: u64, revision: Option<Revision> },
    /// The spawner is asked for its list.
    List { host: usize, agent_start: u64 },
    /// The agent sees that its connection to this life of the spawner broke.
    SpawnerGone { host: usize, agent_start: u64, spawner: u64 },
    /// An agent without a spawner connects to one.
    Relink { host: usize, agent_start: u64 },
    /// An order to start reaches the spawner.
    Spawn { host: usize, spawner: u64, agent_start: u64, order: StartOrder },
    /// An order to stop reaches the spawner.
    Terminate { host: usize, spawner: u64, attempt: AttemptId, reason: StopReason, grace: Millis },
    /// The main process of an attempt is over, by itself or by a signal.
    Exits { host: usize, spawner: u64, attempt: AttemptId, verdict: Verdict },
    /// Its group is empty.
    Emptied { host: usize, spawner: u64, attempt: AttemptId, verdict: Verdict },
    /// The spawner's lease timer.
    LeaseTimer { host: usize, spawner: u64 },
    /// A task brings its host down.
    BroughtDown { host: usize, spawner: u64, reboots: bool },
    /// A host that was told to go is wanted again.
    WantedAgain { host: usize },
    /// A copied host is switched off.
    CloneEnds { host: usize },

    /// The clients' next command.
    Client,
    /// A submit is sent, or sent again.
    Submit { job: usize },
    /// A hasty operator's next command on a node.
    Command { node: NodeId },
    /// The next fault.
    Fault,
    /// A host that a provider made starts.
    HostMade { pool: PoolName, host: HostRequestId },
    /// The provider tells the coordinator.
    ProviderTells { event: Box<Event> },
    /// The provider ends a host.
    HostEnds { pool: PoolName, host: HostRequestId },
}

/// What happens next.
pub struct Due {
    pub at: Timestamp,
    /// When it was asked, among all.
    order: u64,
    pub action: Action,
}

/// All that is still to happen.
#[derive(Default)]
pub struct Agenda {
    /// When, in which order of asking, and where the action lies.
    heap: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    actions: Vec<Option<Action>>,
    free: Vec<usize>,
    order: u64,
}

impl Agenda {
    pub fn at(&mut self, at: Timestamp, action: Action) {
        self.order += 1;
        self.put(at, self.order, action);
    }

    /// Later than it was due, and before all that was asked after it: what waits together keeps its order.
    pub fn put_off(&mut self, until: Timestamp, due: Due) {
        self.put(until, due.order, due.action);
    }

    fn put(&mut self, at: Timestamp, order: u64, action: Action) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.actions.push(None);
            self.actions.len() - 1
        });
        self.actions[slot] = Some(action);
        self.heap.push(Reverse((at, order, slot)));
    }

    /// Is such a thing still to happen?
    pub fn awaits(&self, such: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().flatten().any(such)
    }

    pub fn next(&mut self) -> Option<Due> {
        let Reverse((at, order, slot)) = self.heap.pop()?;
        self.free.push(slot);
        self.actions[slot].take().map(|action| Due { at, order, action })
    }
}
