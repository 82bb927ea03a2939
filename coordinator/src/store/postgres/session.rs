//! One connection to PostgreSQL: made when it is needed, made again after it
//! broke, and driven from a thread of its own, so that callers may block.

use std::{
    collections::HashMap, error::Error as _, fmt, io, path::Path, sync::mpsc as blocking, thread, time::Duration,
};

use futures_util::future::LocalBoxFuture;
use tokio::{sync::mpsc, time::timeout};
use tokio_postgres::{
    Client, Config, NoTls, Statement,
    config::{Host, SslMode, TargetSessionAttrs},
    error::SqlState,
};

use super::tls::Tls;
use crate::store::{Cause, Error};

/// A server that does not take a connection in this time is away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for all that follows it, until the session is ready.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// What is not acknowledged by the other side's TCP in this time never will be.
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
/// Of every session. A commit that was acknowledged is on the disk; a writer that was stopped within a
/// transaction does not keep its locks; a question ends.
const SETTINGS: &str = "SET synchronous_commit = on; SET idle_in_transaction_session_timeout = '2s';
    SET statement_timeout = '60s'; SET lock_timeout = '10s'; SET client_min_messages = 'warning'";

/// Which data base, and how to get there.
#[derive(Clone)]
pub struct Target {
    config: Box<Config>,
    tls: Option<Tls>,
}

impl Target {
    /// From a `postgres://` address, and the CA that vouches for the server, if there is TLS.
    ///
    /// # Errors
    /// The address does not read, or asks for TLS without saying whom to trust.
    pub fn parse(url: &str, ca: Option<&Path>) -> Result<Self, Error> {
        // The parser's own message may quote a part of the address, with its password.
        let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| Error::Unfit {
            reason: format!(
                "its address does not read as postgres://user:password@host:port/name ({})",
                error.source().map_or_else(String::new, ToString::to_string)
            ),
        })?;
        if ca.is_none() && config.get_ssl_mode() == SslMode::Require {
            let reason =
                "sslmode=require needs `store_ca`, the file with the CA that vouches for the server".to_owned();
            return Err(Error::Unfit { reason });
        }
        let tls = ca.map(Tls::trusting).transpose()?;
        if tls.is_some() {
            config.ssl_mode(SslMode::Require);
        }
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_TIMEOUT);
        }
        config.keepalives_idle(TCP_TIMEOUT);
        config.keepalives_interval(Duration::from_secs(1));
        config.keepalives_retries(3);
        Ok(Self { config: config.into(), tls })
    }

    /// The first of its hosts that answers and takes writes. One that is frozen, whose system still takes connections,
    /// has no more time than one that is away.
    async fn connect(&self, purpose: &str) -> Result<Client, Cause> {
        let mut last: Cause = "it names no host".into();
        for host in self.hosts() {
            let time = host.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT) + HANDSHAKE_TIMEOUT;
            match timeout(time, self.connect_to(host, purpose)).await {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => last = error.into(),
                Err(_late) => last = "it takes the connection and says nothing".into(),
            }
        }
        Err(last)
    }

    /// A config for each host of the address.
    fn hosts(&self) -> Vec<Config> {
        let (hosts, ports) = (self.config.get_hosts(), self.config.get_ports());
        // An address that gives their numbers beside their names says which belong together.
        if hosts.len() < 2 || !self.config.get_hostaddrs().is_empty() {
            return vec![Config::clone(&self.config)];
        }
        let one = |(index, host): (usize, &Host)| {
            let mut config = Config::new();
            match host {
                Host::Tcp(name) => config.host(name),
                Host::Unix(path) => config.host_path(path),
            };
            if let Some(port) = ports.get(index).or(ports.first()) {
                config.port(*port);
            }
            config.ssl_mode(self.config.get_ssl_mode());
            config.ssl_negotiation(self.config.get_ssl_negotiation());
            config.channel_binding(self.config.get_channel_binding());
            config.target_session_attrs(self.config.get_target_session_attrs());
            config.keepalives(self.config.get_keepalives());
            config.keepalives_idle(self.config.get_keepalives_idle());
            self.config.get_keepalives_interval().map(|span| config.keepalives_interval(span));
            self.config.get_keepalives_retries().map(|count| config.keepalives_retries(count));
            self.config.get_connect_timeout().map(|span| config.connect_timeout(*span));
            self.config.get_tcp_user_timeout().map(|span| config.tcp_user_timeout(*span));
            self.config.get_user().map(|user| config.user(user));
            self.config.get_password().map(|password| config.password(password));
            self.config.get_dbname().map(|name| config.dbname(name));
            self.config.get_options().map(|options| config.options(options));
            config
        };
        hosts.iter().enumerate().map(one).collect()
    }

    async fn connect_to(&self, mut config: Config, purpose: &str) -> Result<Client, tokio_postgres::Error> {
        config.application_name(purpose);
        let client = match &self.tls {
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await?;
                tokio::spawn(connection);
                client
            }
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                tokio::spawn(connection);
                client
            }
        };
        client.batch_execute(SETTINGS).await?;
        Ok(client)
    }
}

/// Where it is, without the password.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = self.config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        });
        let name = self.config.get_dbname().or(self.config.get_user()).unwrap_or("postgres");
        write!(f, "{}/{name}", hosts.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// A connection and what was prepared on it.
pub(super) struct Session {
    target: Target,
    purpose: &'static str,
    client: Option<Client>,
    prepared: HashMap<&'static str, Statement>,
}

impl Session {
    pub(super) fn new(target: Target, purpose: &'static str) -> Self {
        Self { target, purpose, client: None, prepared: HashMap::new() }
    }

    /// A connection that stood when it was last used.
    pub(super) async fn client(&mut self) -> Result<&Client, Error> {
        if self.client.as_ref().is_none_or(Client::is_closed) {
            self.prepared.clear();
            let client = self.target.connect(self.purpose).await;
            self.client = Some(client.map_err(|cause| match cause.downcast::<tokio_postgres::Error>() {
                Ok(error) if error.as_db_error().is_some() => self.failed("connect", *error),
                Ok(error) => self.unreachable(error),
                Err(cause) => self.unreachable(cause),
            })?);
        }
        Ok(self.client.as_ref().expect("it was just made"))
    }

    /// The connection with these statements prepared on it, in one round trip for all that are new.
    pub(super) async fn prepared<const N: usize>(
        &mut self,
        texts: [&'static str; N],
    ) -> Result<(&Client, [Statement; N]), Error> {
        self.client().await?;
        let client = self.client.as_ref().expect("it was just made");
        let missing = texts.iter().copied().filter(|text| !self.prepared.contains_key(text)).collect::<Vec<_>>();
        let made = futures_util::future::join_all(missing.iter().map(|text| client.prepare(text))).await;
        for (text, statement) in missing.into_iter().zip(made) {
            let statement = statement.map_err(|error| self.failed("prepare", error))?;
            self.prepared.insert(text, statement);
        }
        let client = self.client.as_ref().expect("it was just made");
        Ok((client, texts.map(|text| self.prepared[text].clone())))
    }

    /// The next use connects anew.
    pub(super) fn drop_connection(&mut self) {
        self.client = None;
    }

    pub(super) fn unreachable(&self, cause: impl Into<Cause>) -> Error {
        Error::Unreachable { place: self.target.to_string(), source: cause.into() }
    }

    pub(super) fn failed(&self, doing: &'static str, error: tokio_postgres::Error) -> Error {
        if is_cut(&error) {
            return self.unreachable(error);
        }
        match error.code().map(SqlState::code) {
            Some(DEPOSED) => Error::Deposed,
            Some(_) | None => Error::Database { doing, source: error.into() },
        }
    }
}

/// `muster.fence` refused: another coordinator leads.
pub(super) const DEPOSED: &str = "MU001";
/// `muster.follow` refused: this batch is there already.
pub(super) const FOLLOWED: &str = "MU002";

/// The connection or the server went away: what was under way may be done or not.
pub(super) fn is_cut(error: &tokio_postgres::Error) -> bool {
    let Some(refusal) = error.as_db_error() else {
        // Not what this side could not even say: that would fail again for ever.
        let is_broken = |error: &io::Error| error.kind() != io::ErrorKind::InvalidInput;
        let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
        return error.is_closed() || cause.is_some_and(is_broken);
    };
    // Shutdown, crash, starting up; exceptions of the connection; a session that was idle or too many of them.
    let code = refusal.code().code();
    code.starts_with("57P") || code.starts_with("08") || code == "25P03" || code == "53300"
}

type Work = Box<dyn for<'a> FnOnce(&'a mut Session) -> LocalBoxFuture<'a, ()> + Send>;

/// A session with its thread. Ends when dropped.
#[derive(Debug)]
pub(super) struct Worker {
    works: mpsc::UnboundedSender<Work>,
}

impl Worker {
    pub(super) fn start(target: Target, purpose: &'static str) -> Self {
        let (works, mut received) = mpsc::unbounded_channel::<Work>();
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a thread can always have a runtime of its own");
            runtime.block_on(async move {
                let mut session = Session::new(target, purpose);
                while let Some(work) = received.recv().await {
                    work(&mut session).await;
                }
            });
        };
        thread::Builder::new()
            .name(purpose.into())
            .spawn(run)
            .expect("a process that just started can have one more thread");
        Self { works }
    }

    /// Runs this on the thread and waits for it. Must not be called from that thread.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl for<'a> FnOnce(&'a mut Session) -> LocalBoxFuture<'a, T> + Send + 'static,
    ) -> T {
        let (reply, answer) = blocking::sync_channel(1);
        let work: Work = Box::new(move |session| {
            Box::pin(async move {
                // Whoever asked waits below, or is gone with its thread.
                let _ = reply.send(work(session).await);
            })
        });
        self.works.send(work).expect("the thread runs until we are dropped");
        answer.recv().expect("the thread answers each work before the next")
    }
}
