//! A PostgreSQL server of a test's own: made in a temporary folder, reached by
//! a Unix socket there, stopped and removed with its guard. And a road to it
//! that can be cut at a chosen moment.

use std::{
    fs,
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

use nix::unistd::{Uid, User, chown};

/// The server.
#[derive(Debug)]
pub struct Cluster {
    folder: tempfile::TempDir,
    bin: PathBuf,
    /// Settings beside the usual ones.
    more: String,
    /// Names its socket; on TCP only where `more` says so.
    port: u16,
    /// Ends the server and removes its folder when the pipe to it closes, which it does however we end.
    keeper: Child,
}

const USUAL_PORT: u16 = 5432;

/// Where the server's programs are: PATH, or the newest of a distribution's folders.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    versions.sort();
    folders.extend(versions);
    folders.into_iter().rev().find(|folder| folder.join("pg_ctl").is_file() && folder.join("initdb").is_file())
}

impl Cluster {
    /// Starts one; none: the host has no PostgreSQL.
    ///
    /// # Panics
    /// If it has, and it does not start.
    #[must_use]
    pub fn start() -> Option<Self> {
        let cluster = Self::make()?;
        cluster.launch();
        Some(cluster)
    }

    /// Starts one that also has TLS on a port of loopback, with this certificate and key (PEM).
    ///
    /// # Panics
    /// As [`Self::start`].
    #[must_use]
    pub fn start_tls(certificate: &str, key: &str, port: u16) -> Option<Self> {
        let mut cluster = Self::make()?;
        for (name, text) in [("server.crt", certificate), ("server.key", key)] {
            let file = cluster.data().join(name);
            fs::write(&file, text).expect("a folder of ours");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("our own file");
            if let Some((uid, gid)) = user() {
                chown(&file, Some(uid.into()), Some(gid.into())).expect("root may");
            }
        }
        cluster.port = port;
        cluster.more = format!("-c ssl=on -c listen_addresses=127.0.0.1 -c port={port}");
        cluster.launch();
        Some(cluster)
    }

    /// Starts two: one that takes writes, and one that has each of them before it is acknowledged.
    ///
    /// # Panics
    /// As [`Self::start`].
    #[must_use]
    pub fn start_pair() -> Option<[Self; 2]> {
        let (primary, standby) = (Self::start()?, Self::without_data()?);
        standby.follow(&primary);
        Some([primary, standby])
    }

    /// Begins anew as the standby of another, which answers no commit from now on that this one does not have.
    ///
    /// # Panics
    /// If it cannot.
    pub fn follow(&self, primary: &Self) {
        let data = self.data();
        fs::remove_dir_all(&data).expect("a folder of ours");
        self.make_data();
        let from = ["-h", text(primary.folder.path()), "-U", "muster", "-c", "fast", "-R", "-D", text(&data)];
        self.run("pg_basebackup", &from);
        self.launch();
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'; SELECT pg_reload_conf();");
    }

    /// A standby takes writes from now on.
    ///
    /// # Panics
    /// If it does not.
    pub fn promote(&self) {
        self.run("pg_ctl", &["-D", text(&self.data()), "-w", "promote"]);
    }

    /// An address for both of a pair: whichever takes writes is used.
    #[must_use]
    pub fn url_of(pair: &[Self; 2]) -> String {
        let [first, second] = pair.each_ref().map(|server| text(server.folder.path()).replace('/', "%2F"));
        format!("postgres://muster@{first},{second}/postgres")
    }

    fn make() -> Option<Self> {
        let cluster = Self::without_data()?;
        let data = cluster.data();
        let made = ["-A", "trust", "-U", "muster", "-E", "UTF8", "--no-sync", "--no-locale", "-D"];
        cluster.run("initdb", &[&made[..], &[text(&data)]].concat());
        Some(cluster)
    }

    fn without_data() -> Option<Self> {
        let bin = programs()?;
        let folder = tempfile::Builder::new().prefix("muster-pg-").tempdir().expect("a temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("our own folder");
        let keeper = keeper(&bin, folder.path());
        let cluster = Self { folder, bin, more: String::new(), port: USUAL_PORT, keeper };
        own(cluster.folder.path());
        cluster.make_data();
        Some(cluster)
    }

    fn make_data(&self) {
        let data = self.data();
        fs::create_dir(&data).expect("a folder in our own");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).expect("our own folder");
        own(&data);
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// Starts it (again) on its data.
    ///
    /// # Panics
    /// If it does not start.
    pub fn launch(&self) {
        let (data, log, folder) = (self.data(), self.folder.path().join("log"), self.folder.path().display());
        let options = format!(
            "-c listen_addresses='' -c unix_socket_directories={folder} -c shared_buffers=16MB -c max_connections=60 {}",
            self.more
        );
        self.run("pg_ctl", &["-D", text(&data), "-w", "-o", &options, "-l", text(&log), "start"]);
    }

    /// Ends it as a crash would: nothing is finished, sessions break.
    ///
    /// # Panics
    /// If it does not end.
    pub fn crash(&self) {
        self.run("pg_ctl", &["-D", text(&self.data()), "-w", "-m", "immediate", "stop"]);
    }

    /// Runs statements, as a restored dump.
    ///
    /// # Panics
    /// If one of them fails.
    pub fn execute(&self, sql: &str) {
        let file = self.folder.path().join("statements.sql");
        fs::write(&file, sql).expect("a folder of ours");
        let port = self.port.to_string();
        let server = ["-h", text(self.folder.path()), "-p", &port, "-U", "muster", "-d", "postgres"];
        self.run("psql", &[&["-q", "-v", "ON_ERROR_STOP=1"], &server[..], &["-f", text(&file)]].concat());
    }

    fn run(&self, program: &str, args: &[&str]) {
        let mut command = Command::new(self.bin.join(program));
        command.args(args).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
        if let Some((uid, gid)) = user() {
            command.uid(uid).gid(gid);
        }
        // A file, not a pipe: a server that is started keeps it open.
        let said = self.folder.path().join("said");
        command.stderr(fs::File::create(&said).expect("a folder of ours"));
        let status = command.status().expect("a program that is there");
        let said = fs::read_to_string(&said).unwrap_or_default();
        assert!(status.success() || thread::panicking(), "{program} {args:?}: {said}{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The server's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(format!(".s.PGSQL.{}", self.port))
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://muster@{}/postgres", text(self.folder.path()).replace('/', "%2F"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

fn keeper(bin: &Path, folder: &Path) -> Child {
    let mut command = Command::new("/bin/sh");
    let script = r#"read -r _; "$0/pg_ctl" -D "$1/data" -w -m immediate stop; rm -rf "$1""#;
    command.args(["-c", script]).args([bin, folder]).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not of our group, which an interrupt from a terminal ends as a whole.
    command.process_group(0);
    if let Some((uid, gid)) = user() {
        command.uid(uid).gid(gid);
    }
    command.spawn().expect("a shell")
}

/// Gives it to the server's user.
fn own(path: &Path) {
    if let Some((uid, gid)) = user() {
        chown(path, Some(uid.into()), Some(gid.into())).expect("root may");
    }
}

/// The server refuses to run as root.
fn user() -> Option<(u32, u32)> {
    if !Uid::effective().is_root() {
        return None;
    }
    let user = ["postgres", "nobody"].into_iter().find_map(|name| User::from_name(name).ok().flatten());
    let user = user.expect("a system has one of these users");
    Some((user.uid.as_raw(), user.gid.as_raw()))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary folder's name is plain")
}

/// What the road does with what comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Road {
    /// Passes all.
    Open = 0,
    /// Breaks when the client says something, before the server hears it. Once.
    CutQuestion = 1,
    /// Breaks when the server answers, before the client hears it. Once.
    CutAnswer = 2,
    /// Breaks every connection at its first byte.
    Closed = 3,
}

/// A TCP port on loopback that leads to a server's socket.
#[derive(Debug)]
pub struct Proxy {
    address: std::net::SocketAddr,
    road: Arc<AtomicU8>,
}

impl Proxy {
    /// Leads to this server. Its threads end with the test's process.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn to(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let (road, socket) = (Arc::new(AtomicU8::new(Road::Open as u8)), cluster.socket());
        let shared = road.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // The server is down: the client sees a connection that ends at once.
                let Ok(server) = UnixStream::connect(&socket) else { continue };
                let (answers, asked) = (server.try_clone(), client.try_clone());
                let (Ok(answers), Ok(asked)) = (answers, asked) else { continue };
                let (to_server, to_client) = (shared.clone(), shared.clone());
                thread::spawn(move || pass(client, server, &to_server, Road::CutQuestion));
                thread::spawn(move || pass(answers, asked, &to_client, Road::CutAnswer));
            }
        });
        Self { address, road }
    }

    /// What happens next.
    pub fn set(&self, road: Road) {
        self.road.store(road as u8, Ordering::SeqCst);
    }

    /// The server's address by this road.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://muster@{}/postgres", self.address)
    }
}

/// Both kinds of stream end in both directions at once.
trait End {
    fn end(&self);
}

impl End for TcpStream {
    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl End for UnixStream {
    fn end(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

fn pass<A: std::io::Read + End, B: std::io::Write + End>(mut from: A, mut to: B, road: &AtomicU8, cut: Road) {
    let mut bytes = [0; 16 << 10];
    loop {
        let count = from.read(&mut bytes).unwrap_or(0);
        let once = road.compare_exchange(cut as u8, Road::Open as u8, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let closed = road.load(Ordering::SeqCst) == Road::Closed as u8;
        if count == 0 || once || closed || to.write_all(&bytes[..count]).is_err() {
            from.end();
            to.end();
            return;
        }
    }
}
