//! Privilege and the kernel's surface: P24 to P36.

use muster_tests::host;

use crate::{
    case::{Body, Case, Control, Place, as_it_is, no_facts, refused, value, works},
    spawner::UIDS,
    stage::Stage,
};

fn is_own_uid(text: &str, stage: &Stage) -> bool {
    let range = stage.spawner.first_uid..stage.spawner.first_uid + UIDS;
    // real, effective, saved, file system: all the same, of the range, and not the neighbour's.
    let uids: Vec<u32> = text.split(',').filter_map(|uid| uid.parse().ok()).collect();
    !uids.is_empty() && uids.iter().all(|uid| uid == &uids[0] && range.contains(uid) && *uid != stage.canary_uid)
}

fn no_capability(text: &str, _: &Stage) -> bool {
    !text.is_empty() && text.chars().all(|digit| digit == '0')
}

fn setuid(stage: &Stage, _: Place) -> Vec<String> {
    stage.tools.setuid.iter().map(|path| format!("program={}", path.display())).collect()
}

fn own_terminal(_: &Stage, place: Place) -> Vec<String> {
    if place == Place::Outside { vec!["own=yes".into()] } else { Vec::new() }
}

fn groups(stage: &Stage, place: Place) -> Vec<String> {
    let mut facts = Vec::new();
    let Some(mount) = host::cgroup2() else { return facts };
    facts.push(format!("group.root={}", mount.display()));
    if place == Place::Inside {
        let neighbour = stage.canary.as_ref().and_then(|canary| canary.cgroup.clone());
        let neighbour = neighbour.map(|path| String::from_utf8_lossy(&path).into_owned());
        facts.extend(
            neighbour.map(|path| format!("group.neighbour={}", mount.join(path.trim_start_matches('/')).display())),
        );
    }
    facts.push("group.v1-memory=/sys/fs/cgroup/memory".to_owned());
    facts
}

fn host_files(stage: &Stage, place: Place) -> Vec<String> {
    let state = stage.spawner.folder.path().join("state");
    let mut facts = vec![
        format!("file.secret={}", state.join("secret").display()),
        format!("folder.spawner-state={}", state.display()),
        format!("program.muster={}", stage.tools.muster.display()),
    ];
    if place == Place::Inside {
        let neighbour =
            stage.canary.as_ref().map(|canary| format!("folder.neighbour=/proc/{}/root/work", canary.init_pid));
        facts.extend(neighbour);
    }
    facts
}

pub static CASES: [Case; 13] = [
    Case {
        id: "P24",
        title: "who it is; set-uid programs, found and made",
        destructive: false,
        needs: &["uid.own"],
        body: Body::Probe { command: "identity+setuid", facts: setuid, shape: as_it_is },
        control: Control::Runs(&["uts"]),
        ends: &["exited(0)"],
        rules: &[
            value("Uid|Gid", "one uid of the range, of no other job", is_own_uid),
            value("Groups", "none", |text, _| text.is_empty()),
            value("Cap*", "no capability", no_capability),
            value("NoNewPrivs", "1", |text, _| text == "1"),
            value("Seccomp", "2: a filter", |text, _| text == "2"),
            value("Umask", "0077", |text, _| text == "0077"),
            refused("set-uid-0|set-gid-0|set-groups|set-host-name", &["EPERM", "EINVAL"]),
            // In a user namespace without root there is no such owner (EINVAL).
            refused("chown", &["EPERM", "EINVAL"]),
            value("environment", "what was ordered, and the file that tells of drains", |text, _| {
                text == "PATH,MUSTER_DRAIN_FILE"
            }),
            value("own", "its own", is_own_uid),
            crate::case::Rule {
                tries: "made-runs-as|installed-runs-as",
                wants: crate::case::Wants::RefusedOr(&["EPERM", "EACCES"], "its own uid", is_own_uid),
            },
            value("mounts-that-honour-set-uid", "none", |text, _| text.is_empty()),
        ],
    },
    Case {
        id: "P25",
        title: "mount, unmount, pivot_root, chroot, new mount calls",
        destructive: false,
        needs: &["root.readonly"],
        body: Body::Probe { command: "mounts", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&["mount"]),
        ends: &["exited(0)"],
        rules: &[refused("*", &["EPERM"])],
    },
    Case {
        id: "P26",
        title: "new namespaces by unshare, clone, clone3",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "new-namespaces", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            refused("unshare-*|clone-*", &["EPERM"]),
            refused("clone3-*", &["ENOSYS"]),
            value("thread", "ran", |text, _| text == "ran"),
            value("process", "exit 7", |text, _| text == "exit 7"),
            value("program", "0", |text, _| text == "0"),
        ],
    },
    Case {
        id: "P27",
        title: "joins namespaces, its own and pid 1's",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "join-namespaces", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("join-own-*", &["EPERM"]), refused("join-init-*", &["EPERM", "EACCES", "ENOENT"])],
    },
    Case {
        id: "P28",
        title: "makes device nodes, opens devices",
        destructive: false,
        needs: &["root.readonly"],
        body: Body::Probe { command: "devices", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        // Landlock refuses making a device before capabilities are asked for.
        rules: &[refused("make-*", &["EPERM", "EACCES"]), refused("open-*", &["EPERM", "ENOENT"]), works("plain-*")],
    },
    Case {
        id: "P29",
        title: "modules, kexec, reboot, swap, accounting, quota",
        destructive: true,
        needs: &[],
        body: Body::Probe { command: "administration", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&["uts"]),
        ends: &["exited(0)"],
        rules: &[refused("*", &["EPERM"])],
    },
    Case {
        id: "P30",
        title: "sets the clock",
        destructive: true,
        needs: &[],
        body: Body::Probe { command: "clock", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[works("read*"), refused("clock-settime|settimeofday|adjtimex", &["EPERM"])],
    },
    Case {
        id: "P31",
        title: "opens /proc/sys, sysrq and /sys to write",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "settings", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("*", &["EROFS", "EACCES", "ENOENT"])],
    },
    Case {
        id: "P32",
        title: "looks for control groups and writes them",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "cgroups", facts: groups, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[value("mounted", "none", |text, _| text == "0"), refused("*", &["ENOENT", "EACCES"])],
    },
    Case {
        id: "P33",
        title: "bpf, perf, userfaultfd, io_uring, other ABIs",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "surface", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value("i386|x32", "killed by SIGSYS", |text, _| text == "SIGSYS"),
            refused("unknown-call|io-uring-setup", &["ENOSYS"]),
            refused("*", &["EPERM", "ENOSYS"]),
        ],
    },
    Case {
        id: "P34",
        title: "adds, requests and reads keys",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "keys", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("all-keys", &["ENOENT", "EACCES"]), refused("*", &["EPERM", "ENOSYS"])],
    },
    Case {
        id: "P35",
        title: "pushes characters into terminals",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "terminal", facts: own_terminal, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value("leads-its-session", "true", |text, _| text == "true"),
            refused("controlling-*", &["ENXIO", "ENOENT", "EACCES"]),
            // The filter answers EPERM before it is known what the descriptor is.
            refused("descriptor-*", &["ENOTTY", "ENXIO", "EPERM"]),
        ],
    },
    Case {
        id: "P36",
        title: "writes the system's, the image's, others' files",
        destructive: false,
        needs: &["root.readonly"],
        body: Body::Probe { command: "write-host+landlock", facts: host_files, shape: as_it_is },
        control: Control::Runs(&["mount"]),
        ends: &["exited(0)"],
        rules: &[
            works("file-in-work|file-in-tmp|file-in-dev-shm|list-root|read-etc"),
            value("rule-sets-that-fit", "fewer than 16, for one of Landlock is there", |text, _| {
                text.parse::<u32>().is_ok_and(|fit| fit < 16)
            }),
            refused("change-libc", &["EROFS", "EACCES", "EPERM"]),
            refused("*", &["EROFS", "EACCES", "ENOENT"]),
        ],
    },
];
