//! Builds the parts and runs them until told to stop.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use muster_core::{
    denied::Denied,
    event::Event,
    fleet::{Damage, Fleet},
    ids::Actor,
    limits,
    policy::PoolPolicy,
};
use muster_proto::v1;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server as Grpc;

use crate::{
    blobs::{self, Blobs},
    clock::Clock,
    config::Config,
    driver::{self, Handle, Setup},
    folder::{self, Folder, Marker, write_durably},
    hex, http,
    identity::{self, Authority},
    listen,
    logs::Logs,
    provider,
    rpc::{
        Context, agent::Agent, auth::AuthLayer, enrollment::Enrollment, fleet::FleetService, jobs::Jobs, nodes::Nodes,
        pools::Pools,
    },
    shared::{Members, Vitals},
    starts::Bodies,
    store::{self, EmbeddedStore, Reader, Store as _},
    telemetry::Metrics,
    tokens::{Tokens, random},
};

/// Orders of hosts that wait for the providers.
const HOST_ORDERS_MAX: usize = 4_096;
/// Open streams get this long to end when the coordinator stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Why the coordinator does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data folder.
    #[error(transparent)]
    Folder(#[from] folder::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The stored state.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// Certificates.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// The blob folder.
    #[error(transparent)]
    Blobs(#[from] blobs::Error),
    /// A policy on the command line.
    #[error("a pool's policy is refused")]
    Policy(#[source] Denied),
    /// An address.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("the server ended")]
    Serve(#[source] tonic::transport::Error),
    /// The reflection service.
    #[error("the protocol's own description does not read")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The driver.
    #[error(transparent)]
    Driver(#[from] driver::Failed),
    /// The driver, by a bug.
    #[error("the driver ended unexpectedly; what was answered is kept")]
    DriverGone,
}

/// Makes a fleet in a folder that has none.
///
/// # Errors
/// There is one, or the folder cannot be written.
pub fn init(data: &Path, sans: &[String]) -> Result<Marker, Error> {
    let folder = Folder::take(data)?;
    if let Some(marker) = folder.marker()? {
        return Err(folder::Error::Exists { folder: data.display().to_string(), fleet: marker.fleet }.into());
    }
    make_fleet(&folder, sans)
}

/// The marker comes last: what a crash left half made is made anew.
fn make_fleet(folder: &Folder, sans: &[String]) -> Result<Marker, Error> {
    Authority::create(&folder.path("pki"), sans)?;
    let file = folder.store_file();
    for left_over in [file.clone(), file.with_extension("db-wal"), file.with_extension("db-shm")] {
        match fs::remove_file(&left_over) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(folder::io_error("remove", &left_over)(error).into());
            }
            Ok(()) | Err(_) => {}
        }
    }
    drop(EmbeddedStore::create(&file)?);
    let marker = Marker { fleet: hex::encode(&random::<16>()), sans: sans.to_vec() };
    folder.mark(&marker)?;
    Ok(marker)
}

/// A coordinator that serves.
#[derive(Debug)]
pub struct Running {
    /// Where agents and operators dial.
    pub address: SocketAddr,
    /// The driver's front.
    pub handle: Handle,
    driver: oneshot::Receiver<Result<(), driver::Failed>>,
    stop: oneshot::Sender<()>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    _folder: Folder,
}

/// Opens the folder, restores the fleet and serves it.
///
/// # Errors
/// Anything that is not as it must be: nothing is served then.
pub async fn start(config: Config) -> Result<Running, Error> {
    let folder = Folder::take(&config.data)?;
    let marker = match folder.marker()? {
        Some(marker) => marker,
        None if config.init => make_fleet(&folder, &config.sans)?,
        None => return Err(folder::Error::Empty { folder: config.data.display().to_string() }.into()),
    };
    let mut store = folder.open_store()?;
    let reader: Arc<dyn Reader> = Arc::new(store.reader()?);
    let (image, last) = store.load()?;
    let fleet = Fleet::restore(image)?;
    let authority = Arc::new(Authority::open(&folder.path("pki"), &marker.sans)?);
    let blobs = Arc::new(Blobs::open(&folder.path("blobs"))?);
    let bodies = Arc::new(Bodies::new(reader.clone(), blobs.clone()));
    let (members, vitals, metrics) = (Arc::<Members>::default(), Arc::<Vitals>::default(), Arc::<Metrics>::default());
    let clock = Clock::after(last);

    let (tcp, address) = listen_tcp(config.listen).await?;
    let unix = listen_unix(&config.socket)?;
    let tls = TlsAcceptor::from(Arc::new(authority.server_config()?));
    let (hosts, host_orders) = mpsc::channel(HOST_ORDERS_MAX);
    let setup = Setup {
        fleet,
        store: Box::new(store),
        clock,
        members: members.clone(),
        vitals: vitals.clone(),
        bodies: bodies.clone(),
        metrics: metrics.clone(),
        hosts,
    };
    let (handle, driver) = driver::start(setup);
    let tokens = Tokens::new(reader.clone(), authority.fingerprint());
    let context = Arc::new(Context {
        handle: handle.clone(),
        reader,
        blobs,
        logs: Logs::new(&folder.path("logs")),
        bodies,
        members,
        vitals,
        tokens: tokens.clone(),
        authority,
        started: clock.now(),
    });
    set_policies(&handle, config.policies).await?;
    let coordinator = config.advertise.unwrap_or_else(|| address.to_string());
    let links = provider::Links { handle: handle.clone(), tokens, coordinator };
    tokio::spawn(provider::run(host_orders, links, config.local_provider));
    if let Some(http) = config.http {
        let (listener, address) = listen_tcp(http).await?;
        tracing::info!(%address, "health and metrics over http");
        tokio::spawn(http::serve(listener, handle.clone(), metrics));
    }
    let (stop, stopped) = oneshot::channel();
    let server = serve(context, listen::accept(tcp, tls, unix), stopped).await?;
    if let Some(file) = &config.port_file {
        write_durably(file, format!("{address}\n").as_bytes(), 0o644)?;
    }
    tracing::info!(%address, socket = %config.socket.display(), fleet = marker.fleet, "the coordinator serves");
    Ok(Running { address, handle, driver, stop, server, _folder: folder })
}

impl Running {
    /// Serves until `end` comes, then finishes what was begun. A failed commit ends it at once.
    ///
    /// # Errors
    /// The driver or the server failed.
    pub async fn until(mut self, end: impl Future<Output = ()>) -> Result<(), Error> {
        tokio::select! {
            failed = &mut self.driver => return failed.unwrap_or(Err(driver::Failed::Gone)).map_err(Error::from),
            ended = &mut self.server => {
                if let Ok(Err(error)) = ended {
                    return Err(Error::Serve(error));
                }
            }
            () = end => {}
        }
        // The server takes no new calls; the driver answers those that it has.
        let _ = self.stop.send(());
        self.handle.stop().await;
        let failed = (&mut self.driver).await.unwrap_or(Err(driver::Failed::Gone));
        let _ = tokio::time::timeout(STOP_PATIENCE, &mut self.server).await;
        self.server.abort();
        failed.map_err(Error::from)
    }
}

async fn set_policies(handle: &Handle, policies: Vec<PoolPolicy>) -> Result<(), Error> {
    for policy in policies {
        let name = policy.name.clone();
        let wanted = policy.clone();
        let known = handle.query(move |fleet, _| fleet.pool(&name).is_some_and(|pool| pool.policy == wanted)).await;
        // The same policy again is no change: a paused pool stays paused over a restart.
        if known.map_err(|_| Error::DriverGone)? {
            continue;
        }
        let set = |request| Event::SetPool { request, policy, actor: Actor("start".to_owned()) };
        handle.ask(set).await.map_err(|_| Error::DriverGone)?.map_err(Error::Policy)?;
    }
    Ok(())
}

async fn listen_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { address: address.to_string(), source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let actual = listener.local_addr().map_err(failed)?;
    Ok((listener, actual))
}

/// The folder's lock is ours, so a socket that is there is a dead coordinator's.
fn listen_unix(path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Listen { address: path.display().to_string(), source };
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Others may connect, and are told by their uid that they may not call.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(failed)?;
    Ok(listener)
}

type Serving = tokio::task::JoinHandle<Result<(), tonic::transport::Error>>;

async fn serve(
    context: Arc<Context>,
    incoming: listen::Incoming,
    stop: oneshot::Receiver<()>,
) -> Result<Serving, Error> {
    use tonic_reflection::server::Builder;
    const TONIC_HEALTH: &[u8] = tonic_health::pb::FILE_DESCRIPTOR_SET;
    let reflection = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(TONIC_HEALTH)
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<v1::jobs_server::JobsServer<Jobs>>().await;
    health.set_serving::<v1::agent_server::AgentServer<Agent>>().await;
    macro_rules! service {
        ($server:ty, $service:expr) => {
            <$server>::new($service)
                .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(limits::MESSAGE_BYTES_MAX)
        };
    }
    let router = Grpc::builder()
        .max_concurrent_streams(limits::HTTP2_STREAMS_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_header_list_size(16 << 10)
        .http2_max_pending_accept_reset_streams(Some(64))
        .layer(AuthLayer::new(context.members.clone()))
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(Error::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(Error::Reflection)?)
        .add_service(service!(v1::enrollment_server::EnrollmentServer<_>, Enrollment(context.clone())))
        .add_service(service!(v1::agent_server::AgentServer<_>, Agent(context.clone())))
        .add_service(service!(v1::jobs_server::JobsServer<_>, Jobs(context.clone())))
        .add_service(service!(v1::nodes_server::NodesServer<_>, Nodes(context.clone())))
        .add_service(service!(v1::pools_server::PoolsServer<_>, Pools(context.clone())))
        .add_service(service!(v1::fleet_server::FleetServer<_>, FleetService(context)));
    let incoming = ReceiverStream::new(incoming);
    let stop = async move {
        // Dropped without a word: the process is ending.
        let _ = stop.await;
    };
    Ok(tokio::spawn(router.serve_with_incoming_shutdown(incoming, stop)))
}
