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
    mutation::{self, Mutation},
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
    if !missing.is_empty() && !mutation::is_on(Mutation::FencesUncompared) {
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

fn unplaceable_state(node: &Node) -> &'static str {
    match (&node.record.liveness, &node.record.duty, &node.record.hold) {
        (Liveness::Live, Duty::Eligible, Hold::None) if node.record.disk_full.is_some() => "not ready: disk",
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

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;
    use crate::{
        ids::{HostRequestId, PoolName, SessionId},
        node::NodeRecord,
        resources::Resources,
        time::Timestamp,
    };

    fn cores(cpu: u64) -> Resources {
        Resources { cpu_milli: cpu * 1_000, memory_bytes: cpu << 30, disk_bytes: 0 }
    }

    /// A node of this pool with a label and a fence, live and empty.
    fn node(pool: &str, cpu: u64) -> Node {
        let record = NodeRecord {
            name: "web-01".into(),
            pool: PoolName(pool.into()),
            key: [0; 32],
            host: None::<HostRequestId>,
            joined: Timestamp(0),
            incarnation: Default::default(),
            boot_id: String::new(),
            instance: String::new(),
            agent_start: 1,
            capacity: cores(cpu),
            labels: [("disk".to_string(), "ssd".to_string())].into(),
            fences: ["ns.pid".to_string()].into(),
            version: String::new(),
            liveness: Liveness::Live,
            duty: Duty::Eligible,
            hold: Hold::None,
            faults: 0,
            attempts_total: 0,
            idle_since: None,
            drain_revision: Default::default(),
            rolling: None,
            disk_full: None,
        };
        Node { session: Some(SessionId(1)), ..Node::new(record, Timestamp(0)) }
    }

    fn class(cpu: u64) -> Class {
        let (constraints, fences) = (BTreeMap::new(), BTreeSet::new());
        Class { request: cores(cpu), pool: None, constraints, fences, may_prefill: true }
    }

    #[test]
    fn a_node_is_feasible_by_pool_label_fence_and_size() {
        let here = node("batch", 4);
        assert_eq!(feasible(&class(4), &here), Ok(()));
        assert_eq!(feasible(&class(5), &here), Err(Unfit::TooSmall("4 CPU, and it asks 5".into())));
        let pool = |name: &str| Class { pool: Some(PoolName(name.into())), ..class(1) };
        assert_eq!(feasible(&pool("batch"), &here), Ok(()));
        assert_eq!(feasible(&pool("web"), &here), Err(Unfit::OtherPool));
        let label = |value: &str| Class { constraints: [("disk".into(), value.into())].into(), ..class(1) };
        assert_eq!(feasible(&label("ssd"), &here), Ok(()));
        assert_eq!(feasible(&label("tape"), &here), Err(Unfit::Label("disk=tape".into())));
        let fence = |name: &str| Class { fences: [name.into()].into(), ..class(1) };
        assert_eq!(feasible(&fence("ns.pid"), &here), Ok(()));
        assert_eq!(feasible(&fence("seccomp"), &here), Err(Unfit::Fences("seccomp".into())));
    }

    #[test]
    fn what_is_full_or_set_aside_takes_nothing_now() {
        let full = Node { allocated: cores(3), ..node("batch", 4) };
        assert_eq!(fits_now(&class(1), &full), Ok(()));
        assert_eq!(fits_now(&class(2), &full), Err(Unfit::Full));
        let unheard = Node { session: None, ..node("batch", 4) };
        assert_eq!(fits_now(&class(1), &unheard), Err(Unfit::State("reconnecting")));
        let mut silent = node("batch", 4);
        silent.record.liveness = Liveness::Silent(Timestamp(1));
        assert_eq!(fits_now(&class(1), &silent), Err(Unfit::State("silent")));
    }

    /// Nodes 1 and 2 of 4 cores, with so many taken, in one index.
    fn index(taken: [u64; 2]) -> (NodeIndex, BTreeMap<NodeId, Node>) {
        let nodes: BTreeMap<NodeId, Node> = taken
            .into_iter()
            .zip(1..)
            .map(|(taken, id)| (NodeId(id), Node { allocated: cores(taken), ..node("batch", 4) }))
            .collect();
        let mut index = NodeIndex::default();
        nodes.iter().for_each(|(id, node)| index.update(*id, Some(node)));
        (index, nodes)
    }

    #[test]
    fn spread_takes_the_emptiest_and_bin_pack_the_fullest_that_fits() {
        let (index, nodes) = index([1, 3]);
        let spread = index.choose(PlacementOrder::Spread, &class(1), &nodes);
        assert_eq!(spread, Some((NodeId(1), "spread: least loaded of 2 nodes, at 25 %".into())));
        let packed = index.choose(PlacementOrder::BinPack, &class(1), &nodes);
        assert_eq!(packed, Some((NodeId(2), "bin-pack: fullest of 2 nodes that fits, at 75 %".into())));
        assert_eq!(index.choose(PlacementOrder::BinPack, &class(2), &nodes).map(|(id, _)| id), Some(NodeId(1)));
        assert_eq!(index.choose(PlacementOrder::Spread, &class(4), &nodes), None);
    }

    #[test]
    fn among_a_few_only_those_count_that_fit_and_are_in_the_index() {
        let (mut index, nodes) = index([1, 3]);
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        let among =
            |index: &NodeIndex, order, class: &Class| index.choose_among(order, class, &both, &nodes).map(|(id, _)| id);
        assert_eq!(among(&index, PlacementOrder::Spread, &class(1)), Some(NodeId(1)));
        assert_eq!(among(&index, PlacementOrder::BinPack, &class(1)), Some(NodeId(2)));
        assert_eq!(among(&index, PlacementOrder::BinPack, &class(2)), Some(NodeId(1)), "the other has no room");
        index.update(NodeId(1), None);
        assert_eq!(among(&index, PlacementOrder::Spread, &class(1)), Some(NodeId(2)), "the first has left");
        assert_eq!(among(&index, PlacementOrder::Spread, &class(2)), None);
    }

    #[test]
    fn among_a_few_the_emptiest_goes_first_and_equals_take_turns() {
        let both = BTreeSet::from([NodeId(1), NodeId(2)]);
        let (index_of, nodes) = index([3, 1]);
        let spread = |index: &NodeIndex, nodes| index.choose_among(PlacementOrder::Spread, &class(1), &both, nodes);
        assert_eq!(spread(&index_of, &nodes).map(|(id, _)| id), Some(NodeId(2)), "although it comes second");
        let (mut index, mut nodes) = index([1, 1]);
        let first = nodes.get_mut(&NodeId(1)).expect("the first node");
        first.last_placed = 7;
        index.update(NodeId(1), Some(first));
        assert_eq!(spread(&index, &nodes).map(|(id, _)| id), Some(NodeId(2)), "the other has had its turn");
    }

    #[test]
    fn who_is_set_aside_leaves_the_index() {
        let (mut index, mut nodes) = index([1, 1]);
        let first = nodes.get_mut(&NodeId(1)).expect("the first node");
        first.session = None;
        index.update(NodeId(1), Some(first));
        let chosen = index.choose(PlacementOrder::Spread, &class(1), &nodes);
        assert_eq!(chosen, Some((NodeId(2), "spread: least loaded of 1 nodes, at 25 %".into())));
    }

    #[test]
    fn obstacles_are_counted_and_who_is_gone_is_none() {
        let mut gone = node("batch", 4);
        gone.record.liveness = Liveness::Gone(Timestamp(1));
        let full = Node { allocated: cores(4), ..node("batch", 4) };
        let nodes = [full.clone(), full, node("batch", 1), gone];
        assert_eq!(explain(&class(2), nodes.iter()), "1 node too small: it has 1 CPU, and it asks 2; 2 nodes full");
        assert_eq!(explain(&class(1), nodes.iter()), "next in line; a node has room");
        assert_eq!(explain(&class(1), nodes[3..].iter()), "no node has joined");
    }
}
