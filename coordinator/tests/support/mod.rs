//! A coordinator in this process, and both of its peers over real TLS and
//! gRPC: an operator on the Unix socket, and a host that only pretends to run.

use std::{path::Path, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use muster_coordinator::{
    config::{Config, LogFormat},
    server::{self, Running},
};
use muster_proto::v1::{
    self, agent_client::AgentClient, agent_message, coordinator_message, enrollment_client::EnrollmentClient,
};
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject as _};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::mpsc,
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

/// Nothing here takes longer unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Coordinator {
    pub running: Running,
    data: std::path::PathBuf,
}

pub fn config(data: &Path) -> Config {
    Config {
        data: data.to_owned(),
        init: true,
        sans: Vec::new(),
        listen: ([127, 0, 0, 1], 0).into(),
        socket: data.join("operator.sock"),
        port_file: None,
        http: None,
        coordinators: vec!["a.example:1".into()],
        store: None,
        store_ca: None,
        shared: None,
        advertise: None,
        local_provider: None,
        providers: "/nonexistent".into(),
        policies: Vec::new(),
        log_format: LogFormat::Text,
    }
}

impl Coordinator {
    pub async fn start(data: &Path) -> Self {
        let running = server::start(config(data)).await.expect("the coordinator starts");
        Self { running, data: data.to_owned() }
    }

    pub async fn stop(self) {
        self.running.until(std::future::ready(())).await.expect("it stops in order");
    }

    pub async fn operator(&self) -> Channel {
        let path = self.data.join("operator.sock");
        let connect = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://local").connect_with_connector(connect).await.expect("the socket is served")
    }

    /// Over TLS, with a certificate or without one.
    pub async fn dial(&self, identity: Option<(Vec<CertificateDer<'static>>, Vec<u8>)>) -> Channel {
        let ca = CertificateDer::from_pem_file(self.data.join("pki/ca.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(ca).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut tls = match identity {
            Some((chain, key)) => {
                builder.with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key))).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let (connector, address) = (TlsConnector::from(Arc::new(tls)), self.running.address);
        let connect = service_fn(move |_: Uri| {
            let connector = connector.clone();
            async move {
                let name = ServerName::try_from("muster-coordinator").unwrap();
                connector.connect(name, TcpStream::connect(address).await?).await.map(TokioIo::new)
            }
        });
        Endpoint::from_static("http://muster-coordinator").connect_with_connector(connect).await.expect("TLS is served")
    }

    /// The admin's certificate that `init` made.
    pub async fn admin(&self) -> Channel {
        let pem = |file: &str| self.data.join("pki").join(file);
        let chain = vec![CertificateDer::from_pem_file(pem("admin.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(pem("admin.key")).unwrap().secret_der().to_vec();
        self.dial(Some((chain, key))).await
    }

    pub async fn token(&self) -> String {
        let mut fleet = v1::fleet_client::FleetClient::new(self.operator().await);
        let request = v1::CreateTokenRequest { pool: "test".into(), valid_ms: None };
        fleet.create_token(request).await.unwrap().into_inner().token
    }

    pub async fn join(&self, token: &str, name: &str, key: &KeyPair) -> Result<v1::JoinResponse, Status> {
        let csr = CertificateParams::default().serialize_request(key).unwrap().der().to_vec();
        let request = v1::JoinRequest { token: token.into(), csr: csr.into(), node_name: name.into() };
        EnrollmentClient::new(self.dial(None).await).join(request).await.map(tonic::Response::into_inner)
    }
}

pub fn new_key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

/// A host that holds its identity and pretends to run what it is given.
pub struct FakeHost {
    pub key: Vec<u8>,
    pub chain: Vec<CertificateDer<'static>>,
    pub start: u64,
}

pub struct FakeSession {
    pub agent: AgentClient<Channel>,
    pub say: mpsc::Sender<v1::AgentMessage>,
    pub hear: Streaming<v1::CoordinatorMessage>,
}

impl FakeHost {
    pub async fn join(coordinator: &Coordinator, name: &str) -> Self {
        let key = new_key();
        let joined = coordinator.join(&coordinator.token().await, name, &key).await.expect("the token is good");
        let chain = joined.certificate_chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        Self { key: key.serialize_der(), chain, start: 0 }
    }

    pub async fn connect(&mut self, coordinator: &Coordinator, held: Vec<v1::HeldAttempt>) -> FakeSession {
        self.start += 1;
        let channel = coordinator.dial(Some((self.chain.clone(), self.key.clone()))).await;
        let mut agent = AgentClient::new(channel).max_decoding_message_size(16 << 20);
        let (say, said) = mpsc::channel(256);
        let hello = v1::Hello {
            protocol_version: 1,
            agent_version: "test".into(),
            boot_id: "boot".into(),
            instance: "instance".into(),
            agent_start: self.start,
            capacity: Some(v1::Resources { cpu_milli: 64_000, memory_bytes: 64 << 30, disk_bytes: 64 << 30 }),
            held,
            ..Default::default()
        };
        say.send(message(agent_message::Message::Hello(hello))).await.unwrap();
        let hear = agent.session(ReceiverStream::new(said)).await.expect("the session opens").into_inner();
        FakeSession { agent, say, hear }
    }
}

pub fn message(message: agent_message::Message) -> v1::AgentMessage {
    v1::AgentMessage { message: Some(message) }
}

impl FakeSession {
    pub async fn next(&mut self) -> coordinator_message::Message {
        let next = tokio::time::timeout(PATIENCE, self.hear.message()).await.expect("an order in time");
        next.expect("the stream is whole").expect("the stream goes on").message.expect("an order that we know")
    }

    /// The next orders to start, past all else.
    pub async fn starts(&mut self) -> v1::StartAttempts {
        loop {
            if let coordinator_message::Message::Start(starts) = self.next().await {
                return starts;
            }
        }
    }

    pub async fn stored(&mut self) -> v1::ReportsStored {
        loop {
            if let coordinator_message::Message::Stored(stored) = self.next().await {
                return stored;
            }
        }
    }

    pub async fn report(&self, start: &v1::StartAttempt, ended: v1::AttemptEnded) {
        use v1::attempt_report::Change;
        let report = |change| v1::AttemptReport { attempt: start.attempt, epoch: start.epoch, change: Some(change) };
        let phases = v1::StartPhases { prepared: true, exec_us: 110, ..Default::default() };
        let started = v1::AttemptStarted { fences: vec!["ns.pid".into()], start_us: 321, phases: Some(phases) };
        let reports = vec![report(Change::Started(started)), report(Change::Ended(ended))];
        let reports = v1::AttemptReports { reports };
        self.say.send(message(agent_message::Message::Reports(reports))).await.expect("the stream is open");
    }
}

/// A job that any of our fake hosts can take.
pub fn template(tasks: u32) -> v1::JobTemplate {
    let body = v1::JobBody {
        arguments: vec!["/bin/echo".into(), "{}".into()],
        profile: v1::Profile::None.into(),
        request: Some(v1::Resources { cpu_milli: 1_000, memory_bytes: 1 << 20, disk_bytes: 1 << 20 }),
        ..Default::default()
    };
    v1::JobTemplate { name: "test".into(), body: Some(body), tasks, ..Default::default() }
}

pub fn succeeded(output: &'static str) -> v1::AttemptEnded {
    let end = v1::End { reason: Some(v1::end::Reason::Succeeded(v1::Empty {})) };
    let tail = v1::LogTail { stream: v1::Stream::Stdout.into(), offset: 0, data: output.into() };
    v1::AttemptEnded { end: Some(end), wall_ms: 5, tails: vec![tail], ..Default::default() }
}
