//! Small stories of one host, and random ones that hold its promises.

use alloc::vec::Vec;
use core::num::NonZeroU32;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{event::DrainThen, ids::JobId, ids::Term};

const MIB: u64 = 1 << 20;
const SPAWNER: SpawnerId = [1; 16];

fn attempt(task: u32, number: u32) -> AttemptId {
    AttemptId { job: JobId(1024), task, number: NonZeroU32::new(number).unwrap() }
}

fn epoch(number: u32) -> Epoch {
    Epoch { term: Term(1), attempt: NonZeroU32::new(number).unwrap() }
}

fn order(task: u32) -> StartOrder {
    let request = Resources { cpu_milli: 1_000, memory_bytes: MIB, disk_bytes: 0 };
    StartOrder { attempt: attempt(task, 1), epoch: epoch(1), request, exclusive: false }
}

fn stop(task: u32, reason: StopReason) -> HostEvent {
    HostEvent::StopOrdered(StopOrder {
        attempt: attempt(task, 1),
        epoch: epoch(1),
        reason,
        grace: Millis(5),
        first: None,
    })
}

fn ended(task: u32, verdict: Verdict) -> HostEvent {
    HostEvent::Ended { attempt: attempt(task, 1), verdict }
}

fn sealed(task: u32) -> HostEvent {
    HostEvent::Sealed { attempt: attempt(task, 1), output_lost: false }
}

fn report(task: u32, end: End) -> HostEffect {
    HostEffect::ReportEnded { attempt: attempt(task, 1), epoch: epoch(1), end }
}

fn start(task: u32) -> HostEffect {
    HostEffect::Start { attempt: attempt(task, 1) }
}

/// A connected host of two cores with its spawner.
struct World {
    host: Host,
    now: Boottime,
}

impl World {
    fn new() -> Self {
        let capacity = Resources { cpu_milli: 2_000, memory_bytes: 64 * MIB, disk_bytes: 0 };
        let mut world = Self { host: Host::new(capacity, None), now: Boottime(1_000) };
        assert_eq!(world.tell(HostEvent::SpawnerListed { spawner: SPAWNER, held: Vec::new() }), []);
        assert_eq!(world.connect(&[]), []);
        world
    }

    fn tell(&mut self, event: HostEvent) -> Vec<HostEffect> {
        self.now.0 += 1;
        self.host.apply(event, self.now)
    }

    fn connect(&mut self, unknown: &[AttemptId]) -> Vec<HostEffect> {
        self.tell(HostEvent::Connected { term: Term(1), unknown: unknown.to_vec() })
    }

    fn order(&mut self, task: u32) -> Vec<HostEffect> {
        self.tell(HostEvent::StartOrdered(order(task)))
    }

    fn end(&mut self, task: u32, end: End) -> Vec<HostEffect> {
        let mut effects = self.tell(ended(task, Verdict::Own(end)));
        effects.extend(self.tell(sealed(task)));
        effects
    }

    fn store(&mut self, task: u32) -> Vec<HostEffect> {
        self.tell(HostEvent::EndsStored { attempts: [attempt(task, 1)].into() })
    }
}

#[test]
fn starts_wait_for_capacity_in_order_of_arrival() {
    let mut world = World::new();
    assert_eq!(world.order(0), [start(0)]);
    assert_eq!(world.order(1), [start(1)]);
    assert_eq!(world.order(2), []);
    assert_eq!(world.order(3), []);
    assert_eq!(
        world.tell(ended(0, Verdict::Own(End::Succeeded))),
        [HostEffect::Seal { attempt: attempt(0, 1) }, start(2)]
    );
}

#[test]
fn a_recall_gives_back_the_newest_that_have_not_started() {
    let mut world = World::new();
    for task in 0..5 {
        let _ = world.order(task);
    }
    let given = HostEffect::GiveBack { attempts: [attempt(4, 1), attempt(3, 1)].into() };
    assert_eq!(world.tell(HostEvent::RecallOrdered { count: 2 }), [given]);
    let given = HostEffect::GiveBack { attempts: [attempt(2, 1)].into() };
    assert_eq!(world.tell(HostEvent::RecallOrdered { count: 9 }), [given]);
}

#[test]
fn a_second_order_of_the_same_attempt_starts_nothing() {
    let mut world = World::new();
    let _ = world.order(0);
    let ignored = HostEffect::Ignore { attempt: attempt(0, 1), reason: "it is held here already" };
    assert_eq!(world.order(0), [ignored]);
}

#[test]
fn an_order_with_an_older_epoch_is_given_back_and_a_newer_one_waits_for_the_older_to_end() {
    let mut world = World::new();
    let newer = StartOrder { attempt: attempt(0, 2), epoch: epoch(2), ..order(0) };
    assert_eq!(world.tell(HostEvent::StartOrdered(newer)), [HostEffect::Start { attempt: attempt(0, 2) }]);
    assert!(matches!(world.order(0)[..], [HostEffect::Ignore { .. }, HostEffect::GiveBack { .. }]));
    let newest = StartOrder { attempt: attempt(0, 3), epoch: epoch(3), ..order(0) };
    assert_eq!(world.tell(HostEvent::StartOrdered(newest)), []);
    let end = HostEvent::Ended { attempt: attempt(0, 2), verdict: Verdict::Own(End::Succeeded) };
    assert!(world.tell(end).contains(&HostEffect::Start { attempt: attempt(0, 3) }));
}

#[test]
fn what_the_hosts_own_stop_ends_is_drained_if_the_coordinator_was_told_and_lost_if_not() {
    let mut world = World::new();
    for (task, verdict, end) in [(0, Verdict::Left, End::Drained), (1, Verdict::Stopped, End::SpawnerLost)] {
        let _ = world.order(task);
        let _ = world.tell(ended(task, verdict));
        assert_eq!(world.tell(sealed(task)), [report(task, end)]);
    }
}

/// A store that lost writes has given its number out again.
#[test]
fn an_order_under_the_number_of_what_is_still_owed_is_given_back() {
    let mut world = World::new();
    let _ = world.order(0);
    assert_eq!(world.end(0, End::Succeeded)[1..], [report(0, End::Succeeded)]);
    let other = StartOrder { epoch: epoch(7), ..order(0) };
    let effects = world.tell(HostEvent::StartOrdered(other));
    assert!(matches!(effects[..], [HostEffect::Ignore { .. }, HostEffect::GiveBack { .. }]), "{effects:?}");
    assert!(matches!(world.order(0)[..], [HostEffect::Ignore { .. }]), "the same order came twice");
}

#[test]
fn a_stop_gives_its_reason_to_the_end_unless_the_job_ended_by_itself() {
    let mut world = World::new();
    for (task, reason, verdict, end) in [
        (0, StopReason::Drained, Verdict::Stopped, End::Drained),
        (1, StopReason::Preempted, Verdict::Stopped, End::Preempted),
        (2, StopReason::Superseded, Verdict::Stopped, End::Cancelled),
        (3, StopReason::Drained, Verdict::Own(End::Exited(3)), End::Exited(3)),
        (4, StopReason::Cancelled, Verdict::LeaseEnded, End::NodeLost(NodeLoss::Silent)),
        (5, StopReason::Cancelled, Verdict::Left, End::Cancelled),
    ] {
        let _ = world.order(task);
        assert!(matches!(world.tell(stop(task, reason))[..], [HostEffect::Stop { .. }]));
        let _ = world.tell(ended(task, verdict));
        assert_eq!(world.tell(sealed(task)), [report(task, end)]);
    }
}

#[test]
fn an_end_is_reported_on_each_stream_until_it_is_stored() {
    let mut world = World::new();
    let _ = world.order(0);
    assert_eq!(world.end(0, End::Succeeded)[1..], [report(0, End::Succeeded)]);
    let _ = world.tell(HostEvent::Disconnected);
    assert_eq!(world.connect(&[]), [report(0, End::Succeeded)]);
    assert_eq!(world.store(0), [HostEffect::Forget { attempt: attempt(0, 1) }]);
    let _ = world.tell(HostEvent::Disconnected);
    assert_eq!(world.connect(&[]), []);
}

#[test]
fn the_lease_counts_from_the_sending_of_the_heartbeat_that_it_answers() {
    let mut world = World::new();
    let _ = world.tell(HostEvent::HeartbeatSent { sequence: 1 });
    let sent = world.now;
    world.now.0 += 5_000;
    let grant = |sequence| HostEvent::LeaseGranted { sequence, duration: Millis(15_000), unknown: Vec::new() };
    assert_eq!(world.tell(grant(1)), [HostEffect::RenewLease { deadline: Boottime(sent.0 + 15_000) }]);
    // A second answer to the same heartbeat, or to none of ours, grants nothing.
    assert_eq!(world.tell(grant(1)), []);
    assert_eq!(world.tell(grant(9)), []);
}

#[test]
fn exclusive_work_waits_for_a_valid_lease() {
    let mut world = World::new();
    let exclusive = HostEvent::StartOrdered(StartOrder { exclusive: true, ..order(0) });
    assert_eq!(world.tell(exclusive), []);
    let _ = world.tell(HostEvent::HeartbeatSent { sequence: 1 });
    let effects = world.tell(HostEvent::LeaseGranted { sequence: 1, duration: Millis(15_000), unknown: Vec::new() });
    assert!(matches!(effects[..], [HostEffect::RenewLease { .. }, HostEffect::Start { .. }]));
}

/// An agent may die between any two effects: what is to end must not have got another lease then (FL-3).
#[test]
fn what_is_to_end_is_told_before_the_lease_is_renewed() {
    let mut world = World::new();
    let exclusive = StartOrder { exclusive: true, ..order(0) };
    let beat = |world: &mut World, sequence, unknown| {
        let _ = world.tell(HostEvent::HeartbeatSent { sequence });
        world.tell(HostEvent::LeaseGranted { sequence, duration: Millis(15_000), unknown })
    };
    let _ = world.tell(HostEvent::StartOrdered(exclusive));
    let _ = beat(&mut world, 1, Vec::new());
    let effects = beat(&mut world, 2, Vec::from([attempt(0, 1)]));
    assert!(matches!(effects[..], [HostEffect::Stop { .. }, HostEffect::RenewLease { .. }]), "{effects:?}");
    // The connection to the spawner swallowed both.
    let _ = world.tell(HostEvent::SpawnerGone);
    let held = Vec::from([Adopted { order: exclusive, phase: AdoptedPhase::Running, stopping: None }]);
    let effects = world.tell(HostEvent::SpawnerListed { spawner: SPAWNER, held });
    assert!(matches!(effects[..], [HostEffect::Stop { .. }, HostEffect::RenewLease { .. }]), "{effects:?}");
}

/// Without it the new spawner would end each exclusive job as soon as it began, until the next heartbeat's answer.
#[test]
fn a_new_spawner_learns_the_lease_before_it_is_told_to_start_anything() {
    let mut world = World::new();
    let exclusive = HostEvent::StartOrdered(StartOrder { exclusive: true, ..order(0) });
    let _ = world.tell(HostEvent::HeartbeatSent { sequence: 1 });
    let deadline = Boottime(world.now.0 + 15_000);
    let _ = world.tell(HostEvent::LeaseGranted { sequence: 1, duration: Millis(15_000), unknown: Vec::new() });
    let _ = world.tell(HostEvent::SpawnerGone);
    assert_eq!(world.tell(exclusive), []);
    let listed = |spawner| HostEvent::SpawnerListed { spawner, held: Vec::new() };
    let effects = world.tell(listed([2; 16]));
    assert!(
        matches!(effects[..], [HostEffect::RenewLease { deadline: told }, HostEffect::Start { .. }] if told == deadline)
    );
    // One that is over is nobody's news.
    world.now = deadline;
    let over = world.tell(listed([3; 16]));
    assert!(!over.iter().any(|effect| matches!(effect, HostEffect::RenewLease { .. })));
}

#[test]
fn what_the_coordinator_does_not_know_is_ended_and_its_end_is_still_reported() {
    let mut world = World::new();
    for task in 0..3 {
        let _ = world.order(task);
    }
    let _ = world.tell(HostEvent::Disconnected);
    let effects = world.connect(&[attempt(0, 1), attempt(2, 1)]);
    assert!(matches!(effects[..], [HostEffect::Stop { grace: Millis(0), .. }, HostEffect::GiveBack { .. }]));
    let _ = world.tell(ended(0, Verdict::Stopped));
    assert_eq!(world.tell(sealed(0)), [report(0, End::Cancelled)]);
    // Never acknowledged, and still unknown after the report: forgotten.
    let _ = world.tell(HostEvent::HeartbeatSent { sequence: 1 });
    let lease = HostEvent::LeaseGranted { sequence: 1, duration: Millis(15_000), unknown: [attempt(0, 1)].into() };
    assert!(world.tell(lease).contains(&HostEffect::Forget { attempt: attempt(0, 1) }));
}

#[test]
fn a_restarted_agent_adopts_what_its_spawner_holds() {
    let capacity = Resources { cpu_milli: 2_000, memory_bytes: 64 * MIB, disk_bytes: 0 };
    let mut world = World { host: Host::new(capacity, None), now: Boottime(0) };
    let adopted = |task, phase, stopping| Adopted { order: order(task), phase, stopping };
    let held = [
        adopted(0, AdoptedPhase::Running, None),
        adopted(1, AdoptedPhase::Running, Some(StopReason::Drained)),
        adopted(2, AdoptedPhase::Ended(Verdict::Stopped), Some(StopReason::Cancelled)),
    ];
    let effects = world.tell(HostEvent::SpawnerListed { spawner: SPAWNER, held: held.into() });
    assert_eq!(effects, [HostEffect::Seal { attempt: attempt(2, 1) }]);
    assert_eq!(world.host.taken().cpu_milli, 2_000);
    let phases: Vec<_> = world.host.held().map(|held| held.phase).collect();
    assert_eq!(phases, [HeldPhase::Running, HeldPhase::Stopping, HeldPhase::Ended]);
    let _ = world.connect(&[]);
    assert_eq!(world.tell(sealed(2)), [report(2, End::Cancelled)]);
    let _ = world.tell(ended(1, Verdict::Stopped));
    assert_eq!(world.tell(sealed(1)), [report(1, End::Drained)]);
}

#[test]
fn a_stop_that_was_lost_with_the_link_is_sent_again_and_one_under_way_keeps_its_time() {
    let mut world = World::new();
    let _ = world.order(0);
    let _ = world.tell(HostEvent::Started { attempt: attempt(0, 1) });
    let (grace, first) = (Millis(600_000), Some(10));
    let epoch = order(0).epoch;
    let stop = StopOrder { attempt: attempt(0, 1), epoch, reason: StopReason::Drained, grace, first };
    let sent = HostEffect::Stop { attempt: attempt(0, 1), reason: StopReason::Drained, grace, first };
    assert_eq!(world.tell(HostEvent::StopOrdered(stop)), std::slice::from_ref(&sent));
    for (phase, again) in [(AdoptedPhase::Running, Vec::from([sent])), (AdoptedPhase::Stopping, Vec::new())] {
        let _ = world.tell(HostEvent::SpawnerGone);
        let held = Vec::from([Adopted { order: order(0), phase, stopping: Some(StopReason::Drained) }]);
        let effects = world.tell(HostEvent::SpawnerListed { spawner: SPAWNER, held });
        let stops: Vec<_> = effects.into_iter().filter(|told| matches!(told, HostEffect::Stop { .. })).collect();
        assert_eq!(stops, again);
    }
}

#[test]
fn what_a_new_spawner_does_not_hold_died_with_the_old_one() {
    let mut world = World::new();
    let _ = world.order(0);
    assert_eq!(world.tell(HostEvent::SpawnerGone), []);
    assert_eq!(world.order(1), []);
    let effects = world.tell(HostEvent::SpawnerListed { spawner: [2; 16], held: Vec::new() });
    assert_eq!(effects, [HostEffect::Seal { attempt: attempt(0, 1) }, start(1)]);
    assert_eq!(world.tell(sealed(0)), [report(0, End::SpawnerLost)]);
}

#[test]
fn drained_is_proved_only_when_closed_on_disk_and_empty_by_the_spawners_word() {
    let mut world = World::new();
    let revision = Revision(7);
    for task in 0..3 {
        let _ = world.order(task);
    }
    let effects = world.tell(HostEvent::DrainAsked { revision, refusable: false });
    assert!(matches!(effects[..], [HostEffect::PersistClosure { .. }, HostEffect::GiveBack { .. }]));
    assert_eq!(world.order(5), [HostEffect::GiveBack { attempts: [attempt(5, 1)].into() }]);
    assert_eq!(world.tell(HostEvent::ClosurePersisted { revision: Some(revision) }), []);
    let _ = world.end(0, End::Succeeded);
    let _ = world.end(1, End::Succeeded);
    let _ = world.store(0);
    assert_eq!(world.store(1), [HostEffect::Forget { attempt: attempt(1, 1) }, HostEffect::ListSpawner]);
    let listed = |held| HostEvent::SpawnerListed { spawner: SPAWNER, held };
    assert_eq!(world.tell(listed(Vec::new())), [HostEffect::ProveDrained { revision }]);
    // Asked again: proved again, from a fresh list.
    assert_eq!(world.tell(HostEvent::DrainAsked { revision, refusable: false }), [HostEffect::ListSpawner]);
    assert_eq!(world.tell(listed(Vec::new())), [HostEffect::ProveDrained { revision }]);
    // Reopened while the spawner makes its list: what starts now could not be on it, and would count as lost.
    assert_eq!(world.tell(HostEvent::DrainAsked { revision, refusable: false }), [HostEffect::ListSpawner]);
    let _ = world.tell(HostEvent::ReopenOrdered { revision });
    let _ = world.tell(HostEvent::ClosurePersisted { revision: None });
    assert_eq!(world.order(6), []);
    assert_eq!(world.tell(listed(Vec::new())), [start(6)]);
    let _ = world.end(6, End::Succeeded);
    let _ = world.store(6);
    let _ = world.tell(HostEvent::DrainAsked { revision, refusable: false });
    let _ = world.tell(HostEvent::ClosurePersisted { revision: Some(revision) });
    assert_eq!(world.tell(listed(Vec::new())), [HostEffect::ProveDrained { revision }]);
    let release = HostEvent::ReleaseOrdered { revision, then: DrainThen::Stop };
    assert_eq!(world.tell(release), [HostEffect::Release { then: DrainThen::Stop }]);
}

#[test]
fn a_host_whose_opening_is_still_being_written_is_not_closed() {
    let mut world = World::new();
    let revision = Revision(7);
    let ask = HostEvent::DrainAsked { revision, refusable: false };
    let _ = world.tell(ask.clone());
    let _ = world.tell(HostEvent::ClosurePersisted { revision: Some(revision) });
    let _ = world.tell(HostEvent::SpawnerListed { spawner: SPAWNER, held: Vec::new() });
    // Opened, and asked again by a coordinator that has lost that it opened it.
    let _ = world.tell(HostEvent::ReopenOrdered { revision });
    assert_eq!(world.tell(ask), [HostEffect::PersistClosure { revision: Some(revision) }]);
    assert_eq!(world.tell(HostEvent::ClosurePersisted { revision: None }), []);
    assert_eq!(
        world.tell(HostEvent::ClosurePersisted { revision: Some(revision) }),
        [HostEffect::ListSpawner],
        "not before the last write is there"
    );
}

#[test]
fn only_the_newest_question_is_answered_and_only_its_release_is_obeyed() {
    let mut world = World::new();
    let (older, newer) = (Revision(7), Revision(8));
    let ask = |revision| HostEvent::DrainAsked { revision, refusable: false };
    let listed = || HostEvent::SpawnerListed { spawner: SPAWNER, held: Vec::new() };
    let release = |revision| HostEvent::ReleaseOrdered { revision, then: DrainThen::Stop };
    let _ = world.tell(ask(older));
    assert_eq!(world.tell(HostEvent::ClosurePersisted { revision: Some(older) }), [HostEffect::ListSpawner]);
    // Asked anew while the list is under way: what it says is not said of a closure that is not on disk yet.
    assert_eq!(world.tell(ask(newer)), [HostEffect::PersistClosure { revision: Some(newer) }]);
    assert_eq!(world.tell(listed()), []);
    assert_eq!(world.tell(release(newer)), [], "it is not closed for that on disk");
    let proved = [HostEffect::ProveDrained { revision: newer }];
    assert_eq!(world.tell(HostEvent::ClosurePersisted { revision: Some(newer) }), proved);
    assert_eq!(world.tell(ask(older)), []);
    assert_eq!(world.tell(release(older)), [], "it is out of date");
    assert_eq!(world.tell(release(newer)), [HostEffect::Release { then: DrainThen::Stop }]);
}

#[test]
fn a_scale_in_drain_is_refused_while_work_is_held() {
    let mut world = World::new();
    let _ = world.order(0);
    let effects = world.tell(HostEvent::DrainAsked { revision: Revision(7), refusable: true });
    assert!(matches!(effects[..], [HostEffect::RefuseDrain { revision: Revision(7), .. }]));
    assert_eq!(world.order(1), [start(1)]);
}

#[test]
fn a_hello_names_the_drain_also_while_the_closure_is_being_written() {
    let mut world = World::new();
    let _ = world.tell(HostEvent::DrainAsked { revision: Revision(7), refusable: false });
    assert_eq!(world.host.closed_for(), Some(Revision(7)), "or nobody would ever reopen it");
    let _ = world.tell(HostEvent::ReopenOrdered { revision: Revision(7) });
    assert_eq!(world.host.closed_for(), None);
}

#[test]
fn a_reopened_host_takes_work_and_an_older_reopening_opens_nothing() {
    let mut world = World::new();
    let _ = world.tell(HostEvent::DrainAsked { revision: Revision(7), refusable: true });
    assert_eq!(world.tell(HostEvent::ReopenOrdered { revision: Revision(6) }), []);
    assert!(matches!(world.order(0)[..], [HostEffect::GiveBack { .. }]));
    let effects = world.tell(HostEvent::ReopenOrdered { revision: Revision(7) });
    assert_eq!(effects, [HostEffect::PersistClosure { revision: None }]);
    assert_eq!(world.order(0), [start(0)]);
}

/// One random step of the world around a host.
#[derive(Clone, Debug)]
enum Step {
    Order(u32, u64),
    Stop(u32),
    End(u32),
    Seal(u32),
    Store(u32),
    Recall(u32),
    Reconnect,
    AskDrained,
    Reopen,
    List,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..12, 1u64..4).prop_map(|(task, cores)| Step::Order(task, cores)),
        1 => (0u32..12).prop_map(Step::Stop),
        3 => (0u32..12).prop_map(Step::End),
        3 => (0u32..12).prop_map(Step::Seal),
        3 => (0u32..12).prop_map(Step::Store),
        1 => (0u32..4).prop_map(Step::Recall),
        1 => Just(Step::Reconnect),
        1 => Just(Step::AskDrained),
        1 => Just(Step::Reopen),
        1 => Just(Step::List),
    ];
    prop::collection::vec(step, 0..120)
}

/// What the spawner and the coordinator around the host know.
#[derive(Default)]
struct Around {
    running: BTreeMap<AttemptId, Resources>,
    ordered: BTreeMap<AttemptId, StartOrder>,
    started: BTreeSet<AttemptId>,
    given_back: BTreeSet<AttemptId>,
    reported: BTreeMap<AttemptId, End>,
}

impl Around {
    /// Carries out effects; checks what each must never do.
    fn carry_out(&mut self, world: &mut World, effects: Vec<HostEffect>) {
        for effect in effects {
            match effect {
                HostEffect::Start { attempt } => {
                    assert!(self.started.insert(attempt), "started twice: {attempt}");
                    assert!(!self.given_back.contains(&attempt), "started after it was given back: {attempt}");
                    self.running.insert(attempt, self.ordered[&attempt].request);
                    let taken = self.running.values().fold(Resources::default(), |sum, one| sum.plus(one));
                    assert!(taken.fits_in(&world.host.capacity), "beyond capacity");
                }
                HostEffect::GiveBack { attempts } => {
                    for attempt in attempts {
                        assert!(!self.started.contains(&attempt), "given back after its start: {attempt}");
                        self.given_back.insert(attempt);
                    }
                }
                HostEffect::ReportEnded { attempt, end, .. } => {
                    assert!(!self.running.contains_key(&attempt), "reported while it runs: {attempt}");
                    let before = self.reported.insert(attempt, end.clone());
                    assert!(before.is_none_or(|before| before == end), "an end changed: {attempt}");
                }
                HostEffect::ProveDrained { .. } => {
                    assert!(self.running.is_empty() && world.host.is_empty(), "proved while something is held");
                    assert!(world.host.closed_for().is_some(), "proved while open");
                }
                HostEffect::PersistClosure { revision } => {
                    let effects = world.tell(HostEvent::ClosurePersisted { revision });
                    self.carry_out(world, effects);
                }
                HostEffect::ListSpawner => {
                    let event = self.list();
                    let effects = world.tell(event);
                    self.carry_out(world, effects);
                }
                HostEffect::Stop { .. }
                | HostEffect::Seal { .. }
                | HostEffect::ReportStarted { .. }
                | HostEffect::Forget { .. }
                | HostEffect::RenewLease { .. }
                | HostEffect::RefuseDrain { .. }
                | HostEffect::Release { .. }
                | HostEffect::Ignore { .. } => {}
            }
        }
    }

    fn list(&self) -> HostEvent {
        let held = self.running.keys().map(|attempt| Adopted {
            order: self.ordered[attempt],
            phase: AdoptedPhase::Running,
            stopping: None,
        });
        HostEvent::SpawnerListed { spawner: SPAWNER, held: held.collect() }
    }
}

proptest! {
    #[test]
    fn whatever_happens_nothing_starts_twice_or_beyond_capacity_and_drained_is_true(steps in steps()) {
        let mut world = World::new();
        let mut around = Around::default();
        let mut revision = Revision(0);
        for step in steps {
            let event = match step {
                Step::Order(task, cores) => {
                    let request = Resources { cpu_milli: cores * 500, memory_bytes: MIB, disk_bytes: 0 };
                    let order = StartOrder { request, ..order(task) };
                    // The coordinator never orders an attempt again that was started or given back.
                    let known = around.started.contains(&order.attempt) || around.given_back.contains(&order.attempt);
                    if known || around.ordered.contains_key(&order.attempt) {
                        continue;
                    }
                    around.ordered.insert(order.attempt, order);
                    HostEvent::StartOrdered(order)
                }
                Step::Stop(task) => stop(task, StopReason::Cancelled),
                Step::End(task) if around.running.remove(&attempt(task, 1)).is_some() => {
                    ended(task, Verdict::Own(End::Succeeded))
                }
                Step::End(_) => continue,
                Step::Seal(task) => sealed(task),
                Step::Store(task) => HostEvent::EndsStored { attempts: [attempt(task, 1)].into() },
                Step::Recall(count) => HostEvent::RecallOrdered { count },
                Step::Reconnect => {
                    let effects = world.tell(HostEvent::Disconnected);
                    around.carry_out(&mut world, effects);
                    HostEvent::Connected { term: Term(1), unknown: Vec::new() }
                }
                Step::AskDrained => {
                    revision = revision.next();
                    HostEvent::DrainAsked { revision, refusable: false }
                }
                Step::Reopen => HostEvent::ReopenOrdered { revision },
                Step::List => around.list(),
            };
            let effects = world.tell(event);
            around.carry_out(&mut world, effects);
            let taken = around.running.values().fold(Resources::default(), |sum, one| sum.plus(one));
            prop_assert_eq!(world.host.taken(), taken);
            prop_assert!(world.host.running().eq(around.running.keys().copied()));
        }
    }
}
