//! Seeing and touching others: P15 to P23.

use crate::{
    case::{Body, Case, Control, Place, as_it_is, no_facts, refused, value, works},
    stage::Stage,
};

/// The same namespace has the same number.
fn is_not_the_hosts(text: &str, _: &Stage) -> bool {
    let Some((kind, _)) = text.split_once(':') else { return false };
    let own = std::fs::read_link(format!("/proc/self/ns/{kind}"));
    own.is_ok_and(|link| link.to_string_lossy() != text)
}

fn is_empty(text: &str, _: &Stage) -> bool {
    text.is_empty()
}

fn is_zero(text: &str, _: &Stage) -> bool {
    text == "0"
}

fn pids(stage: &Stage, place: Place) -> Vec<String> {
    let mut facts =
        vec![format!("pid.victim={}", stage.outside.victim_pid()), format!("address={}", stage.outside.victim_address)];
    if place == Place::Inside {
        facts.push(format!("pid.spawner={}", stage.spawner.part.pid()));
        facts.push(format!("pid.suite={}", std::process::id()));
        facts.extend(stage.canary.iter().map(|canary| format!("pid.neighbour={}", canary.init_pid)));
    }
    facts
}

fn abstract_sockets(stage: &Stage, _: Place) -> Vec<String> {
    let mut facts = vec![format!("abstract.planted={}", stage.outside.abstract_name)];
    // Names begin with @ there; a blank would end the word.
    let open = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let names = open.lines().filter_map(|line| line.split(' ').next_back()?.strip_prefix('@'));
    let services = names.filter(|name| name.contains("dbus") || name.contains("systemd"));
    facts.extend(services.take(8).enumerate().map(|(at, name)| format!("abstract.service-{at}={name}")));
    facts
}

fn path_sockets(stage: &Stage, _: Place) -> Vec<String> {
    let spawner = stage.spawner.folder.path().join("spawner.sock");
    vec![format!("path.planted={}", stage.outside.path.display()), format!("path.own-spawner={}", spawner.display())]
}

fn addresses(stage: &Stage, _: Place) -> Vec<String> {
    let mut facts: Vec<String> = stage
        .outside
        .addresses()
        .iter()
        .enumerate()
        .map(|(at, address)| format!("tcp.loopback-{at}={address}"))
        .collect();
    facts.extend(
        [
            "route.metadata=169.254.169.254:80",
            "route.lan=10.0.2.2:80",
            "route.dns=1.1.1.1:53",
            "route.documentation=192.0.2.1:80",
            "route.ipv6=[2001:db8::1]:80",
            "route.link-local=[fe80::1]:80",
        ]
        .map(str::to_owned),
    );
    facts
}

fn objects(stage: &Stage, _: Place) -> Vec<String> {
    vec![format!("key={}", stage.outside.key), format!("name={}", stage.outside.name)]
}

pub static CASES: [Case; 9] = [
    Case {
        id: "P15",
        title: "lists its descriptors first thing",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "descriptors", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value("open", "0, 1 and 2", |text, _| text == "0,1,2" || text == "0,1,2,3"),
            value("inherited", "none", is_empty),
            value("descriptor-0", "/dev/null", |text, _| text == "/dev/null"),
            value("descriptor-1|descriptor-2", "a pipe", |text, _| text.starts_with("pipe:")),
        ],
    },
    Case {
        id: "P16",
        title: "reads every pid, looks at its namespaces",
        destructive: false,
        needs: &["ns.pid"],
        body: Body::Probe { command: "other-processes+namespaces", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            value("foreign", "no process but its own", is_empty),
            value("foreign-*", "none read", is_zero),
            refused("init-*", &["EACCES", "EPERM", "ENOENT"]),
            value("ns-*", "a namespace of its own", is_not_the_hosts),
            value("host-name", "muster", |text, _| text == "muster"),
            value("cgroup-path", "the root of its own namespace", |text, _| {
                text.split(';').all(|line| line.ends_with(":/"))
            }),
            value("uid-map", "its own uid alone, or few", |text, _| !text.contains("4294967295")),
            refused("proc-*", &["ENOENT", "EACCES"]),
        ],
    },
    Case {
        id: "P17",
        title: "traces, reads, signals processes of the host",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "attack-processes", facts: pids, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("*", &["ESRCH", "EPERM"])],
    },
    Case {
        id: "P18",
        title: "kill(-1, 9)",
        destructive: true,
        needs: &["ns.pid"],
        body: Body::Probe { command: "kill-all", facts: no_facts, shape: as_it_is },
        control: Control::None("it would end the guest that it runs in; the canary and the suite are alive after it"),
        ends: &["exited(0)"],
        rules: &[works("kill-all"), value("own-children", "all three", |text, _| text == "3")],
    },
    Case {
        id: "P19",
        title: "connects to abstract sockets of the host",
        destructive: false,
        needs: &["ns.net"],
        body: Body::Probe { command: "abstract-sockets", facts: abstract_sockets, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        // With Landlock's scope the answer is EPERM before the name is looked for.
        rules: &[refused("*", &["ECONNREFUSED", "EPERM"])],
    },
    Case {
        id: "P20",
        title: "connects to sockets of services by path",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "path-sockets", facts: path_sockets, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        // Landlock refuses a path that is not on its list without telling whether it exists.
        rules: &[refused("*", &["ENOENT", "EACCES"])],
    },
    Case {
        id: "P21",
        title: "loopback of the host, metadata, LAN, DNS, IPv6",
        destructive: false,
        needs: &["ns.net"],
        body: Body::Probe { command: "addresses", facts: addresses, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[
            // Its own loopback, where nothing listens; without an IPv6 of its own there is no such address.
            refused("tcp-*", &["ECONNREFUSED", "EADDRNOTAVAIL", "ENETUNREACH"]),
            // A link-local address needs the name of an interface (EINVAL).
            refused("route-link-local", &["ENETUNREACH", "EINVAL", "EADDRNOTAVAIL", "EAFNOSUPPORT"]),
            refused("route-*", &["ENETUNREACH", "EAFNOSUPPORT"]),
            value("interfaces", "lo alone", |text, _| text == "lo"),
            works("own-loopback"),
        ],
    },
    Case {
        id: "P22",
        title: "packet, raw, netlink, crypto, vsock sockets",
        destructive: false,
        needs: &[],
        body: Body::Probe { command: "socket-families", facts: no_facts, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[works("plain-unix|plain-inet|plain-inet6"), refused("*", &["EPERM", "EAFNOSUPPORT"])],
    },
    Case {
        id: "P23",
        title: "System V and POSIX objects of others",
        destructive: false,
        needs: &["ns.ipc"],
        body: Body::Probe { command: "ipc", facts: objects, shape: as_it_is },
        control: Control::Runs(&[]),
        ends: &["exited(0)"],
        rules: &[refused("*", &["ENOENT", "EPERM", "ENOSYS"])],
    },
];
