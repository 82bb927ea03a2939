//! What runs on a host. The agent is the only part that speaks to the network
//! and holds no privilege; the spawner holds the privilege and is the parent
//! of all jobs; the init of each job is a clone of the spawner.
//!
//! The agent is one thread: [`supervisor`] carries out what the pure rules of
//! `muster_core::host` decide, and all else here is a part it uses.

pub mod blob_cache;
pub mod clock;
pub mod collect;
pub mod config;
pub mod connection;
pub mod descriptors;
pub mod footprint;
mod hex;
pub mod identity;
pub mod inputs;
pub mod interruption;
mod jitter;
pub mod job;
pub mod order;
pub mod output;
pub mod parent;
pub mod sandbox;
pub mod spawner;
pub mod spawner_link;
pub mod state;
pub mod supervisor;
pub mod tls;
pub mod uploads;
pub mod usage;

use std::{
    error::Error,
    ffi::OsString,
    fmt::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser as _;
use tokio::runtime::LocalOptions;

use config::{Command, CommandLine, Config, RunArgs};
use identity::{Identity, IdentityError};
use parent::Parent;
use state::StateFolder;
use supervisor::{Left, Supervisor};

/// The exit code that keeps a released agent down (`RestartPreventExitStatus=`).
pub const EXIT_RELEASED: u8 = 86;

/// The agent from its command line to its exit code.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    let line = match CommandLine::try_parse_from(args) {
        Ok(line) => line,
        Err(error) => {
            // Nobody to tell if even stderr is gone.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    start_log();
    let (args, only_join) = match &line.command {
        Command::Run(args) => (args, false),
        Command::Join(args) => (args, true),
    };
    match run(args, only_join) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("muster-agent: {}", chain(&*error));
            let usage = error.is::<config::ConfigError>();
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run(args: &RunArgs, only_join: bool) -> Result<u8, Box<dyn Error>> {
    let config = Config::resolve(args)?;
    let parent = Parent::adopt(args.parent_fd)?;
    if args.rejoin {
        state::clear_released(&config.state)?;
    } else if let Some((marker, sentence)) = state::released(&config.state) {
        eprintln!(
            "muster-agent: {sentence}; it stays down. `--rejoin`, or removing {}, lets it take work again",
            marker.display()
        );
        return Ok(EXIT_RELEASED);
    }
    descriptors::raise_limit();
    // One thread; a second one only while something large is hashed or synced.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .thread_keep_alive(Duration::from_secs(1))
        .build_local(LocalOptions::default())?;
    let folder = config.state.clone();
    let serving = async move {
        let state = StateFolder::open(&config.state)?;
        let identity = tokio::select! {
            identity = identity_of(&config) => identity?,
            () = parent.ended() => return Ok(Left::ParentEnded),
        };
        if only_join {
            println!("joined as node n{}", identity.certificate.node);
            return Ok(Left::Asked);
        }
        Ok::<_, Box<dyn Error>>(Supervisor::new(config, state, identity)?.run(&parent).await?)
    };
    // As a task: whatever wakes the future that a runtime itself blocks on costs a write to its own event descriptor.
    let left = runtime.block_on(async { tokio::task::spawn_local(serving).await })??;
    // A blocked disk must not keep a leaving agent.
    runtime.shutdown_timeout(Duration::from_millis(100));
    match left {
        Left::Asked => Ok(0),
        Left::ParentEnded => {
            if args.ephemeral {
                parent::remove_folder(&folder);
            }
            Ok(0)
        }
        Left::Released => Ok(EXIT_RELEASED),
    }
}

/// The stored identity, or a fresh one for the token.
async fn identity_of(config: &Config) -> Result<Identity, IdentityError> {
    let stored = Identity::load(&config.state)?;
    let token = match (stored, &config.token) {
        (Some(identity), Some(token)) if identity.certificate.has_ended() => {
            tracing::warn!("the stored certificate has ended; joining again with the token");
            token
        }
        (Some(identity), _) => return Ok(identity),
        (None, Some(token)) => token,
        (None, None) => return Err(IdentityError::NotJoined(config.state.clone())),
    };
    let begun = Instant::now();
    loop {
        match Identity::join(&config.state, &config.coordinators, token, &config.name).await {
            Ok(identity) => {
                tracing::info!(node = identity.certificate.node, name = config.name, "joined");
                return Ok(identity);
            }
            Err(error) if error.is_passing() && begun.elapsed() < JOIN_FOR => {
                tracing::warn!("{}; trying again", chain(&error));
                tokio::time::sleep(Duration::from_millis(500 + jitter::below(1_000))).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A coordinator that is not up by then is the service manager's to wait for.
const JOIN_FOR: Duration = Duration::from_secs(60);

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("MUSTER_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,h2=warn,hyper=warn,tower=warn,rustls=warn"));
    // A process that already logs (a test) keeps its own.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init();
}

/// An error with all its causes, in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
