//! Simulated placement: how many more hosts of one size would the waiting tasks
//! fill? So that no host is made that no waiting task can use.

use alloc::vec::Vec;

use crate::resources::Resources;

/// Classes that are packed exactly; what is left is counted without sharing hosts.
pub const CLASSES_PACKED_MAX: usize = 128;

/// Alike waiting tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What one of them takes.
    pub request: Resources,
    /// How many.
    pub tasks: u64,
}

/// Hosts with the same room left.
#[derive(Clone, Copy, Debug)]
struct Bin {
    free: Resources,
    hosts: u64,
}

/// What comes of placing waiting tasks on hosts that are not there yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// Hosts to be made, beyond those that boot.
    pub new_hosts: u64,
    /// Tasks of each class, in the order given, that found no place.
    pub left: Vec<u64>,
}

/// Places waiting tasks on `booting` hosts of this capacity and then on at most `most` new ones:
/// first fit, the largest tasks first.
#[must_use]
pub fn pack(waiting: &[Waiting], capacity: &Resources, booting: u32, most: u64) -> Packed {
    let mut left: Vec<u64> = waiting.iter().map(|class| class.tasks).collect();
    let fits = |index: &usize| waiting.get(*index).is_some_and(|class| class.request.fits_in(capacity));
    let mut order: Vec<usize> = (0..waiting.len()).filter(fits).collect();
    order.sort_by_key(|index| waiting.get(*index).map(|class| capacity.count_of(&class.request)));
    let mut bins = Vec::new();
    push(&mut bins, *capacity, u64::from(booting));
    let mut new_hosts = 0;
    for (turn, index) in order.into_iter().enumerate() {
        let (Some(class), Some(left)) = (waiting.get(index), left.get_mut(index)) else { continue };
        let per_host = capacity.count_of(&class.request).max(1);
        fill(&mut bins, &class.request, left);
        let full = (*left / per_host).min(most - new_hosts);
        *left -= full * per_host;
        new_hosts += full;
        let rest = if new_hosts < most && *left < per_host { *left } else { 0 };
        *left -= rest;
        new_hosts += u64::from(rest > 0);
        if turn < CLASSES_PACKED_MAX {
            push(&mut bins, capacity.minus(&times(&class.request, per_host)), full);
            push(&mut bins, capacity.minus(&times(&class.request, rest)), u64::from(rest > 0));
        }
    }
    Packed { new_hosts, left }
}

fn push(bins: &mut Vec<Bin>, free: Resources, hosts: u64) {
    if hosts > 0 {
        bins.push(Bin { free, hosts });
    }
}

/// Puts tasks where there is room, as long as some are left.
fn fill(bins: &mut Vec<Bin>, request: &Resources, left: &mut u64) {
    let mut split = Vec::new();
    for bin in bins.iter_mut() {
        let per_host = bin.free.count_of(request);
        if per_host == 0 || *left == 0 {
            continue;
        }
        let full = (*left / per_host).min(bin.hosts);
        let rest = if full < bin.hosts { *left % per_host } else { 0 };
        let untouched = bin.hosts - full - u64::from(rest > 0);
        let whole = bin.free;
        *left -= full * per_host + rest;
        // Three kinds of hosts come of one: full, one in part, and as before.
        let mut kinds = [(per_host, full), (rest, u64::from(rest > 0)), (0, untouched)]
            .into_iter()
            .filter(|(_, hosts)| *hosts > 0)
            .map(|(tasks, hosts)| Bin { free: whole.minus(&times(request, tasks)), hosts });
        if let Some(first) = kinds.next() {
            split.extend(kinds);
            *bin = first;
        }
    }
    bins.extend(split);
}

const fn times(one: &Resources, count: u64) -> Resources {
    Resources {
        cpu_milli: one.cpu_milli.saturating_mul(count),
        memory_bytes: one.memory_bytes.saturating_mul(count),
        disk_bytes: one.disk_bytes.saturating_mul(count),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amounts(cpu_milli: u64, memory_bytes: u64) -> Resources {
        Resources { cpu_milli, memory_bytes, disk_bytes: 0 }
    }

    fn waiting(cpu_milli: u64, memory_bytes: u64, tasks: u64) -> Waiting {
        Waiting { request: amounts(cpu_milli, memory_bytes), tasks }
    }

    const HOST: Resources = Resources { cpu_milli: 4_000, memory_bytes: 8_000, disk_bytes: 0 };

    fn new_hosts(waiting: &[Waiting], booting: u32) -> u64 {
        pack(waiting, &HOST, booting, u64::MAX).new_hosts
    }

    #[test]
    fn hosts_that_boot_are_filled_before_any_is_made() {
        assert_eq!(new_hosts(&[waiting(1_000, 100, 9)], 0), 3);
        assert_eq!(new_hosts(&[waiting(1_000, 100, 9)], 2), 1);
        assert_eq!(new_hosts(&[waiting(1_000, 100, 9)], 3), 0);
    }

    #[test]
    fn small_tasks_fill_what_large_ones_leave() {
        assert_eq!(new_hosts(&[waiting(1_000, 100, 2), waiting(3_000, 100, 2)], 0), 2);
    }

    #[test]
    fn no_host_is_made_for_a_task_that_it_could_not_hold() {
        assert_eq!(new_hosts(&[waiting(5_000, 100, 7), waiting(1_000, 9_000, 7)], 0), 0);
    }

    #[test]
    fn what_finds_no_place_is_left_for_another_pool() {
        let packed = pack(&[waiting(1_000, 100, 9), waiting(5_000, 1, 2)], &HOST, 1, 1);
        assert_eq!(packed, Packed { new_hosts: 1, left: Vec::from([1, 2]) });
    }

    /// One task after the other, first fit.
    fn one_by_one(tasks: &[Waiting], booting: u32) -> u64 {
        let mut order = tasks.to_vec();
        order.retain(|class| class.request.fits_in(&HOST));
        order.sort_by_key(|class| HOST.count_of(&class.request));
        let mut hosts: Vec<Resources> = (0..booting).map(|_| HOST).collect();
        for class in order {
            for _ in 0..class.tasks {
                match hosts.iter_mut().find(|free| class.request.fits_in(free)) {
                    Some(free) => *free = free.minus(&class.request),
                    None => hosts.push(HOST.minus(&class.request)),
                }
            }
        }
        hosts.len() as u64 - u64::from(booting)
    }

    proptest! {
        #[test]
        fn it_is_what_placing_one_by_one_comes_to(
            classes in proptest::collection::vec((1u64..5_000, 1u64..9_000, 0u64..20), 0..6),
            booting in 0u32..4,
        ) {
            let tasks: Vec<Waiting> = classes.into_iter().map(|(cpu, memory, tasks)| waiting(cpu, memory, tasks)).collect();
            let (fast, slow) = (new_hosts(&tasks, booting), one_by_one(&tasks, booting));
            // Bins are looked at in another order once they have been split.
            prop_assert!(fast.abs_diff(slow) <= 2, "{fast} and {slow}");
            let cpu: u64 = tasks.iter().filter(|class| class.request.fits_in(&HOST)).map(|class| class.request.cpu_milli * class.tasks).sum();
            prop_assert!((fast + u64::from(booting)) * HOST.cpu_milli >= cpu);
        }
    }
}
