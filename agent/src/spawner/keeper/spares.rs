//! Sandboxes that wait for a job: those made ahead, as many as were missed lately of
//! the shapes that are asked, and those that a job has left as new.
//!
//! What one owner's jobs were in is never another's, and nothing is ever cleaned: a
//! sandbox with any trace of its job is gone with it. At most its network namespace,
//! if no socket is in it, or its empty folder on a disk with its uid is used again,
//! by the same owner: making them costs more than all the rest.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    rc::Rc,
};

use super::{Keeper, ending::Rubbish};
use crate::{
    sandbox::{
        fences::{Fence, Fences, map_job_uid},
        status::{self, Status},
        sys,
    },
    spawner::{
        policy::Policy,
        protocol::{AttemptKey, Limits, Network, Profile, Start},
        sandbox::{Owner, Sandbox, Shape},
    },
};

/// A shape that nobody asked for this long is not kept ready any more, but for the last one.
const UNUSED_US: u64 = 60_000_000;
/// Of a shape that is asked at all: one to take, and one while the next is made.
const READY_MIN: usize = 2;
/// A shape that nobody asked for this long makes room for one that is asked for.
const SHAPE_UNUSED_US: u64 = 5_000_000;
/// What was left for an owner's next job and did not serve for this long is not expected to serve soon.
const OWNER_UNUSED_US: u64 = 5_000_000;
/// How often that is looked at.
const TIDY_US: u64 = 1_000_000;
/// Sandboxes that were left as new and are kept for their owners: as many as run at once on a large host.
const KEPT_MAX: usize = 128;
/// Network namespaces, and folders, kept for one owner.
const SHELF_MAX: usize = 32;

/// The sandboxes that wait, and what they are kept for.
pub struct Spares {
    /// At most so many wait that served nobody yet; 0: none waits at all.
    count_max: usize,
    by_token: BTreeMap<u64, Spare>,
    demand: BTreeMap<Shape, Demand>,
    shelves: BTreeMap<Owner, Shelf>,
    /// To be made, one a turn of the loop.
    wanted: Vec<(Shape, Owner)>,
    tidy_at_us: Option<u64>,
}

struct Spare {
    sandbox: Sandbox,
    state: State,
    /// Whose jobs were in it, or in its network namespace or folder; none: nobody's.
    owner: Option<Owner>,
    /// Since when it waits, in microseconds of CLOCK_BOOTTIME.
    since_us: u64,
}

impl Spare {
    /// It waits, or will; those of other owners are none for this one.
    fn may_serve(&self, owner: &Owner) -> bool {
        self.state.waits() && self.owner.as_ref().is_none_or(|of| of == owner)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Making,
    Ready,
    /// Of no use any more, and not killed yet: its end takes time that a job may need.
    Useless,
    /// Killed, to be reaped.
    Ending,
}

impl State {
    const fn waits(self) -> bool {
        match self {
            Self::Making | Self::Ready => true,
            Self::Useless | Self::Ending => false,
        }
    }
}

struct Demand {
    /// So many should wait.
    ready: usize,
    used_us: u64,
    limits: Limits,
}

/// What an owner's jobs have left that is as good as new for the next.
struct Shelf {
    networks: Vec<Rc<OwnedFd>>,
    folders: Vec<Folder>,
    used_us: u64,
}

/// An empty working folder on a disk, and the uid that it belongs to.
pub struct Folder {
    pub uid: u32,
    pub path: PathBuf,
}

/// What only the spawner can do once an init has assembled its sandbox.
///
/// # Errors
/// The kernel does not let us map its uids.
pub fn ready(
    fences: &Fences,
    rootless: bool,
    sandbox: &mut Sandbox,
    network_joined: bool,
    beside: Vec<OwnedFd>,
) -> io::Result<()> {
    let mut beside = beside.into_iter();
    sandbox.folder = beside.next();
    if !network_joined {
        sandbox.network = beside.next().map(Rc::new);
    }
    match sandbox.identity {
        Some(uid) if fences.raised(sandbox.shape.fences).has(Fence::NsUser) && !rootless => {
            map_job_uid(sandbox.pid.cast_signed(), uid)
        }
        Some(_) | None => Ok(()),
    }
}

impl Spares {
    pub const fn new(policy: &Policy) -> Self {
        Self {
            count_max: policy.prepared_max,
            by_token: BTreeMap::new(),
            demand: BTreeMap::new(),
            shelves: BTreeMap::new(),
            wanted: Vec::new(),
            tidy_at_us: None,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.by_token.is_empty()
    }

    pub const fn wants_one(&self) -> bool {
        !self.wanted.is_empty()
    }

    /// One is wanted, and none of its kind is there or on its way.
    pub fn is_short(&self) -> bool {
        let Some((shape, owner)) = self.wanted.last() else { return false };
        !self.by_token.values().any(|spare| spare.may_serve(owner) && spare.sandbox.shape == *shape)
    }

    /// Those of no use that still live.
    pub fn useless(&self) -> usize {
        self.by_token.values().filter(|spare| spare.state == State::Useless).count()
    }

    /// Ends them.
    pub fn end_useless(&mut self) {
        self.by_token.values_mut().filter(|spare| spare.state == State::Useless).for_each(end_spare);
    }

    pub const fn due_us(&self) -> Option<u64> {
        self.tidy_at_us
    }

    fn shelf(&mut self, owner: &Owner) -> &mut Shelf {
        let used_us = sys::boottime_us();
        self.tidy_at_us = self.tidy_at_us.or(Some(used_us + TIDY_US));
        let empty = || Shelf { networks: Vec::new(), folders: Vec::new(), used_us };
        let shelf = self.shelves.entry(owner.clone()).or_insert_with(empty);
        shelf.used_us = used_us;
        shelf
    }

    /// A job is over, and this is its network namespace.
    pub fn shelve_network(&mut self, owner: &Owner, network: Rc<OwnedFd>) {
        if !owner.is_known() {
            return;
        }
        let shelf = self.shelf(owner);
        if shelf.networks.len() < SHELF_MAX {
            shelf.networks.push(network);
        }
    }

    /// A job is forgotten, and this is its empty folder. Returns it if it is not kept.
    pub fn shelve_folder(&mut self, owner: &Owner, folder: Folder) -> Option<Folder> {
        if !owner.is_known() {
            return Some(folder);
        }
        let shelf = self.shelf(owner);
        if shelf.folders.len() >= SHELF_MAX {
            return Some(folder);
        }
        shelf.folders.push(folder);
        None
    }

    /// An empty network namespace that an earlier job of this owner has left.
    pub fn network_for(&mut self, owner: &Owner) -> Option<Rc<OwnedFd>> {
        self.shelves.get_mut(owner)?.networks.pop()
    }

    /// An empty folder that an earlier job of this owner has left.
    pub fn folder_for(&mut self, owner: &Owner) -> Option<Folder> {
        self.shelves.get_mut(owner)?.folders.pop()
    }

    /// Room for one more that was left as new: if need be, that of the one that has waited longest, also if it is the
    /// same owner's: an owner who asks for ever new shapes has many that no job will ask for again.
    fn has_room(&mut self) -> bool {
        if self.count_max == 0 {
            return false;
        }
        let kept = || self.by_token.iter().filter(|(_, spare)| spare.state.waits() && spare.owner.is_some());
        if kept().count() >= KEPT_MAX {
            self.make_useless(kept().map(|(token, spare)| (spare.since_us, *token)).min());
        }
        true
    }

    /// One of a shape that was not asked for lately makes room for one of a shape that is.
    fn has_room_ahead(&mut self, now: u64) -> bool {
        let ahead = || self.by_token.iter().filter(|(_, spare)| spare.state.waits() && spare.owner.is_none());
        if ahead().count() + self.wanted.len() < self.count_max {
            return true;
        }
        let used_us = |shape: &Shape| self.demand.get(shape).map_or(0, |demand| demand.used_us);
        let oldest = ahead().map(|(token, spare)| (used_us(&spare.sandbox.shape), *token)).min();
        let unused = oldest.filter(|(used_us, _)| used_us + SHAPE_UNUSED_US < now);
        self.make_useless(unused);
        unused.is_some()
    }

    fn make_useless(&mut self, found: Option<(u64, u64)>) {
        if let Some(spare) = found.and_then(|(_, token)| self.by_token.get_mut(&token)) {
            spare.state = State::Useless;
        }
    }

    /// Takes one that is ready, and asks for the next.
    fn take(&mut self, shape: Shape, owner: &Owner, limits: Limits) -> Option<Sandbox> {
        let now = sys::boottime_us();
        let fits = |spare: &Spare, of: Option<&Owner>| {
            spare.state == State::Ready && spare.sandbox.shape == shape && spare.owner.as_ref() == of
        };
        // The one that was used last is the warmest, and those that are too many grow old.
        let find = |of| {
            let fitting = self.by_token.iter().filter(|(_, spare)| fits(spare, of));
            fitting.max_by_key(|(_, spare)| spare.since_us).map(|(token, _)| *token)
        };
        let found = find(Some(owner)).or_else(|| find(None));
        let demand = self.demand.entry(shape).or_insert(Demand { ready: READY_MIN, used_us: now, limits });
        (demand.used_us, demand.limits) = (now, limits);
        if found.is_none() {
            demand.ready = (demand.ready + 1).min(self.count_max);
        }
        let ready = demand.ready;
        let sandbox = found.and_then(|token| self.by_token.remove(&token)).map(|spare| spare.sandbox);
        self.want(shape, owner, ready);
        self.tidy_at_us = self.tidy_at_us.or(Some(now + TIDY_US));
        sandbox
    }

    fn want(&mut self, shape: Shape, owner: &Owner, ready: usize) {
        let alike =
            self.by_token.values().filter(|spare| spare.may_serve(owner) && spare.sandbox.shape == shape).count();
        let coming = self.wanted.iter().filter(|(of, _)| *of == shape).count();
        if alike + coming < ready && self.has_room_ahead(sys::boottime_us()) {
            self.wanted.push((shape, owner.clone()));
        }
    }
}

impl Keeper {
    /// Before the first job: what most jobs will ask for.
    pub(super) fn expect_the_usual(&mut self) {
        let start = Start {
            attempt: AttemptKey { job: 0, task: 0, number: 1, term: 0 },
            note: Vec::new(),
            owner: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
            working_folder: Vec::new(),
            profile: Profile::Strict,
            without: Vec::new(),
            network: Network::None,
            limits: Limits {
                cpu_milli: muster_core::limits::CPU_REQUEST_MILLI,
                memory_bytes: muster_core::limits::MEMORY_REQUEST_BYTES,
                disk_bytes: muster_core::limits::DISK_REQUEST_BYTES,
                pids: muster_core::limits::PIDS_LIMIT,
            },
            time_limit_ms: 0,
            grace_ms: 0,
            exclusive: false,
            stdin: None,
            inputs: Vec::new(),
        };
        let shape = self.shape_of(&start);
        if self.spares.count_max > 0 {
            let demand = Demand { ready: READY_MIN, used_us: sys::boottime_us(), limits: start.limits };
            self.spares.demand.insert(shape, demand);
            self.spares.want(shape, &Owner::of(&start), 1);
            self.spares.want(shape, &Owner::of(&start), READY_MIN);
        }
    }

    pub(super) fn take_spare(&mut self, owner: &Owner, shape: Shape, limits: Limits) -> Option<Sandbox> {
        if self.spares.count_max == 0 {
            return None;
        }
        self.spares.take(shape, owner, limits)
    }

    /// Makes one of those that are wanted: one a turn, so that no job waits for more.
    pub(super) fn prepare_one(&mut self) {
        let Some((shape, owner)) = self.spares.wanted.pop() else { return };
        // The uids are for jobs first.
        if self.stopping || (self.spares.by_token.len() + 1) * 4 > self.uids.count() {
            return;
        }
        let Some(demand) = self.spares.demand.get(&shape) else { return };
        let limits = demand.limits;
        let (network, folder) = self.left_by(shape, &owner);
        let of = (network.is_some() || folder.is_some()).then_some(owner);
        match self.make(shape, network, folder, &limits) {
            Ok(sandbox) => {
                let spare = Spare { sandbox, state: State::Making, owner: of, since_us: sys::boottime_us() };
                self.spares.by_token.insert(spare.sandbox.token, spare);
            }
            Err(error) => {
                // The next start tries for itself, and tells its reason.
                tracing::warn!(%error, "no sandbox can be made ahead");
                self.spares.demand.remove(&shape);
            }
        }
    }

    /// What an earlier job of the owner has left, as far as a sandbox of this shape can use it.
    pub(super) fn left_by(&mut self, shape: Shape, owner: &Owner) -> (Option<Rc<OwnedFd>>, Option<Folder>) {
        let network = shape.fences.has(Fence::NsNet).then(|| self.spares.network_for(owner)).flatten();
        let on_disk = !self.fences.raised(shape.fences).has(Fence::RootReadonly);
        (network, on_disk.then(|| self.spares.folder_for(owner)).flatten())
    }

    /// Something happened to a sandbox that waits.
    pub(super) fn look_at_spare(&mut self, token: u64) {
        let Some(spare) = self.spares.by_token.get_mut(&token) else { return };
        while let status::Received::Status(status, beside) = status::receive(spare.sandbox.control.as_fd()) {
            match status {
                Status::Parked { network_joined, assemble_us } => {
                    spare.sandbox.made.assemble_us = assemble_us;
                    if !network_joined && spare.sandbox.folder_on_disk.is_none() {
                        spare.owner = None;
                    }
                    match ready(&self.fences, self.rootless, &mut spare.sandbox, network_joined, beside) {
                        Ok(()) if spare.state == State::Making => spare.state = State::Ready,
                        Ok(()) => {}
                        Err(error) => {
                            tracing::warn!(%error, "a sandbox made ahead cannot be used");
                            end_spare(spare);
                        }
                    }
                }
                Status::Failed(failure) => {
                    tracing::warn!(%failure, "a sandbox could not be made ahead");
                    self.spares.demand.remove(&spare.sandbox.shape);
                }
                Status::Started { .. }
                | Status::Ended { .. }
                | Status::LeaseEnded { .. }
                | Status::TimeLimitEnded { .. } => {}
            }
        }
        if let Ok(Some(_)) = sys::wait_pidfd(spare.sandbox.pidfd.as_fd(), true)
            && let Some(spare) = self.spares.by_token.remove(&token)
        {
            self.discard(spare.sandbox);
        }
    }

    /// Of a sandbox whose init is reaped and that no attempt has.
    pub(super) fn discard(&mut self, sandbox: Sandbox) {
        self.unwatch(sandbox.control.as_fd());
        self.unwatch(sandbox.pidfd.as_fd());
        if let Some(uid) = sandbox.identity {
            self.uids.give_back(uid);
        }
        self.remove_folder(sandbox.folder_on_disk.as_deref());
        self.rubbish.push(Rubbish::of(sandbox));
    }

    /// Of an attempt that is over, with nothing in it but its init: kept for the owner's next job if it is as new, else
    /// let go.
    pub(super) fn take_back(&mut self, sandbox: Sandbox, owner: Owner, as_new: bool) {
        let is_usable = as_new && owner.is_known() && !self.stopping && !self.upgrading;
        let is_kept = is_usable && self.spares.has_room();
        if is_kept {
            self.spares.shelf(&owner);
        }
        let mut spare = Spare { sandbox, state: State::Ready, owner: None, since_us: sys::boottime_us() };
        if !is_kept {
            if let Some(network) = spare.sandbox.network.take() {
                self.spares.shelve_network(&owner, network);
            }
            spare.state = State::Useless;
        }
        spare.owner = Some(owner);
        self.spares.by_token.insert(spare.sandbox.token, spare);
    }

    /// Lets go of what nobody has asked for lately.
    pub(super) fn tidy_spares(&mut self, now: u64) {
        if self.spares.tidy_at_us.is_none_or(|at| at > now) {
            return;
        }
        let spares = &mut self.spares;
        let gone: Vec<Owner> = spares
            .shelves
            .iter()
            .filter(|(_, shelf)| shelf.used_us + OWNER_UNUSED_US < now)
            .map(|(owner, _)| owner.clone())
            .collect();
        let mut folders = Vec::new();
        for owner in &gone {
            folders.extend(spares.shelves.remove(owner).into_iter().flat_map(|shelf| shelf.folders));
        }
        // Their owner may have others that serve again and again.
        let is_left = |spare: &&mut Spare| spare.owner.is_some() && spare.since_us + OWNER_UNUSED_US < now;
        spares.by_token.values_mut().filter(is_left).for_each(end_spare);
        let last = spares.demand.values().map(|demand| demand.used_us).max();
        spares.demand.retain(|_, demand| demand.used_us + UNUSED_US > now || Some(demand.used_us) == last);
        for demand in spares.demand.values_mut().filter(|demand| demand.used_us + UNUSED_US < now) {
            demand.ready = READY_MIN;
        }
        let mut kept: BTreeMap<Shape, usize> = BTreeMap::new();
        // Those of an owner are above.
        for spare in spares.by_token.values_mut().filter(|spare| spare.owner.is_none()) {
            let count = kept.entry(spare.sandbox.shape).or_default();
            *count += 1;
            if spares.demand.get(&spare.sandbox.shape).is_none_or(|demand| *count > demand.ready) {
                end_spare(spare);
            }
        }
        // What was let go with its owner's network is made anew for whoever comes.
        let short: Vec<Shape> =
            spares.demand.keys().filter(|shape| kept.get(*shape).copied().unwrap_or(0) == 0).copied().collect();
        for shape in short {
            spares.want(shape, &Owner::unknown(), READY_MIN);
        }
        let settled = spares.shelves.is_empty()
            && spares.demand.len() <= 1
            && spares.demand.values().all(|demand| demand.ready <= READY_MIN);
        spares.tidy_at_us = (!settled).then_some(now + TIDY_US);
        self.let_go(folders);
    }

    fn let_go(&mut self, folders: Vec<Folder>) {
        for folder in folders {
            self.uids.give_back(folder.uid);
            self.remove_folder(Some(&folder.path));
        }
    }

    /// All of them at once, when the next program takes over or their uids are needed.
    pub(super) fn end_spares_now(&mut self) {
        self.end_spares();
        for spare in std::mem::take(&mut self.spares.by_token).into_values() {
            sys::end_and_reap(spare.sandbox.pidfd.as_fd());
            self.discard(spare.sandbox);
        }
        // What follows, or goes on if nothing does, begins as a new spawner does.
        self.spares.demand.clear();
    }

    pub(super) fn end_spares(&mut self) {
        self.spares.wanted.clear();
        let shelves = std::mem::take(&mut self.spares.shelves);
        self.let_go(shelves.into_values().flat_map(|shelf| shelf.folders).collect());
        self.spares.by_token.values_mut().for_each(end_spare);
    }
}

/// Nothing of a job runs in it; its end is seen when it is reaped.
fn end_spare(spare: &mut Spare) {
    spare.state = State::Ending;
    let _already_over = sys::signal_pidfd(spare.sandbox.pidfd.as_fd(), libc::SIGKILL);
}
