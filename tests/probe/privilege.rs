//! Being more than an ordinary uid: who one is, set-uid programs, mounts, namespaces.

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command};

use crate::{
    Facts, processes,
    sys::{
        self,
        Arg::{Number, Text},
        c,
    },
    tell::{self, Outcome, tell, tell_value},
};

/// Who it is, by /proc/self/status.
pub fn identity(_: &Facts) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|text| text.split_whitespace().collect::<Vec<_>>().join(",")).ok_or(libc::ENOENT)
    };
    for name in
        ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Umask"]
    {
        tell_value(name, field(name));
    }
    for (name, call) in [("set-uid-0", libc::SYS_setresuid), ("set-gid-0", libc::SYS_setresgid)] {
        tell(name, sys::errno_of_child(|| sys::call_numbers(call, [0, 0, 0])));
    }
    tell("set-groups", sys::errno_of_child(|| sys::call_numbers(libc::SYS_setgroups, [0, 0])));
    tell("set-host-name", sys::errno_of_child(set_same_host_name));
    tell("chown", tell::of(fs::write("owned", b"x")).and_then(|()| chown_to_root("owned")));
    let _gone = fs::remove_file("owned");
    let environment: Vec<String> = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    tell_value("environment", Ok(environment.join(",")));
}

/// To what it is already: where it is allowed, nothing changes.
fn set_same_host_name() -> Outcome<i64> {
    let name = processes::host_name()?;
    let length = i64::try_from(name.len()).expect("a short name");
    sys::call(libc::SYS_sethostname, &mut [Text(&c(&name)), Number(length)])
}

fn chown_to_root(path: &str) -> Outcome<()> {
    tell::of(std::os::unix::fs::chown(path, Some(0), Some(0)))
}

/// Set-uid programs: one that it makes of itself, the one that the suite names (`program`), and mounts that honour any.
pub fn setuid(facts: &Facts) {
    let own = sys::euid();
    let made = tell::of(std::env::current_exe().and_then(|program| fs::copy(program, "raised")));
    let mode = made.and_then(|_| tell::of(fs::set_permissions("raised", fs::Permissions::from_mode(0o6_755))));
    tell_value("made-runs-as", mode.and_then(|()| euid_of("./raised")));
    let _gone = fs::remove_file("raised");
    tell_value("own", Ok(own));
    if !facts.text("program").is_empty() {
        tell_value("installed-runs-as", euid_of(facts.text("program")));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // A device is no program; all else is looked at.
    let honouring = mounts.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let options = *fields.get(5)?;
        let device =
            ["null", "zero", "full", "random", "urandom"].iter().any(|name| fields[4] == format!("/dev/{name}"));
        (!device && !options.split(',').any(|option| option == "nosuid"))
            .then(|| (*fields.get(4).unwrap_or(&"?")).to_owned())
    });
    tell_value("mounts-that-honour-set-uid", Ok(honouring.collect::<Vec<_>>().join(",")));
}

fn euid_of(program: &str) -> Outcome<String> {
    let done = tell::of(Command::new(program).args(["end", "say=euid"]).output())?;
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
}

/// Every call that changes what is mounted where, each in a child.
pub fn mounts(_: &Facts) {
    let tried = |name: &str, work: &dyn Fn() -> Outcome<i64>| tell(name, sys::errno_of_child(work));
    let flags = |flags: libc::c_ulong| Number(i64::try_from(flags).expect("mount flags are small"));
    let mount = |source, target, kind, how| {
        sys::call(libc::SYS_mount, &mut [Text(source), Text(target), Text(kind), flags(how), Number(0)])
    };
    let _there = fs::create_dir("point");
    tried("mount-tmpfs", &|| mount(c"tmpfs", c"point", c"tmpfs", 0));
    tried("mount-proc", &|| mount(c"proc", c"point", c"proc", 0));
    tried("mount-bind", &|| mount(c"/etc", c"point", c"", libc::MS_BIND));
    tried("mount-move", &|| mount(c"/usr", c"point", c"", libc::MS_MOVE));
    tried("remount-writable", &|| mount(c"", c"/", c"", libc::MS_REMOUNT | libc::MS_BIND));
    tried("make-shared", &|| mount(c"", c"/", c"", libc::MS_SHARED));
    tried("unmount", &|| sys::call(libc::SYS_umount2, &mut [Text(c"/proc"), Number(i64::from(libc::MNT_DETACH))]));
    tried("pivot-root", &|| {
        // Reaches the call as root of a mount namespace; what it answers then is not EPERM.
        sys::call(libc::SYS_pivot_root, &mut [Text(c"."), Text(c".")])
    });
    tried("chroot", &|| sys::call(libc::SYS_chroot, &mut [Text(c".")]));
    tried("fsopen", &|| sys::call(libc::SYS_fsopen, &mut [Text(c"tmpfs"), Number(0)]));
    tried("fspick", &|| sys::call(libc::SYS_fspick, &mut [Number(i64::from(libc::AT_FDCWD)), Text(c"/"), Number(0)]));
    // OPEN_TREE_CLONE is 1 (open_tree(2)).
    tried("open-tree", &|| {
        sys::call(libc::SYS_open_tree, &mut [Number(i64::from(libc::AT_FDCWD)), Text(c"/"), Number(1)])
    });
    tried("move-mount", &|| {
        let here = i64::from(libc::AT_FDCWD);
        sys::call(libc::SYS_move_mount, &mut [Number(here), Text(c"/proc"), Number(here), Text(c"point"), Number(0)])
    });
    tried("mount-setattr", &|| {
        // A `struct mount_attr` that clears MOUNT_ATTR_RDONLY.
        let mut attributes = [0u8; 32];
        attributes[8] = 1;
        let here = i64::from(libc::AT_FDCWD);
        let memory = sys::Arg::Memory(&mut attributes);
        sys::call(libc::SYS_mount_setattr, &mut [Number(here), Text(c"/proc"), Number(0), memory, Number(32)])
    });
    let _empty = fs::remove_dir("point");
}

const NAMESPACES: [(&str, i32); 8] = [
    ("user", libc::CLONE_NEWUSER),
    ("mount", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("time", 0x80),
];

/// New namespaces by each call, and what must go on working without them: processes and threads.
pub fn new_namespaces(_: &Facts) {
    for (name, flag) in NAMESPACES {
        tell(
            &format!("unshare-{name}"),
            sys::errno_of_child(|| sys::call_numbers(libc::SYS_unshare, [i64::from(flag)])),
        );
        // The time namespace's flag is a signal number to clone(2).
        if flag != 0x80 {
            tell(&format!("clone-{name}"), sys::fork(flag, || 0).and_then(sys::wait));
        }
        // In a child, since a child of clone3 ends on its own.
        let by_clone3 = sys::errno_of_child(|| {
            let mut arguments = [0u8; 88];
            arguments[..8].copy_from_slice(&u64::from(flag.unsigned_abs()).to_ne_bytes());
            arguments[32..40].copy_from_slice(&17u64.to_ne_bytes());
            sys::call(libc::SYS_clone3, &mut [sys::Arg::Memory(&mut arguments), Number(88)])
        });
        tell(&format!("clone3-{name}"), by_clone3);
    }
    tell_value("thread", std::thread::spawn(|| "ran").join().map_err(|_| libc::EAGAIN));
    tell_value("process", sys::in_child(|| 7));
    tell_value("program", tell::of(Command::new("/bin/true").status().map(|status| status.code().unwrap_or(-1))));
}

/// Namespaces by descriptor: one's own, and those of pid 1.
pub fn join_namespaces(_: &Facts) {
    for name in ["pid", "mnt", "ipc", "uts", "net", "cgroup", "user"] {
        for (whose, pid) in [("own", "self"), ("init", "1")] {
            let joined = sys::errno_of_child(|| {
                let file = tell::of(fs::File::open(format!("/proc/{pid}/ns/{name}")))?;
                sys::call_numbers(libc::SYS_setns, [i64::from(std::os::fd::AsRawFd::as_raw_fd(&file)), 0])
            });
            tell(&format!("join-{whose}-{name}"), joined);
        }
    }
}
