//! Files that a job must not reach: devices, kernel settings, cgroups, the host's and other jobs' files.

use std::{
    fs::{self, OpenOptions},
    os::unix::{fs::OpenOptionsExt as _, net::UnixListener},
    path::Path,
};

use crate::{
    Facts,
    sys::{
        self,
        Arg::{Number, Text},
        c,
    },
    tell::{self, Outcome, tell, tell_value},
};

fn open_to_write(path: &str) -> Outcome<fs::File> {
    // Opened, never written: also where it works, nothing changes.
    tell::of(OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path))
}

/// Device nodes that it makes, and those that a host has.
pub fn devices(_: &Facts) {
    for (name, mode, major, minor) in [
        ("make-memory", libc::S_IFCHR, 1, 1),
        ("make-null", libc::S_IFCHR, 1, 3),
        ("make-disk", libc::S_IFBLK, 8, 0),
        ("make-kmsg", libc::S_IFCHR, 1, 11),
    ] {
        let mode = i64::from(mode | 0o600);
        let device = i64::try_from(libc::makedev(major, minor)).expect("small numbers");
        tell(name, sys::call(libc::SYS_mknod, &mut [Text(c"node"), Number(mode), Number(device)]));
        let _gone = fs::remove_file("node");
    }
    for device in
        ["mem", "kmsg", "kvm", "fuse", "sda", "vda", "loop0", "loop-control", "net/tun", "ptmx", "port", "console"]
    {
        tell(
            &format!("open-{}", device.replace('/', "-")),
            tell::of(
                OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(format!("/dev/{device}")),
            ),
        );
    }
    for device in ["null", "zero", "urandom"] {
        tell(&format!("plain-{device}"), tell::of(fs::File::open(format!("/dev/{device}"))));
    }
}

/// Kernel settings, by /proc and /sys.
pub fn settings(_: &Facts) {
    for (name, path) in [
        ("host-name", "/proc/sys/kernel/hostname"),
        ("core-pattern", "/proc/sys/kernel/core_pattern"),
        ("modprobe", "/proc/sys/kernel/modprobe"),
        ("overcommit", "/proc/sys/vm/overcommit_memory"),
        ("forwarding", "/proc/sys/net/ipv4/ip_forward"),
        ("ping-range", "/proc/sys/net/ipv4/ping_group_range"),
        ("user-namespaces", "/proc/sys/user/max_user_namespaces"),
        ("sysrq", "/proc/sysrq-trigger"),
        ("irq", "/proc/irq/default_smp_affinity"),
        ("uevent-helper", "/sys/kernel/uevent_helper"),
        ("power", "/sys/power/state"),
        ("huge-pages", "/sys/kernel/mm/transparent_hugepage/enabled"),
    ] {
        tell(name, open_to_write(path));
    }
    tell_value("sys", tell::of(fs::read_dir("/sys")).map(Iterator::count));
}

/// Control groups: mounted ones, and files of the groups that the suite names (`group.NAME` is a folder).
pub fn cgroups(facts: &Facts) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().filter(|line| line.contains(" - cgroup")).count();
    tell_value("mounted", Ok(mounted));
    for (name, folder) in facts.all("group.") {
        for file in [
            "cgroup.procs",
            "cgroup.kill",
            "cgroup.subtree_control",
            "memory.max",
            "cpu.max",
            "release_agent",
            "notify_on_release",
        ] {
            tell(&format!("{name}-{file}"), open_to_write(&format!("{folder}/{file}")));
        }
    }
}

/// The host's files and those that the suite names (`file.NAME`, `folder.NAME`, and `program.NAME`, which may be read).
pub fn write_host(facts: &Facts) {
    for folder in ["/", "/usr", "/usr/bin", "/etc", "/bin", "/lib", "/opt", "/dev", "/proc", "/var", "/run"] {
        let name = if folder == "/" { "root".to_owned() } else { folder.trim_start_matches('/').replace('/', "-") };
        tell(&format!("create-in-{name}"), create_in(folder));
    }
    for (name, path) in
        [("passwd", "/etc/passwd"), ("shell", "/bin/sh"), ("libc", "/usr/lib"), ("program", "/usr/bin/env")]
    {
        let changed = if name == "libc" {
            let path = c(path);
            sys::call(libc::SYS_chmod, &mut [Text(&path), Number(0o755)]).map(drop)
        } else {
            open_to_write(path).map(drop)
        };
        tell(&format!("change-{name}"), changed);
    }
    for (name, path) in facts.all("file.") {
        tell(&format!("read-{name}"), tell::of(fs::read(path)));
        tell(&format!("write-{name}"), open_to_write(path));
    }
    for (name, path) in facts.all("program.") {
        tell(&format!("write-{name}"), open_to_write(path));
    }
    for (name, folder) in facts.all("folder.") {
        tell(&format!("list-{name}"), tell::of(fs::read_dir(folder)));
        tell(&format!("create-in-{name}"), create_in(folder));
    }
    tell("dot-dot", create_in("../../../../usr"));
    tell("by-init-root", tell::of(fs::read_dir("/proc/1/root/etc")));
    tell("by-init-folder", tell::of(fs::read_dir("/proc/1/cwd/")));
}

/// A file without a name: where it works, nothing is left.
fn create_in(folder: &str) -> Outcome<()> {
    let flags = libc::O_TMPFILE | libc::O_CLOEXEC;
    match tell::of(OpenOptions::new().write(true).custom_flags(flags).mode(0o600).open(folder)) {
        // Where the file system has no unnamed files, a named one is made and removed.
        Err(libc::EOPNOTSUPP | libc::EISDIR) => {
            let path = Path::new(folder).join(format!("hostile-{}", std::process::id()));
            tell::of(fs::File::create(&path)).map(|_| drop(fs::remove_file(&path)))
        }
        opened => opened.map(drop),
    }
}

/// Where it may write; and how many rule sets of Landlock fit on top of those that are there already (16 in all), for
/// what Landlock refuses, mounts and owners mostly refuse too.
pub fn landlock(_: &Facts) {
    for folder in ["/work", "/tmp", "/dev/shm"] {
        let name = folder.trim_start_matches('/').replace('/', "-");
        tell(&format!("file-in-{name}"), create_in(folder));
    }
    tell("list-root", tell::of(fs::read_dir("/")));
    tell("read-etc", tell::of(fs::read("/etc/passwd")));
    // In a child: what it puts on itself stays there.
    let layers = sys::fork(0, || i32::try_from(layers_that_fit()).unwrap_or(100)).and_then(sys::wait);
    tell_value("rule-sets-that-fit", layers.map(|status| libc::WEXITSTATUS(status)));
}

fn layers_that_fit() -> u32 {
    // A rule set that handles making block devices, which nobody here does.
    let mut handled = (1u64 << 11).to_ne_bytes();
    let made =
        sys::call(libc::SYS_landlock_create_ruleset, &mut [sys::Arg::Memory(&mut handled), Number(8), Number(0)]);
    let Ok(rules) = made else { return 100 };
    let _no_new_privileges = sys::call_numbers(libc::SYS_prctl, [i64::from(libc::PR_SET_NO_NEW_PRIVS), 1, 0, 0, 0]);
    let mut fit = 0;
    while fit < 50 && sys::call_numbers(libc::SYS_landlock_restrict_self, [rules, 0]).is_ok() {
        fit += 1;
    }
    fit
}

/// Leaves behind what a collector of outputs must not take, beside two files that it must.
pub fn outputs(facts: &Facts) {
    let link = |target: &str, name: &str| tell::of(std::os::unix::fs::symlink(target, name));
    tell("link-to-secret", link(facts.text("secret"), "link"));
    tell("link-to-passwd", link("/etc/passwd", "passwd"));
    tell("link-to-root", link("/", "root"));
    tell("pipe", sys::call(libc::SYS_mknod, &mut [Text(c"pipe"), Number(i64::from(libc::S_IFIFO | 0o600)), Number(0)]));
    tell("socket", tell::of(UnixListener::bind("socket")));
    tell(
        "device",
        sys::call(libc::SYS_mknod, &mut [Text(c"device"), Number(i64::from(libc::S_IFCHR | 0o600)), Number(0x0103)]),
    );
    tell("folder", tell::of(fs::create_dir_all("folder/deep")));
    tell("good", tell::of(fs::write("folder/deep/good", b"good")));
    tell("archive", tell::of(fs::write("escape.tar", escaping_archive())));
    tell("swapped", swap_while_collected());
}

/// Outputs that are files, and as odd as files can be. `limit` is what a collector takes of one.
pub fn extreme_outputs(facts: &Facts) {
    let limit = facts.number("limit", 1 << 20);
    let sparse = |name: &str, bytes: u64| tell::of(fs::File::create(name).and_then(|file| file.set_len(bytes)));
    tell("holes-at-the-limit", sparse("holes", limit));
    tell("holes-past-the-limit", sparse("large-holes", limit + 1));
    tell("room-behind-the-end", room_behind_the_end("room", i64::try_from(3 * limit).unwrap_or(0)));
    tell("hard", tell::of(fs::write("one", b"one").and_then(|()| fs::hard_link("one", "other"))));
    tell("hard-link-to-passwd", tell::of(fs::hard_link("/etc/passwd", "linked-passwd")));
    tell(
        "odd-names",
        ["new\nline", "\u{1b}[2J", "-rf", &"n".repeat(255)].iter().try_for_each(|name| tell::of(fs::write(name, name))),
    );
    let _there = fs::create_dir("many");
    tell("many", (0..facts.number("many", 1_000)).try_for_each(|at| tell::of(fs::write(format!("many/{at}"), b"x"))));
    tell("deep", deep(facts.number("depth", 2_100), 100));
}

/// Blocks that no length shows (fallocate(2), FALLOC_FL_KEEP_SIZE).
fn room_behind_the_end(name: &str, bytes: i64) -> Outcome<i64> {
    use std::os::fd::AsRawFd as _;
    let file = tell::of(fs::File::create(name))?;
    let arguments = [i64::from(file.as_raw_fd()), i64::from(libc::FALLOC_FL_KEEP_SIZE), 0, bytes];
    sys::call_numbers(libc::SYS_fallocate, arguments)
}

/// Folders `d/d/d…`, deeper than any path can name; a file `leaf` in one that a path can, and in the last.
fn deep(depth: u64, shallow: u64) -> Outcome<()> {
    let back = tell::of(std::env::current_dir())?;
    for at in 1..=depth {
        tell::of(fs::create_dir("d").and_then(|()| std::env::set_current_dir("d")))?;
        if at == shallow || at == depth {
            tell::of(fs::write("leaf", b"leaf"))?;
        }
    }
    tell::of(std::env::set_current_dir(back))
}

/// A link where a folder was: a path that was good when it was made.
fn swap_while_collected() -> Outcome<()> {
    tell::of(fs::create_dir("swapped"))?;
    tell::of(fs::write("swapped/passwd", b"mine"))?;
    tell::of(fs::rename("swapped", "before"))?;
    tell::of(std::os::unix::fs::symlink("/etc", "swapped"))
}

/// A ustar archive with a member that leaves the folder, an absolute one, and a link with a file behind it.
fn escaping_archive() -> Vec<u8> {
    let members = [
        ("../../escaped", b'0', "", "x"),
        ("/tmp/hostile-absolute", b'0', "", "x"),
        ("way", b'2', "/etc", ""),
        ("way/hostile", b'0', "", "x"),
    ];
    let mut archive = Vec::new();
    for (name, kind, target, content) in members {
        let mut header = [0u8; 512];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, "0000644");
        put(124, &format!("{:011o}", content.len()));
        put(136, "00000000000");
        put(148, "        ");
        put(157, target);
        put(257, "ustar\u{0}00");
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        if !content.is_empty() {
            let mut block = [0u8; 512];
            block[..content.len()].copy_from_slice(content.as_bytes());
            archive.extend(block);
        }
    }
    archive.extend([0; 1_024]);
    archive
}
