//! What the demo says at its end, all of it from the coordinator's store but
//! the exits of processes, which only their parent sees.

use std::collections::{BTreeMap, BTreeSet};

use muster_proto::v1::{FleetEvent, ScalingDecision};
use serde_json::{Value, json};

use crate::{
    escape,
    inputs::Skipped,
    local::Exits,
    output::{API_VERSION, rfc3339},
};

/// With this many tasks each node must have run some.
const TASKS_FOR_ALL_NODES: u64 = 200;

/// A drain that a scale-in asked, from request to the end of the node's processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// The node.
    pub node: String,
    /// Why.
    pub reason: String,
    /// When it was asked.
    pub requested_ms: u64,
    /// When the agent proved that nothing is left.
    pub proved_ms: Option<u64>,
    /// When the agent's process ended.
    pub exited_ms: Option<u64>,
}

/// The whole summary.
#[derive(Debug, Default)]
pub struct Summary {
    /// Files that were sent.
    pub tasks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Results that are right.
    pub verified: u64,
    /// Results that are not.
    pub wrong: Vec<String>,
    /// Files that were left out.
    pub skipped: Vec<Skipped>,
    /// The most nodes at once.
    pub nodes_peak: usize,
    /// Nodes at the end.
    pub nodes_end: usize,
    /// Tasks of each node.
    pub nodes: BTreeMap<String, u64>,
    /// Each drain.
    pub drains: Vec<Drained>,
    /// Each scaling decision.
    pub decisions: Vec<ScalingDecision>,
    /// Fences that this host lacks.
    pub without: Vec<String>,
    /// From start to end.
    pub wall_ms: u64,
    /// From submit to the last task's end.
    pub job_ms: u64,
    /// What went wrong besides results.
    pub problems: Vec<String>,
}

impl Summary {
    /// Everything is as it should be.
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty() && self.problems.is_empty() && self.verified == self.tasks
    }

    /// Finished tasks a second.
    pub fn tasks_per_s(&self) -> f64 {
        if self.job_ms == 0 { 0.0 } else { (self.tasks as f64 * 1_000.0 / self.job_ms as f64 * 10.0).round() / 10.0 }
    }

    /// Looks at what the store and the parent say together.
    pub fn check(&mut self) {
        if self.tasks >= TASKS_FOR_ALL_NODES {
            let idle: Vec<&String> =
                self.nodes.iter().filter(|(_, tasks)| **tasks == 0).map(|(node, _)| node).collect();
            for node in idle {
                self.problems.push(format!("node {node} ran no task"));
            }
        }
        if self.nodes_end > 0 {
            self.problems.push(format!("{} nodes are left", self.nodes_end));
        }
        for drain in &self.drains {
            match (drain.proved_ms, drain.exited_ms) {
                (Some(proved), Some(exited)) if proved <= exited => {}
                (Some(_), Some(_)) => {
                    self.problems.push(format!("node {} ended before its drain was proved", drain.node));
                }
                (None, _) => self.problems.push(format!("the drain of node {} was never proved", drain.node)),
                (_, None) => {
                    self.problems.push(format!("the processes of node {} did not end by themselves", drain.node))
                }
            }
        }
    }

    /// For machines.
    pub fn value(&self) -> Value {
        json!({
            "apiVersion": API_VERSION,
            "kind": "DemoSummary",
            "tasks": self.tasks,
            "bytes": self.bytes,
            "verified": self.verified,
            "failed": self.wrong.len(),
            "failures": self.wrong,
            "skipped": self.skipped.len(),
            "skipped_files": self.skipped.iter().map(|skipped| json!({
                "path": escape::path(&skipped.path), "reason": skipped.reason,
            })).collect::<Vec<_>>(),
            "nodes_peak": self.nodes_peak,
            "nodes_end": self.nodes_end,
            "nodes": self.nodes.iter().map(|(node, tasks)| json!({ "node": node, "tasks": tasks })).collect::<Vec<_>>(),
            "drains": self.drains.len(),
            "drained": self.drains.iter().map(|drain| json!({
                "node": drain.node, "reason": drain.reason, "requested_at": rfc3339(drain.requested_ms),
                "proved_at": drain.proved_ms.map(rfc3339), "exited_at": drain.exited_ms.map(rfc3339),
            })).collect::<Vec<_>>(),
            "decisions": self.decisions.iter().map(|decision| json!({
                "time": rfc3339(decision.time_ms), "pool": decision.pool, "from": decision.from, "to": decision.to,
                "reason": decision.reason,
            })).collect::<Vec<_>>(),
            "without": self.without,
            "problems": self.problems,
            "wall_ms": self.wall_ms,
            "tasks_per_s": self.tasks_per_s(),
            "ok": self.is_good(),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "tasks      {} files, {}: {} verified, {} failed, {} skipped\n",
            self.tasks,
            muster_core::resources::Bytes(self.bytes),
            self.verified,
            self.wrong.len(),
            self.skipped.len()
        );
        let each: Vec<String> =
            self.nodes.iter().map(|(node, tasks)| format!("{} {tasks}", escape::text(node))).collect();
        text.push_str(&format!(
            "nodes      {} at once, {} at the end; tasks of each: {}\n",
            self.nodes_peak,
            self.nodes_end,
            if each.is_empty() { String::from("none") } else { each.join(", ") }
        ));
        text.push_str(&format!(
            "speed      {} tasks/s; {:.1} s in all\n",
            self.tasks_per_s(),
            self.wall_ms as f64 / 1_000.0
        ));
        if !self.without.is_empty() {
            text.push_str(&format!("without    {} (this host lacks them)\n", self.without.join(", ")));
        }
        text.push_str("decisions\n");
        for decision in &self.decisions {
            text.push_str(&format!(
                "  {}  {} {} -> {}  {}\n",
                rfc3339(decision.time_ms),
                escape::text(&decision.pool),
                decision.from,
                decision.to,
                escape::text(&decision.reason)
            ));
        }
        text.push_str("drains\n");
        for drain in &self.drains {
            let after = |ms: Option<u64>| {
                ms.map_or_else(
                    || String::from("never"),
                    |ms| format!("after {} ms", ms.saturating_sub(drain.requested_ms)),
                )
            };
            text.push_str(&format!(
                "  {}  {}  proved empty {}, ended {}: {}\n",
                rfc3339(drain.requested_ms),
                escape::text(&drain.node),
                after(drain.proved_ms),
                after(drain.exited_ms),
                escape::text(&drain.reason)
            ));
        }
        for skipped in self.skipped.iter().take(20) {
            text.push_str(&format!("skipped    {}: {}\n", escape::path(&skipped.path), skipped.reason));
        }
        if self.skipped.len() > 20 {
            text.push_str(&format!("skipped    and {} more; --json has them all\n", self.skipped.len() - 20));
        }
        for wrong in self.wrong.iter().chain(&self.problems).take(50) {
            text.push_str(&format!("WRONG      {wrong}\n"));
        }
        text.push_str(if self.is_good() {
            "All is verified, and nothing is left behind.\n"
        } else {
            "NOT all is right.\n"
        });
        text
    }
}

/// Drains and the most nodes at once, from the fleet's history.
pub fn from_history(events: &[FleetEvent], exits: &[Exits]) -> (usize, Vec<Drained>, BTreeSet<String>) {
    let mut here = BTreeSet::new();
    let mut ever = BTreeSet::new();
    let mut peak = 0;
    let mut drains: BTreeMap<String, Drained> = BTreeMap::new();
    for event in events {
        let Some(node) = event.subject.strip_prefix("node/") else { continue };
        match event.kind.as_str() {
            "connected" | "live" => {
                ever.insert(node.to_owned());
                here.insert(node.to_owned());
                peak = peak.max(here.len());
            }
            "gone" | "lost" | "removed" => {
                here.remove(node);
            }
            "drain_requested" => {
                let exited_ms = exits.iter().find(|exit| exit.name == node && exit.released).map(|exit| exit.agent_ms);
                let drain = Drained {
                    node: node.to_owned(),
                    reason: event.reason.clone(),
                    requested_ms: event.time_ms,
                    proved_ms: None,
                    exited_ms,
                };
                drains.insert(node.to_owned(), drain);
            }
            "drain_proved" => {
                if let Some(drain) = drains.get_mut(node) {
                    drain.proved_ms = Some(event.time_ms);
                }
            }
            // A scale-in that was taken back is no drain of this node any more.
            "resumed" | "drain_refused" => {
                drains.remove(node);
            }
            _ => {}
        }
    }
    let mut drains: Vec<Drained> = drains.into_values().collect();
    drains.sort_by_key(|drain| drain.requested_ms);
    (peak, drains, ever)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time_ms: u64, node: &str, kind: &str) -> FleetEvent {
        FleetEvent { time_ms, subject: format!("node/{node}"), kind: kind.into(), ..FleetEvent::default() }
    }

    #[test]
    fn history_tells_the_peak_and_each_drain() {
        let events = [
            event(1, "a", "connected"),
            event(2, "b", "connected"),
            event(3, "a", "drain_requested"),
            event(4, "a", "resumed"),
            event(5, "b", "drain_requested"),
            event(6, "b", "drain_proved"),
            event(9, "b", "gone"),
        ];
        let exits = [Exits { name: "b".into(), released: true, agent_ms: 7 }];
        let (peak, drains, ever) = from_history(&events, &exits);
        assert_eq!((peak, drains.len(), ever.len()), (2, 1, 2));
        assert_eq!((drains[0].proved_ms, drains[0].exited_ms), (Some(6), Some(7)));
    }

    #[test]
    fn a_node_that_ended_before_its_proof_is_a_problem() {
        let drain = Drained { node: "b".into(), proved_ms: Some(9), exited_ms: Some(7), ..Drained::default() };
        let mut summary = Summary { drains: vec![drain], ..Summary::default() };
        summary.check();
        assert!(!summary.is_good());
        assert_eq!(summary.value()["drains"], 1);
    }
}
