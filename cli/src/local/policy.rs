//! Policies of local pools, made to fit this machine: its cores, memory and
//! disk are divided, so that no two nodes report the same.

use std::path::Path;

use muster_core::{
    ids::PoolName,
    policy::{HostTemplate, PoolPolicy, ProviderKind},
    time::Millis,
};

/// The pool of `up` and `demo`.
pub const POOL: &str = "local";
/// Percent of the free memory, and of the free disk, that nodes may use together.
const SHARE_PERCENT: u64 = 50;

/// What there is to divide.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Free bytes.
    pub memory_bytes: u64,
    /// Free bytes.
    pub disk_bytes: u64,
}

impl Machine {
    /// This machine, with the disk of this folder.
    pub fn here(folder: &Path) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let disk = nix::sys::statvfs::statvfs(folder)
            .map_or(1 << 30, |stat| stat.blocks_available().saturating_mul(stat.fragment_size()));
        Self { cpu_milli: cores * 1_000, memory_bytes: free_memory().unwrap_or(1 << 30), disk_bytes: disk }
    }

    /// One of `nodes` equal slices.
    pub fn slice(&self, nodes: u32) -> HostTemplate {
        let nodes = u64::from(nodes.max(1));
        HostTemplate {
            cpu_milli: (self.cpu_milli / nodes).max(1),
            memory_bytes: self.memory_bytes * SHARE_PERCENT / 100 / nodes,
            disk_bytes: self.disk_bytes * SHARE_PERCENT / 100 / nodes,
            labels: Default::default(),
        }
    }
}

fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// A pool that neither grows nor shrinks.
pub fn fixed(nodes: u32, machine: &Machine) -> PoolPolicy {
    let name = PoolName(String::from(POOL));
    PoolPolicy {
        boot_deadline: Millis::from_secs(60),
        ..PoolPolicy::fixed(name, ProviderKind::Local, nodes, nodes, machine.slice(nodes))
    }
}

/// The same pool for a run that ends: it makes no host any more.
pub fn closing(policy: &PoolPolicy) -> PoolPolicy {
    PoolPolicy {
        boot_deadline: policy.boot_deadline,
        ..PoolPolicy::fixed(policy.name.clone(), policy.provider, 0, policy.max, policy.host.clone())
    }
}

/// A policy as its file is written.
pub fn to_toml(policy: &PoolPolicy) -> String {
    toml::to_string(policy).expect("a policy has no type that TOML lacks")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_together_are_no_more_than_the_machine() {
        let machine = Machine { cpu_milli: 2_000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        let slice = machine.slice(3);
        assert!(slice.cpu_milli * 3 <= machine.cpu_milli && slice.memory_bytes * 3 <= machine.memory_bytes);
    }

    #[test]
    fn a_policy_reads_back_as_it_was_written() {
        let machine = Machine { cpu_milli: 2_000, memory_bytes: 8 << 30, disk_bytes: 100 << 30 };
        let policy = fixed(2, &machine);
        assert_eq!(toml::from_str::<PoolPolicy>(&to_toml(&policy)).unwrap(), policy);
        assert_eq!(closing(&policy).min, 0);
    }
}
