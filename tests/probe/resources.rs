//! Taking more than was asked for: processes, memory, files, output, time. What
//! would exhaust a host takes a `max`, so that the control can reach it.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Facts, processes,
    sys::{self, Arg},
    tell::{self, Outcome, tell, tell_value},
};

/// Children in sessions of their own that ignore SIGTERM, until refused; with `hold=yes` they then go on forking for
/// ever, else they are ended.
pub fn fork_bomb(facts: &Facts) {
    let mut children = Vec::new();
    let (count, refused) = until_refused(facts.number("max", 300), |_| {
        let child = sys::fork(0, || {
            sys::ignore(libc::SIGTERM);
            let _own_session = sys::call_numbers(libc::SYS_setsid, []);
            sys::stay()
        })?;
        children.push(child);
        Ok(())
    });
    tell_value("fork", refused.map_or(Ok(count), Err));
    tell_value("forked", Ok(count));
    if facts.text("hold") == "yes" {
        // Nobody gives up: whatever place becomes free is taken again.
        sys::ignore(libc::SIGTERM);
        sys::ignore(libc::SIGCHLD);
        loop {
            let _refused = sys::fork(0, || 0);
        }
    }
    for child in children {
        let _our_own_unreaped_child = sys::call_numbers(libc::SYS_kill, [i64::from(child), i64::from(libc::SIGKILL)]);
        let _reaped = sys::wait(child);
    }
}

/// How often it worked before it was refused, or `max`, and the refusal.
fn until_refused<T>(max: u64, mut work: impl FnMut(u64) -> Outcome<T>) -> (u64, Option<i32>) {
    for count in 0..max {
        if let Err(errno) = work(count) {
            return (count, Some(errno));
        }
    }
    (max, None)
}

/// Threads until refused.
pub fn thread_bomb(facts: &Facts) {
    let (count, refused) = until_refused(facts.number("max", 300), |_| {
        let thread = thread::Builder::new().stack_size(64 << 10).spawn(|| {
            sys::stay();
        });
        tell::of(thread)
    });
    tell_value("thread", refused.map_or(Ok(count), Err));
    tell_value("threads", Ok(count));
}

/// Memory, written to, up to `max` MiB.
pub fn memory(facts: &Facts) {
    tell_value("begun", Ok(""));
    let (count, refused) = until_refused(facts.number("max", 1 << 20), |_| sys::map(1 << 20, true));
    tell_value("memory", refused.map_or(Ok(count), Err));
}

/// A small parent whose children take `max` MiB each; it would outlive them.
pub fn greedy_children(facts: &Facts) {
    let max = facts.number("max", 1 << 20);
    let children: Vec<_> = (0..4)
        .filter_map(|_| sys::fork(0, || until_refused(max, |_| sys::map(1 << 20, true)).1.unwrap_or(0)).ok())
        .collect();
    tell_value("children", Ok(children.len()));
    let ends: Vec<String> = children.into_iter().filter_map(|pid| sys::wait(pid).ok()).map(sys::status_text).collect();
    tell_value("outlived", Ok(ends.join(",")));
}

/// Fills the working folder, frees it, and goes on.
pub fn fill_folder(facts: &Facts) {
    let max = facts.number("max", 1 << 30);
    let block = [0x5au8; 4_096];
    let mut file = match File::create("full") {
        Ok(file) => file,
        Err(error) => return tell("fill", Err::<(), _>(tell::number(&error))),
    };
    let (blocks, refused) = until_refused(max / 4_096, |_| tell::of(file.write_all(&block)));
    tell_value("fill", refused.map_or(Ok(blocks * 4_096), Err));
    tell_value("filled", Ok(blocks * 4_096));
    drop(file);
    tell("remove", tell::of(fs::remove_file("full")));
    tell("write-again", tell::of(fs::write("again", b"x")));
    let _the_suites_folder_stays_small = fs::remove_file("again");
}

/// Empty files until refused.
pub fn many_files(facts: &Facts) {
    let _there = fs::create_dir("many");
    let (count, refused) =
        until_refused(facts.number("max", 1 << 22), |at| tell::of(File::create(format!("many/{at}"))).map(drop));
    tell_value("file", refused.map_or(Ok(count), Err));
    tell_value("files", Ok(count));
}

/// Descriptors until refused; the limit raised.
pub fn open_files(facts: &Facts) {
    let mut own = limit_of(libc::RLIMIT_NOFILE);
    tell_value("soft-limit", Ok(own.rlim_cur));
    if facts.text("raise") == "yes" {
        own.rlim_cur = own.rlim_max;
        tell("raise-soft", set_limit(libc::RLIMIT_NOFILE, &own));
    }
    let mut held = Vec::new();
    let (count, refused) = until_refused(facts.number("max", 1 << 22), |_| {
        held.push(tell::of(File::open("/dev/null"))?);
        Ok(())
    });
    drop(held);
    tell_value("open", refused.map_or(Ok(count), Err));
    tell_value("opened", Ok(count));
    let more = libc::rlimit { rlim_cur: own.rlim_max, rlim_max: own.rlim_max.saturating_add(1) };
    tell("raise-hard", set_limit(libc::RLIMIT_NOFILE, &more));
}

fn limit_of(resource: libc::__rlimit_resource_t) -> libc::rlimit {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a live structure.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit
}

fn set_limit(resource: libc::__rlimit_resource_t, limit: &libc::rlimit) -> Outcome<()> {
    // SAFETY: a live structure.
    match unsafe { libc::setrlimit(resource, limit) } {
        0 => Ok(()),
        _ => Err(sys::last_errno()),
    }
}

/// The resource limits, hard ones, as numbers.
pub fn limits(_: &Facts) {
    let names = [
        ("core", libc::RLIMIT_CORE),
        ("files", libc::RLIMIT_NOFILE),
        ("file-size", libc::RLIMIT_FSIZE),
        ("message-queues", libc::RLIMIT_MSGQUEUE),
        ("pending-signals", libc::RLIMIT_SIGPENDING),
        ("locked-memory", libc::RLIMIT_MEMLOCK),
        ("processes", libc::RLIMIT_NPROC),
    ];
    for (name, resource) in names {
        tell_value(name, Ok(limit_of(resource).rlim_max));
    }
}

/// Threads that only compute, for `seconds`.
pub fn burn(facts: &Facts) {
    let until = Instant::now() + Duration::from_secs(facts.number("seconds", 3));
    let spin = move || {
        let mut turns = 0u64;
        while Instant::now() < until {
            turns = std::hint::black_box(turns + 1);
        }
    };
    let threads: Vec<_> = (0..facts.number("threads", 4)).map(|_| thread::spawn(spin)).collect();
    for thread in threads {
        let _never_panics = thread.join();
    }
    let mut used = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage(2) fills the structure, which is plain numbers.
    let used = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, used.as_mut_ptr());
        used.assume_init()
    };
    let ms = |time: libc::timeval| time.tv_sec * 1_000 + time.tv_usec / 1_000;
    tell_value("cpu-ms", Ok(ms(used.ru_utime) + ms(used.ru_stime)));
}

/// Writes `bytes` to the disk below its folder, past every cache, and tells how fast that went.
pub fn write_disk(facts: &Facts) {
    const BLOCK: usize = 64 << 10;
    let bytes = facts.number("bytes", 4 << 20);
    // What goes past the page cache must begin at a page (open(2), O_DIRECT).
    let room = vec![0x5au8; BLOCK + 4_096];
    let begin = room.as_ptr().align_offset(4_096);
    let opened =
        fs::OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open("disk");
    let file = match opened {
        Ok(file) => file,
        Err(error) => return tell("write-disk", Err::<(), _>(tell::number(&error))),
    };
    let since = Instant::now();
    let (blocks, refused) = until_refused(bytes / BLOCK as u64, |at| {
        tell::of(file.write_all_at(&room[begin..begin + BLOCK], at * BLOCK as u64))
    });
    let wall_us = since.elapsed().as_micros().max(1);
    tell_value("write-disk", refused.map_or(Ok(blocks), Err));
    tell_value("bytes-per-second", Ok(u128::from(blocks) * BLOCK as u128 * 1_000_000 / wall_us));
    let _the_suites_folder_stays_small = fs::remove_file("disk");
}

/// A place before all others.
pub fn priority(_: &Facts) {
    tell("nice", sys::call_numbers(libc::SYS_setpriority, [0, 0, -20]));
    for (name, policy) in [("fifo", libc::SCHED_FIFO), ("round-robin", libc::SCHED_RR)] {
        let mut parameter = 1i32.to_ne_bytes();
        let mut arguments = [Arg::Number(0), Arg::Number(i64::from(policy)), Arg::Memory(&mut parameter)];
        tell(name, sys::call(libc::SYS_sched_setscheduler, &mut arguments));
        let mut normal = 0i32.to_ne_bytes();
        let mut arguments = [Arg::Number(0), Arg::Number(0), Arg::Memory(&mut normal)];
        let _as_before = sys::call(libc::SYS_sched_setscheduler, &mut arguments);
    }
    // Class 1 is real time (ioprio_set(2)).
    tell("io-real-time", sys::call_numbers(libc::SYS_ioprio_set, [1, 0, 1 << 13]));
    let mut large = vec![1u8; 16 << 20];
    tell("lock-16-mib", sys::call(libc::SYS_mlock, &mut [Arg::Memory(&mut large), Arg::Number(16 << 20)]));
    tell("never-killed-for-memory", tell::of(fs::write("/proc/self/oom_score_adj", "-1000")));
}

/// Files past every limit, apparent or real.
pub fn large_file(facts: &Facts) {
    sys::ignore(libc::SIGXFSZ);
    let file = match File::create("large") {
        Ok(file) => file,
        Err(error) => return tell("create", Err::<(), _>(tell::number(&error))),
    };
    let limit = facts.number("limit", 16 << 20);
    tell("sparse-past-limit", tell::of(file.set_len(limit + 4_096)));
    tell("sparse-1-tib", tell::of(file.set_len(1 << 40)));
    tell("write-past-limit", tell::of(file.write_all_at(b"x", limit + 4_096)));
    let killed = sys::in_child(|| {
        sys::restore(libc::SIGXFSZ);
        i32::from(file.write_all_at(b"x", limit + 4_096).is_err())
    });
    tell_value("write-past-limit-end", killed);
    let _left_small = file.set_len(0);
    // For the collector: 2 MiB to look at, nothing on the disk.
    tell("sparse-2-mib", tell::of(File::create("sparse").and_then(|file| file.set_len(2 << 20))));
}

/// Crashes with a lot of memory mapped.
pub fn crash(facts: &Facts) {
    let mut cores = 0;
    let mut crashed = 0;
    for _ in 0..facts.number("times", 100) {
        let child = sys::fork(0, || {
            let _mapped = sys::map(1 << 30, false);
            // SAFETY: does not return.
            unsafe { libc::abort() }
        });
        let Ok(status) = child.and_then(sys::wait) else { continue };
        crashed += u32::from(libc::WIFSIGNALED(status));
        cores += u32::from(libc::WCOREDUMP(status));
    }
    tell_value("crashed", Ok(crashed));
    tell_value("cores", Ok(cores));
    let left = fs::read_dir(".").into_iter().flatten().flatten().map(|entry| entry.file_name());
    tell_value("core-files", Ok(left.filter(|name| name.to_string_lossy().starts_with("core")).count()));
}

/// Children that nobody waits for, and orphans.
pub fn zombies(facts: &Facts) {
    let (count, refused) = until_refused(facts.number("max", 10_000), |_| sys::fork(0, || 0));
    tell_value("zombie", refused.map_or(Ok(count), Err));
    tell_value("zombies", Ok(count));
    let mut freed = 0;
    while sys::wait(-1).is_ok() {
        freed += 1;
    }
    tell_value("waited", Ok(freed));
    tell_value("orphans", Ok(processes::orphans(facts.number("orphans", 500))));
}
