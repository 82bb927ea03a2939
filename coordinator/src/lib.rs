//! The coordinator: holds the fleet's state, decides by the core's rules,
//! persists, then acts.
//!
//! ```text
//! rpc, provider --events--> driver --rows--> store
//!      ^                      |
//!      +---- orders, replies -+   only after the commit
//! ```

mod blobs;
mod clock;
pub mod config;
mod driver;
mod folder;
mod founding;
mod hex;
mod http;
pub mod identity;
mod leadership;
mod listen;
mod logs;
mod orders;
mod parent;
pub mod person;
pub mod provider;
mod room;
mod rpc;
pub mod seal;
pub mod server;
mod shared;
mod starts;
mod store;
mod telemetry;
pub mod tokens;
pub mod upkeep;

use std::{ffi::OsString, process::ExitCode, time::Duration};

use config::{Admit, Cli, Command, Config, Init, Serve};
use identity::Authority;
use tokio::signal::unix::{SignalKind, signal};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const CONFLICT: u8 = 5;

/// Runs the coordinator's command line; `args[0]` is the program's name.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    let Cli { command } = match config::parse(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; clap knows which stream each belongs on.
            let _ = error.print();
            return if error.use_stderr() { USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match command {
        Command::Init(settings) => init(&settings),
        Command::Serve(settings) => serve(&settings),
        Command::Admit(settings) => admit(&settings),
    }
}

fn init(settings: &Init) -> ExitCode {
    match founding::init(settings) {
        Ok(marker) => {
            println!("made fleet {} in {}", marker.fleet, settings.data.display());
            ExitCode::SUCCESS
        }
        Err(error) => told(&error, code_of(&error)),
    }
}

fn admit(Admit { name, role, days, to, data }: &Admit) -> ExitCode {
    let life = Duration::from_secs(u64::from(*days) * 86_400);
    match Authority::admit(&data.join("pki"), to, name, *role, life) {
        Ok(()) => {
            let (folder, role) = (to.display(), role.name());
            println!("made {folder}/{name}.pem and {folder}/{name}.key: role {role}, for {days} days");
            ExitCode::SUCCESS
        }
        Err(error) => told(&error, if matches!(error, identity::Error::Exists { .. }) { CONFLICT } else { FAILED }),
    }
}

fn serve(settings: &Serve) -> ExitCode {
    let config = match Config::load(settings) {
        Ok(config) => config,
        Err(error) => return told(&error, USAGE),
    };
    telemetry::start_logging(config.log_format);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return told(&error, FAILED),
    };
    let code = runtime.block_on(run(settings, config));
    // Blocking reads of a follower that went away may still run; nobody waits for them.
    runtime.shutdown_background();
    code
}

async fn run(settings: &Serve, config: Config) -> ExitCode {
    let parent = match settings.parent_fd.map(parent::watch).transpose() {
        Ok(parent) => parent,
        Err(error) => return told(&error, USAGE),
    };
    let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(error), _) | (_, Err(error)) => return told(&error, FAILED),
    };
    let data = config.data.clone();
    let running = match server::start(config).await {
        Ok(running) => running,
        Err(error) => return told(&error, code_of(&error)),
    };
    // Not under systemd, nobody listens.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut orphaned = false;
    let end = async {
        let parent_ended = async {
            match parent {
                Some(parent) => parent.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = parent_ended => orphaned = true,
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    };
    let ended = running.until(end).await;
    if orphaned && settings.ephemeral {
        parent::remove_data(&data);
    }
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => told(&error, FAILED),
    }
}

fn code_of(error: &server::Error) -> u8 {
    match error {
        server::Error::Folder(folder::Error::InUse { .. } | folder::Error::Exists { .. }) => CONFLICT,
        server::Error::Policy(_)
        | server::Error::JoinNeedsStore
        | server::Error::NotShared
        | server::Error::OtherStore { .. } => USAGE,
        server::Error::Folder(_)
        | server::Error::Store(_)
        | server::Error::Damage(_)
        | server::Error::Identity(_)
        | server::Error::Blobs(_)
        | server::Error::Listen { .. }
        | server::Error::Serve(_)
        | server::Error::Reflection(_)
        | server::Error::Driver(_)
        | server::Error::Lost { .. }
        | server::Error::DriverGone => FAILED,
    }
}

/// Prints an error with all its causes, once.
fn told(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("muster-coordinator: {}", chain(error).trim_end());
    code.into()
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        sentence.push_str(&format!(": {deeper}"));
        cause = deeper.source();
    }
    sentence
}
