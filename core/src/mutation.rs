//! Faults that can be built into the rules on purpose, to see that the
//! simulator notices. Without the feature `mutations`, which no shipped build
//! can have, [`is_on`] is the constant `false` and costs nothing.

#[cfg(all(feature = "mutations", not(debug_assertions)))]
compile_error!("the feature `mutations` breaks promises on purpose: it is for test builds alone");

/// A rule that can be broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A new leader evicts by what it was told before it led.
    EvictAfterFailover,
    /// The host counts its lease from the answer's receipt, not from the heartbeat's sending.
    LeaseFromReceipt,
    /// A result counts whatever epoch and node it carries.
    NoEpochOnResults,
    /// The host reports an end when it has asked for it.
    EndBeforeEmpty,
    /// A coordinator grants leases although its leadership has run out.
    GrantWithoutLeadership,
    /// What was sent ahead counts as started.
    PrefilledIsStarted,
    /// A node counts as drained when nothing is on record for it.
    DrainedInferred,
    /// A pool's maximum does not count hosts that boot.
    CapIgnoresBooting,
    /// The host takes an order for an attempt that it holds.
    StartForgotten,
    /// No fleet-wide silence stops evictions.
    BrakeOff,
    /// The coordinator's side of a lease has no margin.
    NoLeaseMargin,
    /// A reboot does not end what the node had.
    RebootIgnored,
    /// Lost nodes draw on the budget for a job's own failures.
    OneBudget,
    /// The host does not stop what it is told to stop.
    StopIgnored,
    /// A second result is acknowledged and dropped.
    EvidenceDropped,
    /// A drain's proof counts for whatever drain it names.
    AnyProof,
    /// An order to stop that a stream has lost is not sent again.
    StopsNotRepeated,
    /// The host starts what does not fit.
    HostOverfull,
    /// A hello counts that an older stream of the same agent brings late.
    LateHello,
    /// A task is tried again although it was cancelled.
    CancelForgotten,
    /// A host that fails each start goes on getting work.
    BlackHole,
    /// A task that brings down each node goes on to the next.
    Poison,
    /// Nobody says that a task's output is lost.
    OutputLossHidden,
    /// A later request for a drain puts it off.
    DrainPutOff,
    /// A rolling drain begins with all its nodes at once.
    DrainBudgetIgnored,
    /// A new leader takes an old one's word for when an exclusive attempt is surely over.
    FenceNotRenewed,
    /// The host starts a task beside an earlier try at it that is being ended.
    TriesTogether,
    /// What a host has lost without a word goes on by the record.
    HeartbeatUncompared,
    /// An order to stop that went with the connection to the spawner is not given again.
    StopLostWithLink,
    /// The host keeps what it is asked to give back.
    RecallIgnored,
    /// A later reason to stop an attempt takes the place of the first.
    StopReasonOverwritten,
    /// A host whose disk is full goes on getting work.
    DiskFullIgnored,
    /// When an operator releases the brake, all silent nodes are given up together.
    ReleasedAtOnce,
    /// A task that brings down one node again and again goes on.
    PoisonOfOneNode,
    /// A node is not cordoned any more when its agent has started anew.
    CordonClearedByRestart,
    /// Who is resumed is eligible, also if it was cordoned before its drain.
    CordonBeforeForgotten,
    /// A later request with an earlier deadline shortens no drain.
    ShorterDrainIgnored,
    /// A host may refuse a drain that a person has asked for since the scaler did.
    RefusalStays,
    /// Nobody is evicted at a drain's deadline.
    DrainEvictsNobody,
    /// The host's own stop takes over a person's drain, which then ends when the host is back.
    DrainTakenOver,
    /// A rolling drain that is cancelled resumes also who drains for somebody else.
    RollingResumesAll,
    /// A task is tried once less often than was asked for.
    TriesTooFew,
    /// Drains draw on the budget for lost nodes.
    DrainsFromNodesBudget,
    /// A cancel misses what waits for its next try.
    CancelMissesDelayed,
    /// What runs on a node is given up when its stream closes.
    GivenUpWithStream,
    /// An order that never arrived counts as lost with the host's spawner.
    NeverThereIsLost,
    /// An agent that adopts an attempt does not know why it was to stop.
    StopForgottenByAgent,
    /// An attempt goes to a host that cannot raise its fences.
    FencesUncompared,
    /// A host that speaks although its provider said it was gone does not count.
    SpeakerUncounted,
    /// Scale-in goes below the pool's minimum.
    MinimumIgnored,
    /// A provider that does not answer holds no scale-in.
    SilentProviderIgnored,
    /// A pool of which too little is heard shrinks.
    SilentPoolShrinks,
    /// A pool scales although an operator has paused it.
    PauseIgnored,
    /// A host is drained for scale-in without its provider's word.
    ProviderUnasked,
    /// A lost host is given back to its provider before a person can look at it.
    GivenBackAtOnce,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 55] = [
        Self::EvictAfterFailover,
        Self::LeaseFromReceipt,
        Self::NoEpochOnResults,
        Self::EndBeforeEmpty,
        Self::GrantWithoutLeadership,
        Self::PrefilledIsStarted,
        Self::DrainedInferred,
        Self::CapIgnoresBooting,
        Self::StartForgotten,
        Self::BrakeOff,
        Self::NoLeaseMargin,
        Self::RebootIgnored,
        Self::OneBudget,
        Self::StopIgnored,
        Self::EvidenceDropped,
        Self::AnyProof,
        Self::StopsNotRepeated,
        Self::HostOverfull,
        Self::LateHello,
        Self::CancelForgotten,
        Self::BlackHole,
        Self::Poison,
        Self::OutputLossHidden,
        Self::DrainPutOff,
        Self::DrainBudgetIgnored,
        Self::FenceNotRenewed,
        Self::TriesTogether,
        Self::HeartbeatUncompared,
        Self::StopLostWithLink,
        Self::RecallIgnored,
        Self::StopReasonOverwritten,
        Self::DiskFullIgnored,
        Self::ReleasedAtOnce,
        Self::PoisonOfOneNode,
        Self::CordonClearedByRestart,
        Self::CordonBeforeForgotten,
        Self::ShorterDrainIgnored,
        Self::RefusalStays,
        Self::DrainEvictsNobody,
        Self::DrainTakenOver,
        Self::RollingResumesAll,
        Self::TriesTooFew,
        Self::DrainsFromNodesBudget,
        Self::CancelMissesDelayed,
        Self::GivenUpWithStream,
        Self::NeverThereIsLost,
        Self::StopForgottenByAgent,
        Self::FencesUncompared,
        Self::SpeakerUncounted,
        Self::MinimumIgnored,
        Self::SilentProviderIgnored,
        Self::SilentPoolShrinks,
        Self::PauseIgnored,
        Self::ProviderUnasked,
        Self::GivenBackAtOnce,
    ];
}

/// Is this rule broken on purpose?
#[cfg(not(feature = "mutations"))]
#[must_use]
#[inline(always)]
pub const fn is_on(_rule: Mutation) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use switch::{is_on, set};

#[cfg(feature = "mutations")]
mod switch {
    use core::sync::atomic::{AtomicU64, Ordering};

    use super::Mutation;

    /// A bit a mutation, for the whole process.
    static ON: AtomicU64 = AtomicU64::new(0);

    /// Is this rule broken on purpose?
    #[must_use]
    pub fn is_on(rule: Mutation) -> bool {
        ON.load(Ordering::Relaxed) & (1 << rule as u64) != 0
    }

    /// Breaks this rule and no other; none: all hold.
    pub fn set(rule: Option<Mutation>) {
        ON.store(rule.map_or(0, |rule| 1 << rule as u64), Ordering::Relaxed);
    }
}
