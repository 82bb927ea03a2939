//! The demo's pool: none to four nodes of equal slices of this machine, by the
//! queue alone, each small enough that it runs two tasks at a time.

use muster_core::{
    policy::{Change, Metric, PoolPolicy, ScaleIn, ScaleOut},
    resources::Resources,
    time::Millis,
};

use crate::local::policy::{Machine, fixed};

/// At most this many nodes.
const NODES_MAX: u32 = 4;
/// Tasks that a node runs at a time.
const TASKS_OF_A_NODE: u64 = 2;
/// More waiting tasks than this ask for another node.
const QUEUE_ABOVE: u64 = 4;
/// A node that has had nothing to do for this long goes.
const IDLE: Millis = Millis(1_000);
/// One after the other.
const BETWEEN_SCALE_INS: Millis = Millis(400);
/// Memory of one task: `gzip` and a shell need a few MiB.
const TASK_MEMORY_BYTES: u64 = 64 << 20;
/// What a task's folder has besides its files.
const TASK_DISK_SPARE_BYTES: u64 = 4 << 20;

/// Before it is known what the work is: the first node, and no more.
/// It is there to be asked what this host can fence.
pub fn before_the_work(policy: &PoolPolicy) -> PoolPolicy {
    PoolPolicy { min: 1, scale_out: Vec::new(), scale_in: None, ..policy.clone() }
}

/// The policy that decides, for files of at most this size.
pub fn for_the_work(machine: &Machine, largest_bytes: u64) -> PoolPolicy {
    let mut policy = fixed(NODES_MAX, machine);
    policy.min = 0;
    policy.host.memory_bytes = policy.host.memory_bytes.min(TASKS_OF_A_NODE * TASK_MEMORY_BYTES);
    policy.host.disk_bytes = TASKS_OF_A_NODE * task_disk_bytes(largest_bytes);
    policy.scale_out = vec![ScaleOut {
        metric: Metric::QueueLength,
        above: QUEUE_ABOVE,
        hold: Millis(0),
        change: Change::Step(1),
        cooldown: Some(Millis(0)),
    }];
    policy.scale_in = Some(ScaleIn { cooldown: Some(BETWEEN_SCALE_INS), ..ScaleIn::one_by_one(IDLE) });
    policy
}

/// The input, what gzip makes of it at worst, and a little.
const fn task_disk_bytes(largest_bytes: u64) -> u64 {
    largest_bytes * 2 + largest_bytes / 64 + TASK_DISK_SPARE_BYTES
}

/// What one task asks.
pub const fn task_request(policy: &PoolPolicy) -> Resources {
    Resources {
        cpu_milli: policy.host.cpu_milli / TASKS_OF_A_NODE,
        memory_bytes: policy.host.memory_bytes / TASKS_OF_A_NODE,
        disk_bytes: policy.host.disk_bytes / TASKS_OF_A_NODE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_runs_two_tasks_whatever_the_files() {
        let machine = Machine { cpu_milli: 2_000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        for largest in [0, 1 << 20, 10 << 30] {
            let policy = for_the_work(&machine, largest);
            assert_eq!(policy.host.capacity().count_of(&task_request(&policy)), TASKS_OF_A_NODE);
            assert!(task_request(&policy).disk_bytes > largest * 2);
        }
    }

    #[test]
    fn the_first_policy_only_keeps_one_node() {
        let machine = Machine { cpu_milli: 2_000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        let policy = before_the_work(&for_the_work(&machine, 0));
        assert_eq!((policy.min, policy.max, policy.scale_out.len()), (1, NODES_MAX, 0));
    }
}
