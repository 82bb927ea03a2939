//! The pools' providers: make, end and wake machines, and fail at all of it.

use std::collections::BTreeMap;

use muster_core::{
    event::Event,
    ids::{HostRequestId, NodeId, PoolName},
    resources::Resources,
    time::{Millis, Timestamp},
};

use crate::{agenda::Action, host::SimHost, setup::Fault, world::World};

/// What the provider knows of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Making,
    Made(usize),
    Ended,
}

#[derive(Debug, Default)]
pub struct Provider {
    machines: BTreeMap<HostRequestId, Machine>,
    /// It ends nothing before then, and does not say so.
    silent_until: Timestamp,
}

impl World {
    /// Idempotent by the request.
    pub(crate) fn create_host(&mut self, pool: PoolName, host: HostRequestId) {
        if self.provider.machines.contains_key(&host) {
            return;
        }
        if self.occurs(Fault::ProviderSilent, 60) {
            return;
        }
        self.provider.machines.insert(host, Machine::Making);
        let lies = self.occurs(Fault::CreateLies, 30);
        if lies || self.occurs(Fault::CreateFails, 100) {
            if lies {
                self.after(1_000, 40_000, Action::HostMade { pool: pool.clone(), host });
            } else {
                self.provider.machines.insert(host, Machine::Ended);
            }
            let event = Box::new(Event::HostFailed { pool, host, reason: "no machine left".into() });
            self.after(500, 10_000, Action::ProviderTells { event });
            return;
        }
        if self.occurs(Fault::NeverJoins, 80) {
            return;
        }
        let (soon, late) = if self.occurs(Fault::BootsLate, 60) { (50_000, 120_000) } else { (1_000, 40_000) };
        self.after(soon, late, Action::HostMade { pool, host });
    }

    pub(crate) fn host_made(&mut self, pool: PoolName, request: HostRequestId) {
        if self.provider.machines.get(&request) != Some(&Machine::Making) {
            return;
        }
        let at = self.hosts.len();
        let capacity = Resources { cpu_milli: 4_000, memory_bytes: 8 << 30, disk_bytes: 1 << 30 };
        let drift = self.invent_drift();
        let mut host = SimHost::new(format!("made-{}", request.0), pool, capacity, drift, 0);
        host.request = Some(request);
        self.hosts.push(host);
        self.provider.machines.insert(request, Machine::Made(at));
        self.at(self.now, Action::AgentStarts { host: at });
    }

    /// The command that wakes a host: it may hang, fail, wake nobody, or be late.
    pub(crate) fn wake_host(&mut self, pool: PoolName, host: HostRequestId, node: NodeId) {
        if self.occurs(Fault::ProviderSilent, 60) || self.occurs(Fault::NeverJoins, 80) {
            return;
        }
        if self.occurs(Fault::CreateFails, 100) {
            let event = Box::new(Event::HostFailed { pool, host, reason: "no route".into() });
            self.after(500, 10_000, Action::ProviderTells { event });
            return;
        }
        let is_it = |one: &SimHost| one.node == Some(node) && one.left && !one.is_gone && !one.is_clone;
        if let Some(sleeper) = self.hosts.iter().position(is_it) {
            let (soon, late) = if self.occurs(Fault::BootsLate, 60) { (50_000, 120_000) } else { (1_000, 40_000) };
            self.after(soon, late, Action::WantedAgain { host: sleeper });
        }
    }

    pub(crate) fn delete_host(&mut self, pool: PoolName, host: HostRequestId) {
        if self.now < self.provider.silent_until {
            return;
        }
        if self.occurs(Fault::ProviderSilent, 200) {
            // One call that is lost, or none answered for a while: longer than the fleet takes for silence.
            let span = if self.rng.chance(500) { self.rng.between(80_000, 240_000) } else { 0 };
            self.provider.silent_until = self.now + Millis(span);
            return;
        }
        if self.occurs(Fault::DeleteFails, 150) {
            let event = Box::new(Event::HostDeleteFailed { pool, host, reason: "busy".into() });
            self.after(500, 8_000, Action::ProviderTells { event });
            return;
        }
        self.after(500, 10_000, Action::HostEnds { pool, host });
    }

    /// Asked whether a host may be deleted: now and then somebody has locked it, or no answer comes.
    pub(crate) fn describe_host(&mut self, pool: PoolName, host: HostRequestId) {
        if self.now < self.provider.silent_until {
            return;
        }
        let kept = self.occurs(Fault::HostKept, 250).then(|| "it is locked".to_owned());
        let event = Box::new(Event::HostDescribed { pool, host, kept });
        let latest = if self.rng.chance(100) { 90_000 } else { 4_000 };
        self.after(10, latest, Action::ProviderTells { event });
    }

    pub(crate) fn host_ends(&mut self, pool: PoolName, request: HostRequestId) {
        let machine = self.provider.machines.insert(request, Machine::Ended);
        if let Some(Machine::Made(host)) = machine {
            self.switch_off(host);
        }
        let event = Box::new(Event::HostGone { pool, host: request });
        self.at(self.now + Millis(10), Action::ProviderTells { event });
    }

    /// The machine and all on it are no more.
    pub(crate) fn switch_off(&mut self, host: usize) {
        self.kill_agent(host);
        self.kill_spawner(host);
        self.hosts[host].is_gone = true;
    }

    /// As a spot instance that is taken: nobody is told.
    pub(crate) fn machine_dies(&mut self, request: HostRequestId) {
        if let Some(Machine::Made(host)) = self.provider.machines.get(&request).copied() {
            self.switch_off(host);
        }
    }

    /// Until a coordinator takes it.
    pub(crate) fn provider_tells(&mut self, event: Event) -> Result<(), crate::Violation> {
        match self.serving() {
            Some(member) => self.tell(member, event),
            None => {
                self.at(self.now + Millis(1_000), Action::ProviderTells { event: Box::new(event) });
                Ok(())
            }
        }
    }

    /// What takes the store takes other things along: the provider misses machines that come back to a coordinator.
    pub(crate) fn lose_sight_of_machines(&mut self) {
        for _ in 0..3 {
            if let Some((pool, host)) = self.some_machine()
                && self.occurs(Fault::ProviderLies, 700)
            {
                let event = Box::new(Event::HostGone { pool, host });
                self.after(1_000, 25_000, Action::ProviderTells { event });
            }
        }
    }

    /// A machine that lives, for a provider that says otherwise.
    pub(crate) fn some_machine(&mut self) -> Option<(PoolName, HostRequestId)> {
        let living: Vec<(PoolName, HostRequestId)> = self
            .provider
            .machines
            .iter()
            .filter_map(|(request, machine)| match machine {
                Machine::Made(host) => Some((self.hosts[*host].pool.clone(), *request)),
                Machine::Making | Machine::Ended => None,
            })
            .collect();
        self.rng.choose(&living).cloned()
    }
}
