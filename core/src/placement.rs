//! Which node gets an attempt: feasible, rank, choose; and why a job waits.
//!
//! Nodes of a pool stand in two orders that are kept as they change, by load
//! and by free CPU, so that a choice looks at the nodes that can take the
//! attempt first, and at full ones not at all.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    vec::Vec,
};

use crate::{
    ids::NodeId,
    node::{Duty, Hold, Liveness, Node},
    policy::PlacementOrder,
    queue::Class,
};

/// Why a node cannot take a class of tasks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unfit {
    /// It belongs to another pool.
    OtherPool,
    /// It lacks a label.
    Label(String),
    /// It cannot raise these fences.
    Fences(String),
    /// One task is more than the whole node.
    TooSmall(String),
    /// Its state forbids new work.
    State(&'static str),
    /// It has no room now.
    Full,
}

/// Could the node ever take a task of this class, whatever runs there now?
///
/// # Errors
/// The first thing that it lacks.
pub fn feasible(class: &Class, node: &Node) -> Result<(), Unfit> {
    let record = &node.record;
    if class.pool.as_ref().is_some_and(|pool| *pool != record.pool) {
        return Err(Unfit::OtherPool);
    }
    if let Some((label, value)) =
        class.constraints.iter().find(|(label, value)| record.labels.get(*label) != Some(*value))
    {
        return Err(Unfit::Label(format!("{label}={value}")));
    }
    let missing: Vec<&str> = class.fences.difference(&record.fences).map(String::as_str).collect();
    if !missing.is_empty() {
        return Err(Unfit::Fences(missing.join(", ")));
    }
    class.request.shortage(&record.capacity).map_or(Ok(()), |shortage| Err(Unfit::TooSmall(shortage)))
}

/// Can the node take one task of this class now?
///
/// # Errors
/// The first thing that forbids it.
pub fn fits_now(class: &Class, node: &Node) -> Result<(), Unfit> {
    feasible(class, node)?;
    if !node.is_placeable() {
        return Err(Unfit::State(unplaceable_state(node)));
    }
    if class.request.fits_in(&node.free()) { Ok(()) } else { Err(Unfit::Full) }
}

const fn unplaceable_state(node: &Node) -> &'static str {
    match (&node.record.liveness, &node.record.duty, &node.record.hold) {
        (Liveness::Live, Duty::Eligible, Hold::None) => "reconnecting",
        _any => node.record.state(),
    }
}

/// The nodes of one pool that may get work, in both orders.
#[derive(Clone, Debug, Default)]
pub struct NodeIndex {
    /// Load in permille, last placement, node.
    by_load: BTreeSet<(u64, u64, NodeId)>,
    /// Free CPU, node.
    by_free: BTreeSet<(u64, NodeId)>,
    keys: BTreeMap<NodeId, (u64, u64, u64)>,
}

impl NodeIndex {
    /// The node changed: put it where it belongs now, or nowhere.
    pub fn update(&mut self, id: NodeId, node: Option<&Node>) {
        if let Some((load, last, free)) = self.keys.remove(&id) {
            self.by_load.remove(&(load, last, id));
            self.by_free.remove(&(free, id));
        }
        let Some(node) = node.filter(|node| node.is_placeable()) else { return };
        let key = (node.load_permille(), node.last_placed, node.free().cpu_milli);
        self.by_load.insert((key.0, key.1, id));
        self.by_free.insert((key.2, id));
        self.keys.insert(id, key);
    }

    /// The best node for one task, and why it is the best.
    #[must_use]
    pub fn choose(
        &self,
        order: PlacementOrder,
        class: &Class,
        nodes: &BTreeMap<NodeId, Node>,
    ) -> Option<(NodeId, String)> {
        let fits = |id: &NodeId| nodes.get(id).is_some_and(|node| fits_now(class, node).is_ok());
        let chosen = match order {
            // In the order of load, then of the longest rest since the last placement: equals take turns.
            PlacementOrder::Spread => self.by_load.iter().map(|(_, _, id)| *id).find(fits),
            // From the least free CPU that suffices upwards: the fullest node that still fits.
            PlacementOrder::BinPack => {
                self.by_free.range((class.request.cpu_milli, NodeId(0))..).map(|(_, id)| *id).find(fits)
            }
        }?;
        Some((chosen, self.reason(order, chosen)))
    }

    /// The best among a few nodes.
    #[must_use]
    pub fn choose_among(
        &self,
        order: PlacementOrder,
        class: &Class,
        among: &BTreeSet<NodeId>,
        nodes: &BTreeMap<NodeId, Node>,
    ) -> Option<(NodeId, String)> {
        let fitting = among
            .iter()
            .filter(|id| self.keys.contains_key(id) && nodes.get(id).is_some_and(|node| fits_now(class, node).is_ok()));
        let rank = |id: &&NodeId| self.keys.get(id).copied().unwrap_or_default();
        let chosen = match order {
            PlacementOrder::Spread => fitting.min_by_key(|id| (rank(id).0, rank(id).1)),
            PlacementOrder::BinPack => fitting.min_by_key(|id| rank(id).2),
        }?;
        Some((*chosen, self.reason(order, *chosen)))
    }

    fn reason(&self, order: PlacementOrder, id: NodeId) -> String {
        let percent = self.keys.get(&id).map_or(0, |(load, _, _)| load / 10);
        match order {
            PlacementOrder::Spread => format!("spread: least loaded of {} nodes, at {percent} %", self.keys.len()),
            PlacementOrder::BinPack => {
                format!("bin-pack: fullest of {} nodes that fits, at {percent} %", self.keys.len())
            }
        }
    }
}

/// Why no node takes this class now: each obstacle with the number of nodes that have it.
#[must_use]
pub fn explain<'a>(class: &Class, nodes: impl Iterator<Item = &'a Node>) -> String {
    let mut obstacles: BTreeMap<Unfit, u32> = BTreeMap::new();
    for node in nodes.filter(|node| !matches!(node.record.liveness, Liveness::Gone(_))) {
        match fits_now(class, node) {
            Ok(()) => return String::from("next in line; a node has room"),
            Err(unfit) => *obstacles.entry(unfit).or_default() += 1,
        }
    }
    if obstacles.is_empty() {
        return String::from("no node has joined");
    }
    let parts: Vec<String> = obstacles.iter().map(|(unfit, count)| sentence(unfit, *count)).collect();
    parts.join("; ")
}

fn sentence(unfit: &Unfit, count: u32) -> String {
    let nodes = if count == 1 { String::from("1 node") } else { format!("{count} nodes") };
    match unfit {
        Unfit::OtherPool => format!("{nodes} of other pools"),
        Unfit::Label(label) => format!("{nodes} without the label {label}"),
        Unfit::Fences(fences) => format!("{nodes} without {fences} (see --without)"),
        Unfit::TooSmall(shortage) => format!("{nodes} too small: it has {shortage}"),
        Unfit::State(state) => format!("{nodes} {state}"),
        Unfit::Full => format!("{nodes} full"),
    }
}
