//! Builds the parts and runs them until told to stop.

use std::{
    convert::Infallible,
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use muster_core::{
    denied::Denied,
    event::Event,
    fleet::{Damage, Fleet},
    ids::{Actor, Term},
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
use tonic::{body::Body, server::NamedService, service::Routes, transport::Server as Grpc};
use tower::{Layer as _, Service};

use crate::{
    blobs::{self, Blobs},
    chain,
    clock::Clock,
    config::Config,
    driver::{self, Handle, Setup},
    folder::{self, Folder, StoreKind, write_durably},
    founding::{Place, make_fleet},
    hex,
    http::{self as pages, Pages},
    identity::{self, Authority},
    leadership::{Leadership, Role},
    listen,
    logs::Logs,
    provider,
    room::Room,
    rpc::{
        Context, agent::Agent, auth::AuthLayer, door::Door, enrollment::Enrollment, fleet::FleetService, jobs::Jobs,
        nodes::Nodes, pools::Pools,
    },
    shared::{Members, Vitals},
    starts::Bodies,
    store::{
        self, Reader, Store,
        postgres::{self, Campaign, Candidate, PostgresReader, PostgresStore, Target},
    },
    telemetry::Metrics,
    tokens::{Tokens, random},
};

/// The health service's name for a coordinator that stands by.
const STANDBY: &str = "standby";
/// Orders of hosts that wait for the providers.
const HOST_ORDERS_MAX: usize = 4_096;
/// Open streams get this long to end when the coordinator stops.
const STOP_PATIENCE: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(10);
/// How often the server looks whether its certificate ends soon.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(86_400);

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
    /// This coordinator led, and leads no more.
    #[error("{reason}; this coordinator ends, and stands by when it is started again")]
    Lost {
        /// The sentence.
        reason: String,
    },
    /// `--join-from` without a store that can be shared.
    #[error("a further coordinator shares the fleet's data base: name it with --store postgres://...")]
    JoinNeedsStore,
    /// A data base, and blobs and logs in a folder of one coordinator alone.
    #[error(
        "with its state in PostgreSQL the fleet's blobs and logs must lie where every coordinator reaches them: \
         name such a folder with --shared (`shared` in the settings)"
    )]
    NotShared,
    /// The folder was made for another kind of store.
    #[error("this folder was made for {made_for}; start it with that, and move a fleet only by a backup")]
    OtherStore {
        /// The kind.
        made_for: StoreKind,
    },
    /// The driver, by a bug.
    #[error("the driver ended unexpectedly; what was answered is kept")]
    DriverGone,
}

/// A coordinator that serves, or stands by.
#[derive(Debug)]
pub struct Running {
    /// Where agents and operators dial.
    pub address: SocketAddr,
    part: Part,
    authority: Arc<Authority>,
    stop: oneshot::Sender<()>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    _folder: Folder,
}

/// What it does in its fleet.
#[derive(Debug)]
enum Part {
    Leads(Led),
    StandsBy(Box<Standby>),
}

/// The driver that works, and what it stands on.
#[derive(Debug)]
struct Led {
    handle: Handle,
    driver: oneshot::Receiver<Result<(), driver::Failed>>,
}

/// All that becomes a leader as soon as it may.
#[derive(Debug)]
struct Standby {
    campaign: Campaign,
    target: Target,
    shell: Shell,
}

/// What is there before anybody leads.
#[derive(Debug)]
struct Shell {
    config: Config,
    /// Of the data folder, or the one that several coordinators share.
    files: PathBuf,
    authority: Arc<Authority>,
    /// What hosts are told to dial.
    advertised: String,
    door: Door,
    health: tonic_health::server::HealthReporter,
    handle: Arc<OnceLock<Handle>>,
    metrics: Arc<Metrics>,
}

/// A store that may be led from.
struct Opened {
    store: Box<dyn Store>,
    reader: Arc<dyn Reader>,
    leadership: Leadership,
    term: Term,
}

/// Who may lead from it.
enum State {
    /// We alone.
    Ours(Opened),
    /// One of several.
    Shared(Target),
}

/// Opens the folder, and serves its fleet, or stands by where another coordinator does.
///
/// # Errors
/// Anything that is not as it must be: nothing is served then.
pub async fn start(config: Config) -> Result<Running, Error> {
    let folder = Folder::take(&config.data)?;
    let place = Place::new(config.store.as_deref(), config.store_ca.as_deref())?;
    let marker = match folder.marker()? {
        Some(marker) => marker,
        None if config.init => make_fleet(&folder, &place, &config.sans)?,
        None => return Err(folder::Error::Empty { folder: config.data.display().to_string() }.into()),
    };
    if marker.store != place.kind() {
        return Err(Error::OtherStore { made_for: marker.store });
    }
    let authority = Arc::new(Authority::open(&folder.path("pki"), &marker.sans)?);
    let files = match (&place, &config.shared) {
        (Place::Folder, None) => config.data.clone(),
        (Place::Folder | Place::Postgres(_), Some(shared)) => folder::take_shared(shared, &marker.fleet)?,
        (Place::Postgres(_), None) => return Err(Error::NotShared),
    };
    let state = match place {
        Place::Folder => State::Ours(open_file(&folder)?),
        Place::Postgres(target) => {
            postgres::prepare(&target, &marker.fleet, false)?;
            State::Shared(target)
        }
    };

    let (tcp, address) = listen_tcp(config.listen).await?;
    let unix = listen_unix(&config.socket)?;
    let tls = TlsAcceptor::from(Arc::new(authority.server_config()?));
    let (health, health_service) = tonic_health::server::health_reporter();
    let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
    let port_file = config.port_file.clone();
    let shell = Shell {
        files,
        authority: authority.clone(),
        advertised,
        door: Door::default(),
        health,
        handle: Arc::default(),
        metrics: Arc::default(),
        config,
    };
    shell.serve_pages().await?;
    let (stop, stopped) = oneshot::channel();
    let server = serve(shell.door.clone(), health_service, listen::accept(tcp, tls, unix), stopped);
    let part = match state {
        State::Ours(opened) => Part::Leads(shell.lead(opened).await?),
        State::Shared(target) => Part::StandsBy(Box::new(Standby::new(target, shell).await)),
    };
    if let Some(file) = port_file {
        write_durably(&file, format!("{address}\n").as_bytes(), 0o644)?;
    }
    tracing::info!(%address, fleet = marker.fleet, "the coordinator serves");
    Ok(Running { address, part, authority, stop, server, _folder: folder })
}

fn open_file(folder: &Folder) -> Result<Opened, Error> {
    let store = folder.open_store()?;
    let reader: Arc<dyn Reader> = Arc::new(store.reader()?);
    // As with the leadership row: a store that was restored from a backup gives no term twice.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    Ok(Opened {
        store: Box::new(store),
        reader,
        leadership: Leadership::alone(),
        term: Term(u64::try_from(time).unwrap_or(0)),
    })
}

impl Shell {
    /// What hosts of a provider are told to dial.
    fn dialled(&self) -> String {
        if self.config.coordinators.is_empty() { self.advertised.clone() } else { self.config.coordinators.join(",") }
    }

    async fn serve_pages(&self) -> Result<(), Error> {
        let Some(address) = self.config.http else { return Ok(()) };
        let (listener, address) = listen_tcp(address).await?;
        tracing::info!(%address, "health and metrics over http");
        let shown = Pages { door: self.door.clone(), handle: self.handle.clone(), metrics: self.metrics.clone() };
        tokio::spawn(pages::serve(listener, shown));
        Ok(())
    }

    /// Loads the fleet, starts to decide, and opens the door.
    async fn lead(&self, opened: Opened) -> Result<Led, Error> {
        let Opened { mut store, reader, leadership, term } = opened;
        let (image, last) = store.load()?;
        let commits = store.commits()?;
        let fleet = Fleet::restore(image)?;
        let blobs = Arc::new(Blobs::open(&self.files.join("blobs"))?);
        let bodies = Arc::new(Bodies::new(reader.clone(), blobs.clone()));
        let (members, vitals) = (Arc::<Members>::default(), Arc::<Vitals>::default());
        let clock = Clock::after(last);
        let (hosts, host_orders) = mpsc::channel(HOST_ORDERS_MAX);
        let setup = Setup {
            fleet,
            store,
            leadership: leadership.clone(),
            term,
            commits,
            seal: self.authority.seal().clone(),
            clock,
            members: members.clone(),
            vitals: vitals.clone(),
            bodies: bodies.clone(),
            metrics: self.metrics.clone(),
            hosts,
        };
        let (handle, driver) = driver::start(setup);
        let tokens = Tokens::new(reader.clone(), self.authority.fingerprint(), &self.config.coordinators);
        let context = Arc::new(Context {
            handle: handle.clone(),
            reader,
            blobs,
            logs: Logs::new(&self.files.join("logs")),
            room: Room::new(vec![self.config.data.clone(), self.files.clone()]),
            bodies,
            members: members.clone(),
            vitals,
            tokens: tokens.clone(),
            authority: self.authority.clone(),
            started: clock.now(),
        });
        set_policies(&handle, self.config.policies.clone()).await?;
        let links = provider::Links { handle: handle.clone(), tokens, coordinator: self.dialled(), leadership };
        let places = provider::Places {
            local_socket: self.config.local_provider.clone(),
            programs: self.config.providers.clone(),
            fingerprint: hex::encode(&self.authority.fingerprint()),
        };
        tokio::spawn(provider::run(host_orders, links, places));
        // Read by the pages alone; set once, as one process leads once.
        let _ = self.handle.set(handle.clone());
        self.door.open(AuthLayer::new(members).layer(services(&context)?));
        self.health.set_serving::<v1::jobs_server::JobsServer<Jobs>>().await;
        self.health.set_serving::<v1::agent_server::AgentServer<Agent>>().await;
        Ok(Led { handle, driver })
    }
}

impl Standby {
    async fn new(target: Target, shell: Shell) -> Self {
        shell.health.set_service_status(STANDBY, tonic_health::ServingStatus::Serving).await;
        let candidate = Candidate { holder: hex::encode(&random::<16>()), address: shell.advertised.clone() };
        Self { campaign: postgres::campaign(target.clone(), candidate), target, shell }
    }

    /// Until this coordinator leads and its driver works.
    async fn until_it_leads(&mut self) -> Result<Led, Error> {
        loop {
            let role = self.campaign.role.borrow_and_update().clone();
            match role {
                Role::Standby { leader } => self.shell.door.close(leader),
                Role::Leading { term } => return self.lead(term).await,
                Role::Lost { reason } => return Err(Error::Lost { reason }),
            }
            if self.campaign.role.changed().await.is_err() {
                return Err(Error::DriverGone);
            }
        }
    }

    async fn lead(&mut self, term: Term) -> Result<Led, Error> {
        self.shell.door.close(None);
        let (target, leadership) = (self.target.clone(), self.campaign.leadership.clone());
        let open = move || -> Result<Opened, store::Error> {
            let store = PostgresStore::open(&target, term, leadership.clone())?;
            let reader = Arc::new(PostgresReader::new(&target, term));
            Ok(Opened { store: Box::new(store), reader, leadership, term })
        };
        let opened = tokio::task::spawn_blocking(open).await.map_err(|_| Error::DriverGone)??;
        let led = self.shell.lead(opened).await?;
        self.shell.health.set_service_status(STANDBY, tonic_health::ServingStatus::NotServing).await;
        tracing::info!(term = term.0, "this coordinator leads");
        Ok(led)
    }

    /// Until the leadership is lost: why.
    async fn until_it_is_lost(&mut self) -> Error {
        let lost = self.campaign.role.wait_for(|role| matches!(role, Role::Lost { .. })).await;
        match lost.as_deref() {
            Ok(Role::Lost { reason }) => Error::Lost { reason: reason.clone() },
            Ok(Role::Standby { .. } | Role::Leading { .. }) | Err(_) => Error::DriverGone,
        }
    }
}

impl Led {
    async fn until_it_fails(&mut self) -> Result<(), Error> {
        (&mut self.driver).await.unwrap_or(Err(driver::Failed::Gone)).map_err(Error::from)
    }
}

impl Running {
    /// Serves until `end` comes, then finishes what was begun. A failed commit, or a lost leadership, ends it at once.
    ///
    /// # Errors
    /// The driver or the server failed, or another coordinator leads.
    pub async fn until(self, end: impl Future<Output = ()>) -> Result<(), Error> {
        let Self { part, authority, stop, mut server, _folder, .. } = self;
        let (mut led, mut standby) = match part {
            Part::Leads(led) => (Some(led), None),
            Part::StandsBy(standby) => (None, Some(standby)),
        };
        let works = async {
            if let (None, Some(standby)) = (&led, &mut standby) {
                led = Some(standby.until_it_leads().await?);
            }
            let Some(led) = &mut led else { return Err(Error::DriverGone) };
            match &mut standby {
                Some(standby) => tokio::select! {
                    failed = led.until_it_fails() => failed,
                    lost = standby.until_it_is_lost() => Err(lost),
                },
                None => led.until_it_fails().await,
            }
        };
        tokio::select! {
            failed = works => return failed,
            ended = &mut server => {
                if let Ok(Err(error)) = ended {
                    return Err(Error::Serve(error));
                }
            }
            () = keep_certificate(authority) => {}
            () = end => {}
        }
        // The server takes no new calls; the driver answers those that it has.
        let _ = stop.send(());
        let failed = match &mut led {
            Some(led) => {
                led.handle.stop().await;
                led.until_it_fails().await
            }
            None => Ok(()),
        };
        // Nothing of ours is under way in the store: another coordinator need not wait.
        if let Some(standby) = standby {
            let _ = tokio::task::spawn_blocking(move || standby.campaign.resign()).await;
        }
        let _ = tokio::time::timeout(STOP_PATIENCE, &mut server).await;
        server.abort();
        failed
    }
}

/// Renews the server's certificate in time, for as long as the coordinator runs.
async fn keep_certificate(authority: Arc<Authority>) {
    loop {
        tokio::time::sleep(CERTIFICATE_CHECK).await;
        let authority = authority.clone();
        match tokio::task::spawn_blocking(move || authority.renew_server()).await {
            Ok(Ok(true)) => tracing::info!("the server has a new certificate"),
            Ok(Ok(false)) => {}
            // Long before the old one ends; tried again at the next look.
            Ok(Err(error)) => tracing::error!("the server's certificate is not renewed: {}", chain(&error)),
            Err(error) => tracing::error!("the server's certificate is not renewed: {error}"),
        }
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
        let set = |request| Event::SetPool { request, policy: Box::new(policy), actor: Actor("start".to_owned()) };
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

/// The health check for everybody; the rest behind the door.
fn serve<H>(door: Door, health: H, incoming: listen::Incoming, stop: oneshot::Receiver<()>) -> Serving
where
    H: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    H::Future: Send + 'static,
{
    let router = Grpc::builder()
        .max_concurrent_streams(limits::HTTP2_STREAMS_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_header_list_size(16 << 10)
        .http2_max_pending_accept_reset_streams(Some(64))
        .layer(door)
        .add_service(health);
    let incoming = ReceiverStream::new(incoming);
    let stop = async move {
        // Dropped without a word: the process is ending.
        let _ = stop.await;
    };
    tokio::spawn(router.serve_with_incoming_shutdown(incoming, stop))
}

/// All services of a coordinator that leads.
fn services(context: &Arc<Context>) -> Result<Routes, Error> {
    use tonic_reflection::server::Builder;
    const TONIC_HEALTH: &[u8] = tonic_health::pb::FILE_DESCRIPTOR_SET;
    let reflection = || {
        Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(TONIC_HEALTH)
    };
    macro_rules! service {
        ($server:ty, $service:expr) => {
            <$server>::new($service)
                .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(limits::MESSAGE_BYTES_MAX)
        };
    }
    Ok(Routes::new(reflection().build_v1().map_err(Error::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(Error::Reflection)?)
        .add_service(service!(v1::enrollment_server::EnrollmentServer<_>, Enrollment(context.clone())))
        .add_service(service!(v1::agent_server::AgentServer<_>, Agent(context.clone())))
        .add_service(service!(v1::jobs_server::JobsServer<_>, Jobs(context.clone())))
        .add_service(service!(v1::nodes_server::NodesServer<_>, Nodes(context.clone())))
        .add_service(service!(v1::pools_server::PoolsServer<_>, Pools(context.clone())))
        .add_service(service!(v1::fleet_server::FleetServer<_>, FleetService(context.clone())))
        .prepare())
}
