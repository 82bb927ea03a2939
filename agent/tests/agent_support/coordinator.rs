//! A coordinator without rules: real TLS and gRPC, and a test says each word.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll},
    time::Duration,
};

use muster_proto::v1::{
    self,
    agent_message::Message as FromAgent,
    agent_server::{Agent, AgentServer},
    coordinator_message::Message as ToAgent,
    enrollment_server::{Enrollment, EnrollmentServer},
};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::PrivateKeyDer;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming, transport::server::Connected};

const HEARTBEAT_MS: u32 = 100;
const LEASE_MS: u32 = 15_000;

/// The fake; all of it ends with this value.
pub struct FakeCoordinator {
    pub address: SocketAddr,
    pub token: String,
    shared: Arc<Shared>,
    messages: mpsc::Receiver<FromAgent>,
    _runtime: tokio::runtime::Runtime,
}

struct Shared {
    authority: Issuer<'static, KeyPair>,
    authority_der: Vec<u8>,
    messages: mpsc::Sender<FromAgent>,
    session: Mutex<Option<tokio::sync::mpsc::Sender<Result<v1::CoordinatorMessage, Status>>>>,
    logs: Mutex<BTreeMap<(u64, i32), Vec<u8>>>,
    blobs: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl FakeCoordinator {
    pub fn serve() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, messages) = mpsc::channel();
        let (shared, tls) = authority(sender);
        let shared = Arc::new(shared);
        let fingerprint = hex(&Sha256::digest(&shared.authority_der));
        let json = format!(r#"{{"id":"00","secret":"11","ca":"{fingerprint}","pool":"p","host":null}}"#);
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(accept(listener, tls, Arc::clone(&shared)));
        Self { address, token: format!("muster1.{}", hex(json.as_bytes())), shared, messages, _runtime: runtime }
    }

    /// Waits for a message of this kind; what came before it is skipped.
    pub fn expect<T>(&self, what: &str, mut pick: impl FnMut(FromAgent) -> Option<T>) -> T {
        loop {
            match self.messages.recv_timeout(Duration::from_secs(20)) {
                Ok(message) => {
                    if let Some(found) = pick(message) {
                        return found;
                    }
                }
                Err(_) => panic!("the agent never said {what}"),
            }
        }
    }

    /// The next session's first message.
    pub fn hello(&self) -> v1::Hello {
        self.expect("hello", |message| match message {
            FromAgent::Hello(hello) => Some(hello),
            _ => None,
        })
    }

    /// The next report of an end.
    pub fn ended(&self) -> (v1::AttemptId, v1::AttemptEnded) {
        self.expect("that an attempt ended", |message| match message {
            FromAgent::Reports(batch) => batch.reports.into_iter().find_map(|report| match report.change {
                Some(v1::attempt_report::Change::Ended(ended)) => report.attempt.map(|attempt| (attempt, ended)),
                _ => None,
            }),
            _ => None,
        })
    }

    pub fn say(&self, message: ToAgent) {
        let session = self.shared.session.lock().unwrap().clone().expect("a session");
        session.blocking_send(Ok(v1::CoordinatorMessage { message: Some(message) })).unwrap();
    }

    /// Breaks the stream.
    pub fn hang_up(&self) {
        self.shared.session.lock().unwrap().take();
    }

    /// What was uploaded of a job's stdout.
    pub fn log_of(&self, job: u64) -> Vec<u8> {
        self.shared.logs.lock().unwrap().get(&(job, 1)).cloned().unwrap_or_default()
    }

    pub fn put_blob(&self, content: &[u8]) -> Vec<u8> {
        let digest = Sha256::digest(content).to_vec();
        self.shared.blobs.lock().unwrap().insert(digest.clone(), content.into());
        digest
    }

    pub fn blob(&self, digest: &[u8]) -> Option<Vec<u8>> {
        self.shared.blobs.lock().unwrap().get(digest).cloned()
    }
}

fn authority(messages: mpsc::Sender<FromAgent>) -> (Shared, TlsAcceptor) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    let authority = Issuer::new(params, key);
    let server_key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["muster-coordinator".to_owned()]).unwrap();
    let server = server.signed_by(&server_key, &authority).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .unwrap();
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(
            vec![server.der().clone(), certificate.der().clone()],
            PrivateKeyDer::try_from(server_key.serialize_der()).unwrap(),
        )
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let shared = Shared {
        authority,
        authority_der: certificate.der().to_vec(),
        messages,
        session: Mutex::default(),
        logs: Mutex::default(),
        blobs: Mutex::default(),
    };
    (shared, TlsAcceptor::from(Arc::new(tls)))
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) {
    let (sender, incoming) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (tls, sender) = (tls.clone(), sender.clone());
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(socket).await {
                    let _ = sender.send(Ok::<_, io::Error>(Connection(stream))).await;
                }
            });
        }
    });
    tonic::transport::Server::builder()
        .add_service(EnrollmentServer::new(Service(Arc::clone(&shared))))
        .add_service(AgentServer::new(Service(shared)))
        .serve_with_incoming(ReceiverStream::new(incoming))
        .await
        .unwrap();
}

struct Service(Arc<Shared>);

impl Shared {
    fn certify(&self, csr: &[u8]) -> v1::JoinResponse {
        let mut request = CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
        request.params.subject_alt_names = vec![SanType::URI("muster://node/7".try_into().unwrap())];
        let certificate = request.signed_by(&self.authority).unwrap();
        v1::JoinResponse {
            node: 7,
            certificate_chain: vec![certificate.der().to_vec().into()],
            ca: self.authority_der.clone().into(),
            not_after_ms: u64::MAX / 2,
            ..Default::default()
        }
    }
}

#[tonic::async_trait]
impl Enrollment for Service {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        Ok(Response::new(self.0.certify(&request.into_inner().csr)))
    }
}

#[tonic::async_trait]
impl Agent for Service {
    type SessionStream = ReceiverStream<Result<v1::CoordinatorMessage, Status>>;
    type UploadLogsStream = ReceiverStream<Result<v1::LogAck, Status>>;
    type FetchBlobStream = ReceiverStream<Result<v1::BlobChunk, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        let welcome = v1::Welcome {
            node: 7,
            incarnation: 1,
            term: 1,
            heartbeat_interval_ms: HEARTBEAT_MS,
            unknown: vec![],
            reconnect_spread_ms: 100,
            drain: None,
        };
        sender.send(Ok(v1::CoordinatorMessage { message: Some(ToAgent::Welcome(welcome)) })).await.unwrap();
        *self.0.session.lock().unwrap() = Some(sender.clone());
        let answers = sender.downgrade();
        let (shared, mut messages) = (Arc::clone(&self.0), request.into_inner());
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let message = message.message.unwrap();
                if let (FromAgent::Heartbeat(beat), Some(answers)) = (&message, answers.upgrade()) {
                    let lease = v1::Lease { sequence: beat.sequence, duration_ms: LEASE_MS, ..Default::default() };
                    let message = v1::CoordinatorMessage { message: Some(ToAgent::Lease(lease)) };
                    let _ = answers.send(Ok(message)).await;
                }
                if shared.messages.send(message).is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        Ok(Response::new(self.0.certify(&request.into_inner().csr)))
    }

    async fn upload_logs(
        &self,
        request: Request<Streaming<v1::LogChunk>>,
    ) -> Result<Response<Self::UploadLogsStream>, Status> {
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        let (shared, mut chunks) = (Arc::clone(&self.0), request.into_inner());
        tokio::spawn(async move {
            while let Some(Ok(chunk)) = chunks.next().await {
                let end = chunk.offset + chunk.data.len() as u64;
                {
                    let mut logs = shared.logs.lock().unwrap();
                    let log = logs.entry((chunk.attempt.unwrap().job, chunk.stream)).or_default();
                    log.truncate(usize::try_from(chunk.offset).unwrap());
                    log.extend_from_slice(&chunk.data);
                }
                let ack = v1::LogAck { attempt: chunk.attempt, stream: chunk.stream, offset: end };
                let _ = sender.send(Ok(ack)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn fetch_blob(&self, request: Request<v1::BlobRef>) -> Result<Response<Self::FetchBlobStream>, Status> {
        let asked = request.into_inner();
        let blob = self.0.blobs.lock().unwrap().get(&asked.digest[..]).cloned();
        let blob = blob.ok_or_else(|| Status::not_found("no such blob"))?;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let _ = sender.send(Ok(v1::BlobChunk { digest: asked.digest, data: blob.into() })).await;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn store_blob(&self, request: Request<Streaming<v1::BlobChunk>>) -> Result<Response<v1::BlobRef>, Status> {
        let (mut chunks, mut content) = (request.into_inner(), Vec::new());
        while let Some(chunk) = chunks.next().await {
            content.extend_from_slice(&chunk?.data);
        }
        let digest = Sha256::digest(&content).to_vec();
        let length = content.len() as u64;
        self.0.blobs.lock().unwrap().insert(digest.clone(), content);
        Ok(Response::new(v1::BlobRef { digest: digest.into(), offset: 0, length }))
    }
}

/// tonic asks each connection who it is; nobody here wants to know.
struct Connection(TlsStream<TcpStream>);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
