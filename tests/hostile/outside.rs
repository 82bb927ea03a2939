//! What the host has that a job must not reach: a victim process with its
//! System V and POSIX objects, sockets, a secret. It ends with its guard.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// All of it.
pub struct Outside {
    victim: Child,
    /// Where its memory can be read.
    pub victim_address: u64,
    /// Of its System V objects.
    pub key: u32,
    /// Of its POSIX objects.
    pub name: String,
    /// An abstract socket that listens.
    pub abstract_name: String,
    /// A socket in /run that listens.
    pub path: PathBuf,
    tcp: Vec<TcpListener>,
    _listeners: [UnixListener; 2],
    /// In the spawner's environment and in a file; must never be in a job's output.
    pub secret: String,
}

impl Outside {
    /// Makes it.
    pub fn make(probe: &Path) -> Result<Self, String> {
        let own = std::process::id();
        let name = format!("muster-hostile-{own}");
        // A key that nobody else has by accident: "mh" before our own pid.
        let key = 0x6d68_0000 | (own & 0xffff);
        let told = |error: std::io::Error| error.to_string();
        let mut victim = Command::new(probe)
            .args(["victim", &format!("key={key}"), &format!("name={name}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(told)?;
        let mut line = String::new();
        BufReader::new(victim.stdout.take().expect("it was piped")).read_line(&mut line).map_err(told)?;
        let victim_address = line.trim().parse().map_err(|_| format!("the victim said {line:?}"))?;
        // Where services have theirs, if we may put one there.
        let may_write = |folder: &&str| nix::unistd::access(*folder, nix::unistd::AccessFlags::W_OK).is_ok();
        let folder = ["/run", "/tmp"].into_iter().find(may_write).unwrap_or("/tmp");
        let path = Path::new(folder).join(format!("{name}.sock"));
        let _of_a_former_run = fs::remove_file(&path);
        let address = SocketAddr::from_abstract_name(&name).map_err(told)?;
        let listeners = [UnixListener::bind_addr(&address).map_err(told)?, UnixListener::bind(&path).map_err(told)?];
        // Without IPv6 there is nothing to reach by it.
        let tcp =
            ["127.0.0.1:0", "[::1]:0"].into_iter().filter_map(|address| TcpListener::bind(address).ok()).collect();
        let secret = format!("secret-{:016x}", {
            use std::hash::BuildHasher as _;
            std::collections::hash_map::RandomState::new().hash_one(own)
        });
        Ok(Self {
            victim,
            victim_address,
            key,
            abstract_name: name.clone(),
            name,
            path,
            tcp,
            _listeners: listeners,
            secret,
        })
    }

    /// The victim's pid.
    pub fn victim_pid(&self) -> u32 {
        self.victim.id()
    }

    /// Loopback addresses where something listens.
    pub fn addresses(&self) -> Vec<String> {
        self.tcp.iter().filter_map(|listener| listener.local_addr().ok()).map(|address| address.to_string()).collect()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The end of its input is its order to tidy up and end.
        drop(self.victim.stdin.take());
        let _ended = self.victim.wait();
        let _gone = fs::remove_file(&self.path);
    }
}
