//! How a command reaches the coordinator: a Unix socket on its own machine, or
//! TLS with a client certificate. Which one: `--server`, else MUSTER_SERVER,
//! else the newest running `muster up`, else the system's coordinator.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use muster_proto::{
    LEADER_METADATA,
    v1::{
        StatusRequest, fleet_client::FleetClient, jobs_client::JobsClient, nodes_client::NodesClient,
        pools_client::PoolsClient,
    },
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::{
    escape,
    exit::{Exit, Failure, Result},
    local::folder,
};

/// Where a coordinator listens when it was installed as a service.
pub const SYSTEM_SOCKET: &str = "/var/lib/muster/operator.sock";
/// The name in every coordinator's certificate.
const SERVER_NAME: &str = "muster-coordinator";
/// A coordinator that does not take a connection in this time is not reachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that says nothing for so long is asked whether it is there, and has as long to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A takeover is done in this time.
const LEADER_PATIENCE: Duration = Duration::from_secs(15);
/// Between two rounds; up to a quarter of a second comes on top, so that callers do not come in step.
const LEADER_PAUSE: Duration = Duration::from_millis(200);
/// An answer with many inline outputs may be large; the coordinator bounds what it sends.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A coordinator's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// On this machine.
    Unix(PathBuf),
    /// `host:port`, with TLS; several of a fleet whose coordinators share a data base.
    Tcp(Vec<String>),
}

/// The files of a client certificate.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// The fleet's CA, PEM.
    pub ca: Option<PathBuf>,
    /// The client's certificate, PEM.
    pub certificate: Option<PathBuf>,
    /// Its key, PEM; default: beside the certificate, with the ending `.key`.
    pub key: Option<PathBuf>,
}

impl Server {
    /// From `--server` or MUSTER_SERVER.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        let reads = |address: &str| match address.rsplit_once(':') {
            Some((host, port)) => !host.is_empty() && port.parse::<u16>().is_ok(),
            None => false,
        };
        let addresses: Vec<String> = text.split(',').map(|address| address.trim().to_owned()).collect();
        if addresses.iter().all(|address| reads(address)) {
            return Ok(Self::Tcp(addresses));
        }
        Err(format!("`{text}` is no server; write unix:/path, host:port, or host:port,host:port"))
    }

    /// Where to look when nothing was named.
    pub fn find() -> Self {
        Self::Unix(folder::newest_operator_socket().unwrap_or_else(|| PathBuf::from(SYSTEM_SOCKET)))
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", escape::path(path)),
            Self::Tcp(addresses) => f.write_str(&addresses.join(",")),
        }
    }
}

/// A connection to the coordinator.
#[derive(Clone)]
pub struct Client {
    /// Another one after a takeover.
    channel: Arc<Mutex<Channel>>,
    /// Where it goes.
    pub server: Server,
    tls: Option<tokio_rustls::TlsConnector>,
    timeout: Duration,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects, or says why not.
    pub async fn connect(server: Server, tls: &TlsFiles, timeout: Duration) -> Result<Self> {
        let (channel, tls) = match &server {
            Server::Unix(path) => {
                let path = path.clone();
                let dial = move |_| {
                    let path = path.clone();
                    async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
                };
                let channel = endpoint().connect_with_connector(service_fn(dial)).await;
                (channel.map_err(|error| unreachable(&server, error))?, None)
            }
            Server::Tcp(addresses) => {
                let connector = tokio_rustls::TlsConnector::from(Arc::new(tls_config(tls)?));
                let channel = match addresses.as_slice() {
                    [address] => dial(address, &connector).await.map_err(|error| unreachable(&server, error))?,
                    _several => find_leader(&server, addresses, &connector).await?,
                };
                (channel, Some(connector))
            }
        };
        Ok(Self { channel: Arc::new(Mutex::new(channel)), server, tls, timeout })
    }

    /// After a call that found nobody: looks for the coordinator that leads now, where several are known.
    pub async fn find_again(&self) {
        let (Server::Tcp(addresses), Some(tls)) = (&self.server, &self.tls) else { return };
        if addresses.len() > 1
            && let Ok(channel) = find_leader(&self.server, addresses, tls).await
        {
            *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
        }
    }

    fn channel(&self) -> Channel {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Jobs and blobs.
    pub fn jobs(&self) -> JobsClient<Channel> {
        JobsClient::new(self.channel()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Nodes.
    pub fn nodes(&self) -> NodesClient<Channel> {
        NodesClient::new(self.channel()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Pools.
    pub fn pools(&self) -> PoolsClient<Channel> {
        PoolsClient::new(self.channel()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// The fleet as a whole.
    pub fn fleet(&self) -> FleetClient<Channel> {
        FleetClient::new(self.channel()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// A question with the time limit of this connection.
    pub fn ask<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.timeout);
        request
    }
}

fn endpoint() -> Endpoint {
    Endpoint::from_static("http://muster-coordinator")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_adaptive_window(true)
        .tcp_nodelay(true)
        // A coordinator whose host is gone says nothing: a stream that only reads would wait for it for ever.
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
}

async fn dial(
    address: &str,
    connector: &tokio_rustls::TlsConnector,
) -> std::result::Result<Channel, tonic::transport::Error> {
    let (address, connector) = (address.to_owned(), connector.clone());
    let dial = move |_| {
        let (address, connector) = (address.clone(), connector.clone());
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(SERVER_NAME).expect("a constant that is a DNS name");
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    };
    endpoint().connect_with_connector(service_fn(dial)).await
}

/// Not there, no leader, or silent.
const fn is_passing(code: tonic::Code) -> bool {
    matches!(code, tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Cancelled)
}

/// Asks all in turn who leads, and goes where a standby points, until one answers as the leader.
async fn find_leader(server: &Server, addresses: &[String], connector: &tokio_rustls::TlsConnector) -> Result<Channel> {
    let end = tokio::time::Instant::now() + LEADER_PATIENCE;
    loop {
        let mut left: VecDeque<String> = addresses.iter().cloned().collect();
        let mut named: Option<String> = None;
        let mut last = Failure::new(Exit::Unreachable, format!("no coordinator of {server} leads"));
        while let Some(address) = left.pop_front() {
            let channel = match dial(&address, connector).await {
                Ok(channel) => channel,
                Err(error) => {
                    last = unreachable(&Server::Tcp(vec![address]), error);
                    continue;
                }
            };
            let mut ask = tonic::Request::new(StatusRequest {});
            ask.set_timeout(CONNECT_TIMEOUT);
            match FleetClient::new(channel.clone()).status(ask).await {
                Ok(_) => return Ok(channel),
                Err(status) if is_passing(status.code()) => {
                    let leader = status.metadata().get(LEADER_METADATA).and_then(|leader| leader.to_str().ok());
                    if let Some(leader) = leader.filter(|leader| named.as_deref() != Some(leader)) {
                        left.push_front(leader.to_owned());
                        named = Some(leader.to_owned());
                    }
                    last = status.into();
                }
                Err(status) => return Err(status.into()),
            }
        }
        if tokio::time::Instant::now() >= end {
            return Err(last);
        }
        let mut random = [0; 1];
        getrandom::fill(&mut random).expect("the kernel has random bytes");
        tokio::time::sleep(LEADER_PAUSE + Duration::from_millis(random[0].into())).await;
    }
}

fn unreachable(server: &Server, error: tonic::transport::Error) -> Failure {
    let mut why = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = cause {
        why = error.to_string();
        cause = error.source();
    }
    let why = why.split(" (os error").next().unwrap_or_default().to_owned();
    let advice = match server {
        Server::Unix(_) => "start one with `muster up`, or name another with --server",
        Server::Tcp(_) => "check the address, and --ca, --cert and --cert-key",
    };
    Failure::new(Exit::Unreachable, format!("cannot reach a coordinator at {server}: {}; {advice}", escape::text(&why)))
        .caused_by(error)
}

fn tls_config(files: &TlsFiles) -> Result<rustls::ClientConfig> {
    let missing = |what: &str, flag: &str| {
        Failure::usage(format!("a server on TCP needs {what}: name it with {flag}, or use --server unix:/path"))
    };
    let ca = files.ca.as_deref().ok_or_else(|| missing("the fleet's CA", "--ca"))?;
    let certificate = files.certificate.as_deref().ok_or_else(|| missing("a client certificate", "--cert"))?;
    let beside = certificate.with_extension("key");
    let key = files.key.as_deref().unwrap_or(&beside);

    let mut roots = rustls::RootCertStore::empty();
    for root in certificates(ca)? {
        roots.add(root).map_err(|error| bad_pem("a CA certificate", ca, &error))?;
    }
    let key_bytes = std::fs::read(key).map_err(|error| Failure::file("read the key", key, error))?;
    let key_der = PrivateKeyDer::from_pem_slice(&key_bytes).map_err(|error| bad_pem("a private key", key, &error))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(certificates(certificate)?, key_der)
        .map_err(|error| bad_pem("a usable certificate and key", certificate, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = std::fs::read(path).map_err(|error| Failure::file("read the certificate", path, error))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| bad_pem("a certificate", path, &error))?;
    if certificates.is_empty() {
        return Err(Failure::usage(format!("{} holds no certificate in PEM form", escape::path(path))));
    }
    Ok(certificates)
}

fn bad_pem(what: &str, path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::usage(format!("{} does not hold {what}: {error}", escape::path(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_socket_or_an_address() {
        assert_eq!(Server::parse("unix:/run/m.sock"), Ok(Server::Unix("/run/m.sock".into())));
        assert_eq!(Server::parse("/run/m.sock"), Ok(Server::Unix("/run/m.sock".into())));
        assert_eq!(Server::parse("[::1]:7000"), Ok(Server::Tcp(vec!["[::1]:7000".into()])));
        assert_eq!(Server::parse("a:1, b:2"), Ok(Server::Tcp(vec!["a:1".into(), "b:2".into()])));
        for text in ["", "host", "host:", ":1", "host:99999", "a:1,", "a:1,b"] {
            assert!(Server::parse(text).is_err(), "{text}");
        }
    }
}
