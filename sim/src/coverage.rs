//! How often each thing occurred: a run shows what it really tried.

use std::collections::BTreeMap;

use muster_core::{end::End, event::Event};

use crate::setup::Fault;

/// Counts by kind and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coverage {
    counts: BTreeMap<(&'static str, &'static str), u64>,
    edges: BTreeMap<(&'static str, &'static str, &'static str), u64>,
    history: BTreeMap<String, u64>,
    faults: [u64; 64],
}

impl Default for Coverage {
    fn default() -> Self {
        Self { counts: BTreeMap::new(), edges: BTreeMap::new(), history: BTreeMap::new(), faults: [0; 64] }
    }
}

impl Coverage {
    pub(crate) fn count(&mut self, kind: &'static str, name: &'static str) {
        self.add(kind, name, 1);
    }

    pub(crate) fn add(&mut self, kind: &'static str, name: &'static str, times: u64) {
        *self.counts.entry((kind, name)).or_default() += times;
    }

    pub(crate) fn event(&mut self, name: &'static str) {
        self.add("event", name, 1);
    }

    pub(crate) fn fault(&mut self, fault: Fault) {
        self.faults[fault as usize] += 1;
    }

    pub(crate) fn edge(&mut self, field: &'static str, from: &'static str, to: &'static str) {
        if from != to {
            *self.edges.entry((field, from, to)).or_default() += 1;
        }
    }

    pub(crate) fn history(&mut self, kind: &str) {
        match self.history.get_mut(kind) {
            Some(count) => *count += 1,
            None => {
                self.history.insert(kind.to_owned(), 1);
            }
        }
    }

    /// Adds what another run counted.
    pub fn join(&mut self, other: &Self) {
        for (key, times) in &other.counts {
            *self.counts.entry(*key).or_default() += times;
        }
        for (key, times) in &other.edges {
            *self.edges.entry(*key).or_default() += times;
        }
        for (key, times) in &other.history {
            *self.history.entry(key.clone()).or_default() += times;
        }
        for (mine, theirs) in self.faults.iter_mut().zip(&other.faults) {
            *mine += theirs;
        }
    }

    /// All lines, sorted: "fault reboot", and how often.
    #[must_use]
    pub fn lines(&self) -> Vec<(String, u64)> {
        let mut lines: Vec<(String, u64)> = Fault::ALL
            .iter()
            .map(|fault| (format!("fault {}", fault.name()), self.faults[*fault as usize]))
            .chain(self.counts.iter().map(|((kind, name), times)| (format!("{kind} {name}"), *times)))
            .chain(self.edges.iter().map(|((field, from, to), times)| (format!("edge {field} {from} -> {to}"), *times)))
            .chain(self.history.iter().map(|(kind, times)| (format!("history {kind}"), *times)))
            .collect();
        for name in
            EVENTS.iter().map(|name| format!("event {name}")).chain(ENDS.iter().map(|name| format!("end {name}")))
        {
            if !lines.iter().any(|(line, _)| *line == name) {
                lines.push((name, 0));
            }
        }
        lines.sort();
        lines
    }

    /// Lines that occurred less often than this.
    #[must_use]
    pub fn rare(&self, least: u64) -> Vec<(String, u64)> {
        self.lines().into_iter().filter(|(_, times)| *times < least).collect()
    }
}

/// Every event of the core.
const EVENTS: [&str; 33] = [
    "led",
    "stored",
    "host_saw",
    "accept_loss",
    "release_brake",
    "tick",
    "submit",
    "cancel",
    "retry",
    "cordon",
    "uncordon",
    "drain",
    "drain_rolling",
    "cancel_rolling",
    "resume",
    "remove_node",
    "set_pool",
    "steer_pool",
    "enroll",
    "node_connected",
    "node_disconnected",
    "heartbeat",
    "attempt_started",
    "attempt_ended",
    "given_back",
    "drain_proved",
    "drain_refused",
    "stop_notice",
    "attempt_stuck",
    "host_failed",
    "host_gone",
    "host_delete_failed",
    "host_described",
];

pub(crate) const fn event_name(event: &Event) -> &'static str {
    match event {
        Event::Led { .. } => "led",
        Event::Stored { .. } => "stored",
        Event::HostSaw { .. } => "host_saw",
        Event::AcceptLoss { .. } => "accept_loss",
        Event::ReleaseBrake { .. } => "release_brake",
        Event::Tick => "tick",
        Event::Submit { .. } => "submit",
        Event::Cancel { .. } => "cancel",
        Event::Retry { .. } => "retry",
        Event::Cordon { .. } => "cordon",
        Event::Uncordon { .. } => "uncordon",
        Event::Drain { .. } => "drain",
        Event::DrainRolling { .. } => "drain_rolling",
        Event::CancelRolling { .. } => "cancel_rolling",
        Event::Resume { .. } => "resume",
        Event::RemoveNode { .. } => "remove_node",
        Event::SetPool { .. } => "set_pool",
        Event::SteerPool { .. } => "steer_pool",
        Event::Enroll { .. } => "enroll",
        Event::NodeConnected { .. } => "node_connected",
        Event::NodeDisconnected { .. } => "node_disconnected",
        Event::Heartbeat { .. } => "heartbeat",
        Event::AttemptStarted { .. } => "attempt_started",
        Event::AttemptEnded { .. } => "attempt_ended",
        Event::GivenBack { .. } => "given_back",
        Event::DrainProved { .. } => "drain_proved",
        Event::DrainRefused { .. } => "drain_refused",
        Event::StopNotice { .. } => "stop_notice",
        Event::AttemptStuck { .. } => "attempt_stuck",
        Event::HostFailed { .. } => "host_failed",
        Event::HostGone { .. } => "host_gone",
        Event::HostDeleteFailed { .. } => "host_delete_failed",
        Event::HostDescribed { .. } => "host_described",
        Event::ProviderHeard { .. } => "provider_heard",
    }
}

/// Every end, but preemption: nothing preempts yet.
const ENDS: [&str; 13] = [
    "succeeded",
    "exited",
    "signaled",
    "out_of_memory",
    "timed_out",
    "limit",
    "cancelled",
    "drained",
    "node_lost",
    "spawner_lost",
    "refused",
    "start_failed",
    "output_lost",
];

pub(crate) const fn end_name(end: &End) -> &'static str {
    match end {
        End::Succeeded => "succeeded",
        End::Exited(_) => "exited",
        End::Signaled(_) => "signaled",
        End::OutOfMemory { .. } => "out_of_memory",
        End::TimedOut => "timed_out",
        End::Limit(_) => "limit",
        End::Cancelled => "cancelled",
        End::Drained => "drained",
        End::Preempted => "preempted",
        End::NodeLost(_) => "node_lost",
        End::SpawnerLost => "spawner_lost",
        End::Refused(_) => "refused",
        End::StartFailed { .. } => "start_failed",
        End::OutputLost => "output_lost",
    }
}
