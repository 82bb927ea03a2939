//! Reaching others by sockets and by System V and POSIX interprocess communication.

use std::{
    fs,
    net::{TcpStream, UdpSocket},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixStream},
    },
    time::Duration,
};

use crate::{
    Facts,
    sys::{self, Arg, c},
    tell::{self, Outcome, tell, tell_value},
};

/// Abstract sockets by name (`abstract.NAME`).
pub fn abstract_sockets(facts: &Facts) {
    for (name, text) in facts.all("abstract.") {
        let address = SocketAddr::from_abstract_name(text.as_bytes());
        tell(&format!("connect-{name}"), tell::of(address.and_then(|address| UnixStream::connect_addr(&address))));
    }
}

/// Sockets of services by path, and those that the suite names (`path.NAME`).
pub fn path_sockets(facts: &Facts) {
    let known = [
        ("docker", "/run/docker.sock"),
        ("docker-var", "/var/run/docker.sock"),
        ("containerd", "/run/containerd/containerd.sock"),
        ("podman", "/run/podman/podman.sock"),
        ("crio", "/run/crio/crio.sock"),
        ("systemd", "/run/systemd/private"),
        ("journal", "/run/systemd/journal/socket"),
        ("dbus", "/run/dbus/system_bus_socket"),
        ("dbus-var", "/var/run/dbus/system_bus_socket"),
        ("spawner", "/run/muster-spawner/spawner.sock"),
    ];
    for (name, path) in known.into_iter().chain(facts.all("path.")) {
        // The kind of socket may be wrong for it; only a socket that is not there is ENOENT.
        tell(&format!("connect-{name}"), tell::of(UnixStream::connect(path)));
    }
}

/// Addresses that the suite names: `tcp.NAME` are connected to, `route.NAME` only looked up (no packet is sent).
pub fn addresses(facts: &Facts) {
    for (name, address) in facts.all("tcp.") {
        let connected = address.parse().map_err(std::io::Error::other);
        let connected = connected.and_then(|address| TcpStream::connect_timeout(&address, Duration::from_secs(20)));
        tell(&format!("tcp-{name}"), tell::of(connected));
    }
    for (name, address) in facts.all("route.") {
        let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        tell(&format!("route-{name}"), tell::of(UdpSocket::bind(any).and_then(|socket| socket.connect(address))));
    }
    tell_value("interfaces", Ok(interfaces().join(",")));
    let own =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| TcpStream::connect(listener.local_addr()?));
    tell("own-loopback", tell::of(own));
}

/// By SIOCGIFNAME, which needs no netlink.
fn interfaces() -> Vec<String> {
    let Ok(socket) = UdpSocket::bind("127.0.0.1:0") else { return Vec::new() };
    let fd = i64::from(std::os::fd::AsRawFd::as_raw_fd(&socket));
    let mut names = Vec::new();
    for index in 1..64i32 {
        // A `struct ifreq`: 16 bytes of name, then the index.
        let mut request = [0u8; 40];
        request[16..20].copy_from_slice(&index.to_ne_bytes());
        let call = i64::try_from(libc::SIOCGIFNAME).expect("a small number");
        if sys::call(libc::SYS_ioctl, &mut [Arg::Number(fd), Arg::Number(call), Arg::Memory(&mut request)]).is_ok() {
            let name = request[..16].split(|byte| *byte == 0).next().unwrap_or_default();
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    names
}

/// A socket of every family that is no plain one, and raw ones of those.
pub fn families(_: &Facts) {
    let kinds = [
        ("packet", libc::AF_PACKET, libc::SOCK_RAW, 0),
        ("raw-icmp", libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        ("raw-icmp6", libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
        ("netlink-route", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
        ("netlink-netfilter", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER),
        ("netlink-xfrm", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_XFRM),
        ("alg", libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
        ("vsock", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        ("key", libc::AF_KEY, libc::SOCK_RAW, 2),
        ("rxrpc", libc::AF_RXRPC, libc::SOCK_DGRAM, 0),
        ("tipc", libc::AF_TIPC, libc::SOCK_RDM, 0),
        ("can", libc::AF_CAN, libc::SOCK_RAW, 1),
        ("bluetooth", libc::AF_BLUETOOTH, libc::SOCK_RAW, 1),
        ("xdp", libc::AF_XDP, libc::SOCK_RAW, 0),
    ];
    for (name, family, kind, protocol) in kinds {
        let opened = sys::call_numbers(libc::SYS_socket, [family, kind, protocol].map(i64::from));
        tell(name, opened);
    }
    for (name, family) in
        [("plain-unix", libc::AF_UNIX), ("plain-inet", libc::AF_INET), ("plain-inet6", libc::AF_INET6)]
    {
        tell(name, sys::call_numbers(libc::SYS_socket, [family, libc::SOCK_STREAM, 0].map(i64::from)));
    }
}

/// What the suite made outside under one key and one name: System V and POSIX.
pub fn ipc(facts: &Facts) {
    let key = i64::try_from(facts.number("key", 1)).unwrap_or(1);
    tell("shared-memory", sys::call_numbers(libc::SYS_shmget, [key, 0, 0]));
    tell("semaphore", sys::call_numbers(libc::SYS_semget, [key, 0, 0]));
    tell("message-queue", sys::call_numbers(libc::SYS_msgget, [key, 0]));
    let name = c(facts.text("name"));
    let mut arguments = [Arg::Text(&name), Arg::Number(i64::from(libc::O_RDONLY)), Arg::Number(0), Arg::Number(0)];
    tell("posix-message-queue", sys::call(libc::SYS_mq_open, &mut arguments));
    tell("posix-shared-memory", tell::of(fs::File::open(format!("/dev/shm/{}", facts.text("name")))));
}

/// System V objects under one key and POSIX objects under one name, open to everybody.
pub struct Planted {
    shared_memory: Outcome<i64>,
    semaphore: Outcome<i64>,
    messages: Outcome<i64>,
    name: String,
}

/// Makes what [`ipc`] looks for.
pub fn plant(facts: &Facts) -> Planted {
    let key = i64::try_from(facts.number("key", 1)).unwrap_or(1);
    let make = i64::from(libc::IPC_CREAT | 0o666);
    let name = facts.text("name").to_owned();
    let mut arguments = [
        Arg::Text(&c(&name)),
        Arg::Number(i64::from(libc::O_CREAT | libc::O_RDWR)),
        Arg::Number(0o666),
        Arg::Number(0),
    ];
    let _told_by_the_control = sys::call(libc::SYS_mq_open, &mut arguments);
    let _told_by_the_control = fs::write(format!("/dev/shm/{name}"), b"planted");
    Planted {
        shared_memory: sys::call_numbers(libc::SYS_shmget, [key, 4_096, make]),
        semaphore: sys::call_numbers(libc::SYS_semget, [key, 1, make]),
        messages: sys::call_numbers(libc::SYS_msgget, [key, make]),
        name,
    }
}

impl Planted {
    /// Nothing of it stays.
    pub fn remove(self) {
        let remove = i64::from(libc::IPC_RMID);
        let _removed = self.shared_memory.map(|id| sys::call_numbers(libc::SYS_shmctl, [id, remove, 0]));
        let _removed = self.semaphore.map(|id| sys::call_numbers(libc::SYS_semctl, [id, 0, remove]));
        let _removed = self.messages.map(|id| sys::call_numbers(libc::SYS_msgctl, [id, remove, 0]));
        let _removed = sys::call(libc::SYS_mq_unlink, &mut [Arg::Text(&c(&self.name))]);
        let _removed = fs::remove_file(format!("/dev/shm/{}", self.name));
    }
}
