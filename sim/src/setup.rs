//! What a run is made of: the fleet's size, its work, and which faults occur.

use muster_core::time::Millis;

/// The size of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Hosts that join by themselves.
    pub hosts: usize,
    /// Hosts that a provider may make beyond those.
    pub pool_max: u32,
    /// Jobs, of 1 to 6 tasks each.
    pub jobs: usize,
    /// Faults and clients act for this long; then all heals.
    pub span: Millis,
    /// Coordinators on one store, one of which leads; none: one or two, by the seed.
    pub coordinators: Option<usize>,
    /// What the jobs are.
    pub mix: Mix,
    /// Which faults occur.
    pub faults: Faults,
    /// Mean time between two faults.
    pub pause: Millis,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            hosts: 5,
            pool_max: 3,
            jobs: 200,
            span: Millis::from_secs(600),
            coordinators: None,
            mix: Mix::default(),
            faults: Faults::ALL,
            pause: Millis(3_000),
        }
    }
}

/// Parts of the jobs in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// May never start twice.
    pub at_most_once: u64,
    /// May never run twice at once.
    pub exclusive: u64,
    /// Run for up to minutes, not seconds.
    pub long: u64,
    /// Have a time limit.
    pub limited: u64,
    /// Bring down each host that they run on.
    pub poison: u64,
    /// Do not end by themselves.
    pub endless: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self { at_most_once: 200, exclusive: 250, long: 120, limited: 100, poison: 5, endless: 10 }
    }
}

macro_rules! faults {
    ($($(#[$doc:meta])* $kind:ident, $name:literal, $weight:literal;)*) => {
        /// A fault that the world can have.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Fault {
            $($(#[$doc])* $kind,)*
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// As in the counters and on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// How often it is chosen, against the others; zero: it has its own occasions.
            pub(crate) const fn weight(self) -> u64 {
                match self {
                    $(Self::$kind => $weight,)*
                }
            }
        }
    };
}

faults! {
    /// A stream breaks; what is under way is lost.
    StreamCut, "stream-cut", 80;
    /// Nothing of a host reaches the coordinator.
    CutUp, "cut-up", 20;
    /// Nothing of the coordinator reaches a host.
    CutDown, "cut-down", 20;
    /// Neither direction works.
    Partition, "partition", 25;
    /// Several hosts are cut off together.
    SwitchDies, "switch-dies", 8;
    /// Messages of a host take seconds.
    SlowNetwork, "slow-network", 30;
    /// The first message of a stream arrives when its agent has given it up.
    LateHello, "late-hello", 0;
    /// A message is lost, and its stream with it.
    MessageLost, "message-lost", 0;
    /// An order to start arrives twice.
    StartRepeated, "start-repeated", 0;
    /// An agent dies; its spawner goes on.
    AgentDies, "agent-dies", 40;
    /// An agent dies between two effects.
    AgentDiesBetween, "agent-dies-between", 0;
    /// An agent is stopped for a while.
    AgentPaused, "agent-paused", 25;
    /// A spawner dies, and its processes with it.
    SpawnerDies, "spawner-dies", 15;
    /// Both die together, with no reboot: nothing on the host remembers.
    BothDie, "both-die", 12;
    /// The connection between agent and spawner breaks, and both go on.
    LinkCut, "link-cut", 45;
    /// An agent and its spawner forget what ran, and say nothing of it.
    HostForgets, "host-forgets", 12;
    /// A host reboots.
    Reboot, "reboot", 15;
    /// A host is stopped by its own system.
    StopNotice, "stop-notice", 10;
    /// A host's disk is full: nothing starts, output is lost.
    HostDiskFull, "host-disk-full", 12;
    /// A host's disk takes seconds.
    HostDiskSlow, "host-disk-slow", 15;
    /// Each start on a host fails at once.
    BlackHole, "black-hole", 8;
    /// A killed process does not die for a while.
    Unkillable, "unkillable", 10;
    /// A copy of a host's disk starts as another machine.
    Cloned, "cloned", 8;
    /// A host reports what it does not hold.
    StrayReport, "stray-report", 20;
    /// The coordinator dies at rest.
    CoordinatorDies, "coordinator-dies", 8;
    /// It dies before a commit.
    DiesBeforeCommit, "dies-before-commit", 0;
    /// It dies after a commit, before the first effect.
    DiesAfterCommit, "dies-after-commit", 0;
    /// It dies between two effects.
    DiesBetweenEffects, "dies-between-effects", 0;
    /// It is stopped for a while.
    CoordinatorPaused, "coordinator-paused", 12;
    /// It is stopped between commit and effects.
    PausedAfterCommit, "paused-after-commit", 0;
    /// It dies when it has just removed a node by force, and the clock of whoever leads next is an hour ahead.
    TakeoverAhead, "takeover-ahead", 0;
    /// It cannot reach the store that it shares.
    StoreUnreachable, "store-unreachable", 6;
    /// Commits take up to seconds.
    StoreSlow, "store-slow", 12;
    /// Only the reserve is left on its disk.
    StoreFull, "store-full", 8;
    /// The store fails over to a copy that lacks its last commits, although they were answered.
    StoreLosesWrites, "store-loses-writes", 2;
    /// Rows of a coordinator's own store cannot be read any more, and it is repaired.
    StoreDamaged, "store-damaged", 2;
    /// Its wall clock is set.
    WallJumps, "wall-jumps", 12;
    /// The provider cannot make or wake a host.
    CreateFails, "create-fails", 0;
    /// A host that was made does not join, or one that was woken sleeps on.
    NeverJoins, "never-joins", 0;
    /// The provider cannot delete a host.
    DeleteFails, "delete-fails", 0;
    /// A host that was made joins only after its boot deadline.
    BootsLate, "boots-late", 0;
    /// The provider says that it cannot make a host, and makes it.
    CreateLies, "create-lies", 0;
    /// A host that a provider made is no more, and the provider does not say so.
    MachineDies, "machine-dies", 4;
    /// An agent of an older version, which tells less.
    OldAgent, "old-agent", 0;
    /// The provider does not delete a host that it was asked about.
    HostKept, "host-kept", 0;
    /// The provider does not answer.
    ProviderSilent, "provider-silent", 0;
    /// The provider says that a living host is gone.
    ProviderLies, "provider-lies", 6;
}

/// A set of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults(u64);

impl Faults {
    /// Nothing ever fails.
    pub const NONE: Self = Self(0);
    /// All of them.
    pub const ALL: Self = Self((1 << Fault::ALL.len()) - 1);

    /// Is this one in the set?
    #[must_use]
    pub const fn has(self, fault: Fault) -> bool {
        self.0 & (1 << fault as u8) != 0
    }

    /// With this one too.
    #[must_use]
    pub const fn with(self, fault: Fault) -> Self {
        Self(self.0 | (1 << fault as u8))
    }

    /// Without this one.
    #[must_use]
    pub const fn without(self, fault: Fault) -> Self {
        Self(self.0 & !(1 << fault as u8))
    }

    /// Those in the set.
    pub fn iter(self) -> impl Iterator<Item = Fault> {
        Fault::ALL.iter().copied().filter(move |fault| self.has(*fault))
    }
}

impl std::str::FromStr for Faults {
    type Err = String;

    /// `all`, `none`, or names with commas.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::ALL),
            "none" => return Ok(Self::NONE),
            _names => {}
        }
        text.split(',').try_fold(Self::NONE, |faults, name| {
            let known = Fault::ALL.iter().copied().find(|fault| fault.name() == name);
            known.map(|fault| faults.with(fault)).ok_or_else(|| {
                let names: Vec<&str> = Fault::ALL.iter().map(|fault| fault.name()).collect();
                format!("there is no fault `{name}`; known are: {}", names.join(", "))
            })
        })
    }
}

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::ALL => f.write_str("all"),
            Self::NONE => f.write_str("none"),
            some => f.write_str(&some.iter().map(Fault::name).collect::<Vec<_>>().join(",")),
        }
    }
}
