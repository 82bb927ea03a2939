//! Pid 1 of a sandbox: a clone of the spawner without another exec. It assembles
//! what a job sees and parks; told what to run, it starts the job, reaps, forwards
//! the order to end, watches lease and time limit, and tells how the job ended. If
//! the job left nothing at all, it parks again; else its own end takes all with it.
//!
//! The steps are those of docs/sandbox.md, in that order; each failure names its
//! step, and nothing of the job has run then. What follows here is every life of an
//! init from top to bottom: [`prepare`], [`park`], [`serve`], and `watch.rs`.

use std::{
    cell::OnceCell,
    ffi::{CStr, CString, c_int, c_void},
    io::IoSliceMut,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::fs::FileExt as _,
    },
};

use nix::{
    errno::Errno,
    sys::{
        signalfd::{SfdFlags, SigSet, SignalFd},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
    },
};

use super::{
    descendants,
    fences::{Fence, FenceSet},
    files, landlock,
    lease::LeaseView,
    mounts,
    order::{self, Order},
    seccomp::Filter,
    status::{self, Failure, Remains, Status, Step},
    sys,
    traces::{self, Places},
    watch::{self, Over, Used, Watch},
};

/// All that an init needs to make its sandbox, resolved by the spawner before the clone. The job is not known yet.
pub struct Blueprint<'a> {
    /// The fences to raise.
    pub fences: FenceSet,
    /// This init's end of the pair to the spawner.
    pub control: OwnedFd,
    /// /dev/null.
    pub null: BorrowedFd<'a>,
    /// Its uid and gid; none: the spawner's own.
    pub identity: Option<u32>,
    /// The whole host's root is not ours: everything is in a user namespace.
    pub rootless: bool,
    /// The common half of the root, ready to be copied; none: it is assembled here.
    pub template: Option<BorrowedFd<'a>>,
    /// A network namespace that an earlier task of the same job has left, to be used again if it is clean.
    pub network: Option<BorrowedFd<'a>>,
    /// Where the root is assembled, if it is here.
    pub root: &'a CStr,
    /// Of whose folders.
    pub image: &'a std::path::Path,
    /// What the host tells its jobs.
    pub told: &'a std::path::Path,
    /// Bytes of the private folders.
    pub disk_bytes: u64,
    /// The working folder of a job that keeps the host's file system.
    pub folder: &'a CStr,
    /// The page with the lease's end.
    pub lease: BorrowedFd<'a>,
    /// Allowed system calls.
    pub filter: &'a Filter,
    /// The version of Landlock that this kernel has.
    pub landlock_abi: u32,
    /// The spawner is protected from the out-of-memory killer.
    pub oom_protected: bool,
}

/// A sandbox that is ready for its job.
struct Parked {
    folder: OwnedFd,
    children: SignalFd,
    /// None: nobody could say whether a job left something.
    places: Option<Places>,
    /// The lease page, from the first job on that ends with it.
    lease: OnceCell<LeaseView>,
    /// What orders arrive in. Pages of it that no packet fills are never touched.
    packet: Vec<u8>,
    /// Of the job's process before its exec; the same is true of it.
    stack: Vec<u8>,
}

impl Parked {
    /// The lease with which the ordered job ends, if it does.
    fn lease_of(&self, order: &Order<'_>) -> Option<&LeaseView> {
        self.lease.get().filter(|_| order.exclusive)
    }
}

/// An order as it arrived: the packet that it points into, and what came beside it.
struct Arrived {
    bytes: Vec<u8>,
    /// The write ends of the job's stdout and stderr.
    pipes: [OwnedFd; order::PIPES],
    descriptors: Vec<OwnedFd>,
}

/// Runs the whole life of pid 1. Returns its exit code.
pub fn run(blueprint: &Blueprint<'_>) -> c_int {
    let control = blueprint.control.as_fd();
    match live(blueprint) {
        Ok(code) => code,
        Err(failure) => {
            let _told = status::send(control, &Status::Failed(failure), &[]);
            1
        }
    }
}

fn live(blueprint: &Blueprint<'_>) -> Result<c_int, Failure> {
    let control = blueprint.control.as_fd();
    let began_us = sys::boottime_us();
    let (mut parked, network_joined, network) = prepare(blueprint)?;
    let assemble_us = u32::try_from(sys::boottime_us() - began_us).unwrap_or(u32::MAX);
    let ready = Status::Parked { network_joined, assemble_us };
    let beside: Vec<BorrowedFd<'_>> =
        [Some(&parked.folder), network.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect();
    status::send(control, &ready, &beside).map_err(Failure::at(Step::Parent))?;
    drop(network);
    loop {
        // None: the spawner is gone, or has no use for this sandbox any more.
        let Some(arrived) = park(control, &mut parked.packet)? else { return Ok(0) };
        if serve(blueprint, &mut parked, arrived)? != Remains::Nothing {
            return Ok(0);
        }
    }
}

/// One job from its order to its end. What is left of it is told, too.
fn serve(blueprint: &Blueprint<'_>, parked: &mut Parked, arrived: Arrived) -> Result<Remains, Failure> {
    let control = blueprint.control.as_fd();
    let received_us = sys::boottime_us();
    let order = Order::decode(&arrived.bytes).ok_or(Failure::new(Step::Order, Errno::EBADMSG))?;
    if order.exclusive && parked.lease.get().is_none() {
        let view = LeaseView::new(blueprint.lease).map_err(Failure::at(Step::Lease))?;
        let _was_empty = parked.lease.set(view);
    }
    if !order.inputs.is_empty() {
        copy_inputs(blueprint, &order, &arrived.descriptors, parked.folder.as_fd())?;
    }
    let inputs_us = sys::boottime_us();
    // To copy may take longer than the lease: not one instruction of the job runs after it (FL-3).
    if parked.lease_of(&order).is_some_and(|lease| lease.deadline_us() <= inputs_us) {
        status::send(control, &Status::LeaseEnded { boottime_us: inputs_us }, &[])
            .map_err(Failure::at(Step::Parent))?;
        return Ok(Remains::Traces);
    }
    let alarm = order.exclusive.then(watch::alarm).transpose().map_err(Failure::at(Step::Lease))?;
    let job = start_job(blueprint, parked, &order, &arrived)?;
    let started_us = sys::boottime_us();
    let _told = status::send(control, &Status::Started { received_us, inputs_us, started_us }, &[]);
    let lease = parked.lease_of(&order);
    let watch = Watch::new(control, &parked.children, job, lease, alarm, &order, started_us);
    // What the job has is the job's: its pipes must end with it, its inputs be given back.
    drop(arrived);
    let over = watch::until_over(watch);
    let ends_alone = !blueprint.fences.has(Fence::NsPid);
    let Over::Job { raw_status, told, alone, used } = over else {
        if ends_alone {
            descendants::end_all();
        }
        return Ok(Remains::Processes);
    };
    let boottime_us = sys::boottime_us();
    let remains = match &parked.places {
        _ if !alone => Remains::Processes,
        Some(places) if !told && places.are_as_new() => Remains::Nothing,
        Some(_) | None => Remains::Traces,
    };
    let Used { cpu_us, memory_peak_bytes } = used;
    let ended = Status::Ended { raw_status, told, boottime_us, remains, cpu_us, memory_peak_bytes };
    let sent = status::send(control, &ended, &[]);
    if ends_alone && !alone {
        descendants::end_all();
    }
    sent.map_err(Failure::at(Step::Parent))?;
    Ok(remains)
}

/// Everything that does not depend on the job. Also: was the old network namespace taken, and which is the new?
fn prepare(blueprint: &Blueprint<'_>) -> Result<(Parked, bool, Option<OwnedFd>), Failure> {
    let fences = blueprint.fences;
    sys::block_all_signals(true);
    // The folders of the root get the modes that are written here, whatever umask the unit sets.
    // SAFETY: umask(2) takes no memory and cannot fail.
    unsafe { libc::umask(0o022) };
    if blueprint.rootless {
        wait_for_go(blueprint.control.as_fd())?;
    }
    if fences.has(Fence::Descriptors) {
        close_all_but(&kept(blueprint)).map_err(Failure::at(Step::Descriptors))?;
    }
    if blueprint.oom_protected {
        become_killable_for_memory();
    }
    if !fences.has(Fence::NsPid) {
        sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).map_err(Failure::at(Step::Parent))?;
    }
    let network_joined = enter_namespaces(blueprint)?;
    let folder = mount_what_it_sees(blueprint)?;
    let network = made_network(blueprint, network_joined)?;
    // A job of the init's own uid could change what the next inherits from the init: its limits, its priority.
    let places = fences.has(Fence::UidOwn).then(|| Places::of(fences, folder.as_fd()).ok()).flatten();
    if fences.has(Fence::Keyring) {
        // Not every kernel has keyrings; without them there is nothing to inherit.
        let _absent = sys::join_new_session_keyring();
    }
    // SAFETY: SIG_DFL is always valid. Handlers do not outlive an exec; what the spawner ignores would.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let mut mask = SigSet::empty();
    mask.add(nix::sys::signal::Signal::SIGCHLD);
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(Failure::at(Step::Descriptors))?;
    give_up_rights(blueprint)?;
    // Ends with the spawner. Set after the last change of credentials, which clears it; a spawner that is gone by now
    // has closed its end of the pair, and `park` sees that.
    sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64).map_err(Failure::at(Step::Parent))?;
    let (packet, stack) = (vec![0; order::PACKET_BYTES_MAX + 1], vec![0; LAUNCH_STACK_BYTES]);
    let parked = Parked { folder, children, places, lease: OnceCell::new(), packet, stack };
    Ok((parked, network_joined, network))
}

/// The PID namespace is there from the clone, and as an ordinary user the user namespace.
fn enter_namespaces(blueprint: &Blueprint<'_>) -> Result<bool, Failure> {
    let fences = blueprint.fences;
    // Before the template, in which there is no /proc yet.
    let joined = match blueprint.network {
        Some(network) => join_if_clean(network).map_err(Failure::at(Step::Namespaces))?,
        None => false,
    };
    if let Some(template) = blueprint.template {
        sys::enter_namespace(template, libc::CLONE_NEWNS).map_err(Failure::at(Step::MountRoot))?;
    }
    let flags = [
        (Fence::NsMount, libc::CLONE_NEWNS),
        (Fence::NsIpc, libc::CLONE_NEWIPC),
        (Fence::NsUts, libc::CLONE_NEWUTS),
        // Not before the birth in the job's cgroup, so that this is its root.
        (Fence::NsCgroup, libc::CLONE_NEWCGROUP),
        (Fence::NsNet, if joined { 0 } else { libc::CLONE_NEWNET }),
    ];
    let flags = flags.iter().filter(|(fence, _)| fences.has(*fence)).fold(0, |flags, (_, flag)| flags | flag);
    sys::unshare(flags).map_err(Failure::at(Step::Namespaces))?;
    if fences.has(Fence::NsNet) && !joined {
        sys::raise_loopback().map_err(Failure::at(Step::Loopback))?;
    }
    if fences.has(Fence::NsUts) {
        sys::set_hostname(c"muster").map_err(Failure::at(Step::Hostname))?;
    }
    Ok(joined)
}

/// A socket that outlives its process (TIME_WAIT) would take a port from the next task: then a new namespace is made.
fn join_if_clean(network: BorrowedFd<'_>) -> Result<bool, Errno> {
    sys::enter_namespace(network, libc::CLONE_NEWNET)?;
    sys::has_no_sockets(traces::open_sockstat()?.as_fd())
}

/// Returns the working folder.
fn mount_what_it_sees(blueprint: &Blueprint<'_>) -> Result<OwnedFd, Failure> {
    let fences = blueprint.fences;
    if !fences.has(Fence::RootReadonly) {
        return sys::open(blueprint.folder, libc::O_RDONLY | libc::O_DIRECTORY).map_err(Failure::at(Step::Folder));
    }
    let proc = if fences.has(Fence::ProcSubset) { mounts::Proc::OwnOnly } else { mounts::Proc::Whole };
    if blueprint.template.is_none() {
        mounts::assemble(blueprint.root, blueprint.image, Some(blueprint.told), Some(proc))
            .map_err(Failure::at(Step::MountRoot))?;
    } else {
        mounts::mount_proc(c"/proc", proc).map_err(Failure::at(Step::MountProc))?;
    }
    let bytes = if fences.has(Fence::LimitsDisk) { blueprint.disk_bytes } else { mounts::UNLIMITED };
    mounts::mount_private(bytes, blueprint.identity.filter(|_| fences.has(Fence::UidOwn)))
        .map_err(Failure::at(Step::MountWork))?;
    sys::open(c"/work", libc::O_RDONLY | libc::O_DIRECTORY).map_err(Failure::at(Step::MountWork))
}

/// The spawner keeps it for the next task of the same job. It could not open it itself: what is not dumpable is
/// closed to whoever may not trace.
fn made_network(blueprint: &Blueprint<'_>, joined: bool) -> Result<Option<OwnedFd>, Failure> {
    let fences = blueprint.fences;
    if joined || blueprint.rootless || !fences.has(Fence::NsNet) || !fences.has(Fence::RootReadonly) {
        return Ok(None);
    }
    sys::open(c"/proc/self/ns/net", libc::O_RDONLY).map(Some).map_err(Failure::at(Step::Namespaces))
}

/// What neither the init nor any job after it needs any more; the job inherits all of it for nothing.
fn give_up_rights(blueprint: &Blueprint<'_>) -> Result<(), Failure> {
    let fences = blueprint.fences;
    if fences.has(Fence::Dumpable) {
        // A job of the same uid could otherwise open our descriptors through /proc/1/fd.
        sys::prctl(libc::PR_SET_DUMPABLE, 0).map_err(Failure::at(Step::Dumpable))?;
    }
    if fences.has(Fence::Rlimits) {
        limit_resources().map_err(Failure::at(Step::Limits))?;
    }
    if fences.has(Fence::NoNewPrivs) {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map_err(Failure::at(Step::NoNewPrivileges))?;
    }
    if fences.has(Fence::Landlock) {
        let policy = if fences.has(Fence::RootReadonly) { landlock::Policy::STRICT } else { landlock::Policy::SHARED };
        landlock::restrict(blueprint.landlock_abi, &policy).map_err(Failure::at(Step::Landlock))?;
    }
    if fences.has(Fence::NsUser) && !blueprint.rootless {
        // After all mounts, which belong to the host's user namespace and so are out of our own reach from here on.
        sys::unshare(libc::CLONE_NEWUSER).map_err(Failure::at(Step::UserNamespace))?;
    }
    if fences.has(Fence::CapsNone) && (!blueprint.rootless || fences.has(Fence::NsUser)) {
        // After the user namespace, in which a process begins with a full set; an ordinary user has it from the clone.
        sys::drop_bounding_capabilities().map_err(Failure::at(Step::Capabilities))?;
    }
    if fences.has(Fence::Seccomp) {
        // Last, because it refuses most of the calls above.
        blueprint.filter.install().map_err(Failure::at(Step::Seccomp))?;
    }
    Ok(())
}

/// Of every job alike; `RLIMIT_FSIZE` and `RLIMIT_NPROC` are the job's own.
fn limit_resources() -> Result<(), Errno> {
    // Not 0, which still lets a program in /proc/sys/kernel/core_pattern have the core: 1 stops that too (do_coredump).
    sys::limit_resource(libc::RLIMIT_CORE, 1, 1)?;
    sys::limit_resource(libc::RLIMIT_NOFILE, 1_024, 65_536)?;
    sys::limit_resource(libc::RLIMIT_MEMLOCK, 8 << 20, 8 << 20)?;
    sys::limit_resource(libc::RLIMIT_MSGQUEUE, 800 << 10, 800 << 10)?;
    sys::limit_resource(libc::RLIMIT_SIGPENDING, 4_096, 4_096)?;
    sys::limit_resource(libc::RLIMIT_NICE, 0, 0)?;
    sys::limit_resource(libc::RLIMIT_RTPRIO, 0, 0)
}

/// The spawner is protected from the out-of-memory killer, and a child inherits that: a job at its
/// memory limit would then hang for ever instead of being killed. Raising the score is always allowed.
fn become_killable_for_memory() {
    let _kept_as_it_is = std::fs::write("/proc/self/oom_score_adj", "0");
}

/// The spawner maps our uid first; `G` says that it is done.
fn wait_for_go(control: BorrowedFd<'_>) -> Result<(), Failure> {
    let mut order = [0u8; 1];
    loop {
        match nix::unistd::read(control, &mut order) {
            Ok(1) if order[0] == order::GO => return Ok(()),
            Ok(_) => return Err(Failure::new(Step::Parent, Errno::ESRCH)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::new(Step::Parent, errno)),
        }
    }
}

fn kept(blueprint: &Blueprint<'_>) -> Vec<RawFd> {
    // 0 to 2 stay taken, so that nothing that is opened here gets a number that the job's own will replace.
    let (control, lease, null) = (&blueprint.control, blueprint.lease, blueprint.null);
    let mut kept: Vec<RawFd> = vec![0, 1, 2, control.as_raw_fd(), lease.as_raw_fd(), null.as_raw_fd()];
    kept.extend([blueprint.template, blueprint.network].into_iter().flatten().map(|fd| fd.as_raw_fd()));
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// Other attempts' pipes and the agent's socket are not ours.
fn close_all_but(kept: &[RawFd]) -> Result<(), Errno> {
    let mut next: u32 = 0;
    for fd in kept {
        let fd = fd.cast_unsigned();
        if fd > next {
            sys::close_range(next, fd - 1, 0)?;
        }
        next = fd + 1;
    }
    sys::close_range(next, u32::MAX, 0)
}

/// Waits for the order, for as long as the spawner lives.
fn park(control: BorrowedFd<'_>, packet: &mut [u8]) -> Result<Option<Arrived>, Failure> {
    let mut space = nix::cmsg_space!([RawFd; order::DESCRIPTORS_MAX]);
    let (length, mut descriptors) = loop {
        let mut slices = [IoSliceMut::new(packet)];
        match recvmsg::<()>(control.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let mut descriptors: Vec<OwnedFd> = Vec::new();
                for part in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(raw) = part {
                        // SAFETY: the kernel has just made them for us.
                        descriptors.extend(unsafe { order::own(raw) });
                    }
                }
                break (message.bytes, descriptors);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::new(Step::Order, errno)),
        }
    };
    let bytes = match packet[..length].split_first() {
        None => return Ok(None),
        // A stop that was faster than the order, or slower than the job's own end: there is nothing to stop.
        Some((&(order::TERMINATE | order::SIGNAL | order::KILL), _)) => return Ok(None),
        Some((&order::RUN_IN_MEMORY, _)) if !descriptors.is_empty() => {
            let memory = std::fs::File::from(descriptors.remove(0));
            read_all(&memory).map_err(|_| Failure::new(Step::Order, Errno::EIO))?
        }
        Some((_, order)) => order.to_vec(),
    };
    let rest = descriptors.split_off(order::PIPES.min(descriptors.len()));
    let pipes = descriptors.try_into().map_err(|_| Failure::new(Step::Order, Errno::EBADMSG))?;
    Ok(Some(Arrived { bytes, pipes, descriptors: rest }))
}

fn read_all(memory: &std::fs::File) -> std::io::Result<Vec<u8>> {
    let length = usize::try_from(memory.metadata()?.len()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length];
    memory.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// In a child that holds the job's uid, so that the kernel checks its rights.
fn copy_inputs(
    blueprint: &Blueprint<'_>,
    order: &Order<'_>,
    inputs: &[OwnedFd],
    folder: BorrowedFd<'_>,
) -> Result<(), Failure> {
    // SAFETY: one thread; the child leaves by exit_now.
    let child = unsafe { sys::fork_process() }.map_err(Failure::at(Step::Inputs))?;
    if child == 0 {
        let copied = become_job(blueprint).and_then(|()| files::copy_in(folder, &order.inputs, inputs));
        sys::exit_now(copied.err().map_or(0, |errno| errno as c_int));
    }
    match sys::wait_pid(child) {
        Ok(0) => Ok(()),
        Ok(raw_status) => Err(Failure { step: Step::Inputs, errno: libc::WEXITSTATUS(raw_status) }),
        Err(errno) => Err(Failure::new(Step::Inputs, errno)),
    }
}

fn become_job(blueprint: &Blueprint<'_>) -> Result<(), Errno> {
    if let Some(uid) = blueprint.identity.filter(|_| blueprint.fences.has(Fence::UidOwn)) {
        sys::become_identity(uid, uid)?;
    }
    if blueprint.fences.has(Fence::CapsNone) {
        sys::keep_capabilities(0)?;
    }
    Ok(())
}

/// What the job's process needs, and where it leaves the reason if it never becomes user code.
struct Launch<'a> {
    blueprint: &'a Blueprint<'a>,
    folder: BorrowedFd<'a>,
    standard: [RawFd; 3],
    order: &'a Order<'a>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    programs: Vec<CString>,
    failure: Option<Failure>,
}

const LAUNCH_STACK_BYTES: usize = 256 << 10;

/// CAP_KILL, CAP_SETGID and CAP_SETUID.
const KILL_AND_IDENTITY: u64 = 1 << 5 | 1 << 6 | 1 << 7;

/// The job's process: its pid here. It shares our memory until its exec, so
/// that no page is copied for it, and we wait until then.
fn start_job(
    blueprint: &Blueprint<'_>,
    parked: &mut Parked,
    order: &Order<'_>,
    arrived: &Arrived,
) -> Result<i32, Failure> {
    let stdin = order.stdin.and_then(|index| arrived.descriptors.get(usize::from(index)));
    let [stdout, stderr] = &arrived.pipes;
    let mut launch = Launch {
        blueprint,
        folder: parked.folder.as_fd(),
        standard: [
            stdin.map_or(blueprint.null.as_raw_fd(), |fd| fd.as_raw_fd()),
            stdout.as_raw_fd(),
            stderr.as_raw_fd(),
        ],
        order,
        argv: order::pointers(order.arguments),
        envp: order::pointers(order.environment),
        programs: candidates(order),
        failure: None,
    };
    // SAFETY: one thread; the child writes only `failure`, its stack and heap that nobody else uses meanwhile.
    let job = unsafe { sys::vfork_process(&mut parked.stack, become_user_code, &mut launch) }
        .map_err(Failure::at(Step::Job))?;
    match launch.failure {
        None => {
            // Only what is needed to signal the job, and to start the next, is kept from here on.
            let kept = if blueprint.identity.is_some() { KILL_AND_IDENTITY } else { 0 };
            sys::keep_capabilities(kept).map_err(Failure::at(Step::Capabilities))?;
            Ok(job)
        }
        Some(failure) => Err(failure),
    }
}

/// From a copy of the init to the job. Returns only if it cannot, and leaves the reason.
extern "C" fn become_user_code(launch: *mut c_void) -> c_int {
    // SAFETY: it points to the `Launch` of `start_job`, which waits until we are gone.
    let launch = unsafe { &mut *launch.cast::<Launch<'_>>() };
    match enter(launch) {
        Ok(never) => match never {},
        Err(failure) => launch.failure = Some(failure),
    }
    127
}

enum Never {}

fn enter(launch: &Launch<'_>) -> Result<Never, Failure> {
    let (blueprint, fences) = (launch.blueprint, launch.blueprint.fences);
    if fences.has(Fence::Session) {
        nix::unistd::setsid().map_err(Failure::at(Step::Session))?;
    }
    // All of them are above 2, because 0 to 2 were taken when they were opened: none overwrites another.
    for (fd, place) in launch.standard.into_iter().zip(0..) {
        sys::place_descriptor(fd, place).map_err(Failure::at(Step::Standard))?;
    }
    if fences.has(Fence::Descriptors) {
        // All others close at the exec.
        sys::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).map_err(Failure::at(Step::Descriptors))?;
    }
    if fences.has(Fence::Rlimits) {
        limit_job(blueprint, launch.order).map_err(Failure::at(Step::Limits))?;
    }
    become_job(blueprint).map_err(Failure::at(Step::Identity))?;
    // SAFETY: umask(2) takes no memory and cannot fail.
    unsafe { libc::umask(0o077) };
    // As the job: from its second order on the init may not look into the folder itself.
    sys::change_folder(launch.folder.as_raw_fd()).map_err(Failure::at(Step::WorkingFolder))?;
    if let Some(path) = order::first(launch.order.working_folder) {
        sys::change_folder_to(path).map_err(Failure::at(Step::WorkingFolder))?;
    }
    sys::block_all_signals(false);
    Err(Failure::at(Step::Exec)(execute(launch)))
}

fn limit_job(blueprint: &Blueprint<'_>, order: &Order<'_>) -> Result<(), Errno> {
    // By uid, and since Linux 5.14 by user namespace: so only where no other sandbox has both the same.
    if blueprint.identity.is_some() || (blueprint.rootless && blueprint.fences.has(Fence::NsUser)) {
        sys::limit_resource(libc::RLIMIT_NPROC, order.processes_max, order.processes_max)?;
    }
    if blueprint.fences.has(Fence::LimitsDisk) && order.file_bytes_max > 0 {
        sys::limit_resource(libc::RLIMIT_FSIZE, order.file_bytes_max, order.file_bytes_max)?;
    }
    Ok(())
}

fn execute(launch: &Launch<'_>) -> Errno {
    let mut reason = Errno::ENOENT;
    for program in &launch.programs {
        // SAFETY: both arrays end in null and point to strings that end in NUL, in the order's packet.
        match unsafe { sys::execute(program, launch.argv.as_ptr(), launch.envp.as_ptr()) } {
            Errno::ENOENT | Errno::ENOTDIR => {}
            other => reason = other,
        }
    }
    reason
}

/// Where execvp(3) would look, by the job's own PATH.
fn candidates(order: &Order<'_>) -> Vec<CString> {
    let Some(program) = order::first(order.arguments) else { return Vec::new() };
    if program.to_bytes().contains(&b'/') {
        return vec![program.to_owned()];
    }
    let path = order::variable(order.environment, b"PATH").unwrap_or(b"/usr/bin:/bin");
    path.split(|byte| *byte == b':')
        .filter_map(|folder| CString::new([folder, b"/", program.to_bytes()].concat()).ok())
        .collect()
}
