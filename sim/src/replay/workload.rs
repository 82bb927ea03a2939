//! What a trace comes to: when how many tasks arrive, what each takes and for how long.

use muster_core::{resources::Resources, time::Millis};

/// Alike tasks that arrive at one moment: an array job of the replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Since the trace's begin.
    pub at: Millis,
    /// How long each runs on a host.
    pub run: Millis,
    /// Thousandths of a core that each takes.
    pub cpu_milli: u32,
    /// Memory that each takes, in MiB.
    pub memory_mib: u32,
    /// How many.
    pub tasks: u32,
}

impl Arrival {
    /// What one of its tasks takes.
    #[must_use]
    pub const fn request(&self) -> Resources {
        Resources { cpu_milli: self.cpu_milli as u64, memory_bytes: (self.memory_mib as u64) << 20, disk_bytes: 0 }
    }
}

/// A trace as the replay plays it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// In the order of their arrival.
    pub arrivals: Vec<Arrival>,
    /// Lines of the trace that name work which cannot be played, and why; by reason.
    pub skipped: Vec<(String, u64)>,
}

impl Workload {
    /// Arrivals in any order.
    #[must_use]
    pub fn new(mut arrivals: Vec<Arrival>) -> Self {
        arrivals.retain(|arrival| arrival.tasks > 0);
        arrivals.sort_by_key(|arrival| arrival.at);
        Self { arrivals, skipped: Vec::new() }
    }

    /// Tasks in all.
    #[must_use]
    pub fn tasks(&self) -> u64 {
        self.arrivals.iter().map(|arrival| u64::from(arrival.tasks)).sum()
    }

    /// Until the last task would have ended, had none waited.
    #[must_use]
    pub fn span(&self) -> Millis {
        self.arrivals.iter().map(|arrival| arrival.at + arrival.run).max().unwrap_or_default()
    }

    /// Cuts tasks that are larger than a host down to it; returns how many were. A trace's machine was another one.
    pub fn fit(&mut self, host: &Resources) -> u64 {
        let cpu = u32::try_from(host.cpu_milli).unwrap_or(u32::MAX);
        let memory = u32::try_from(host.memory_bytes >> 20).unwrap_or(u32::MAX);
        let mut cut = 0;
        for arrival in &mut self.arrivals {
            if arrival.cpu_milli > cpu || arrival.memory_mib > memory {
                arrival.cpu_milli = arrival.cpu_milli.min(cpu);
                arrival.memory_mib = arrival.memory_mib.min(memory);
                cut += u64::from(arrival.tasks);
            }
        }
        cut
    }
}
