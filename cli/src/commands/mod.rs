//! The operator's commands: one file a noun, one function a verb.

mod drain;
mod fleet;
mod job;
mod jobs;
mod logs;
mod node;
mod outputs;
mod pool;
mod replay;
mod run;
mod show;
mod simulate;
mod state;
mod submit;
mod watch;

pub use pool::check_policy;
pub use replay::Replay;
pub use show::hex;
pub use submit::{ask, attach_table, new_key};

use std::{
    io::{self, BufRead, IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use crate::{
    args::{Cli, Command, Global, Token},
    client::{Client, Server, TlsFiles},
    demo, doctor,
    exit::{Exit, Failure, Result},
    local,
    output::Output,
};

/// A request without `--timeout` gives up after this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs one command.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let mut output =
        Output::new(cli.global.output, cli.global.columns.clone(), cli.global.no_headers, cli.global.color);
    output.quiet = cli.global.quiet;
    output.verbose = cli.global.verbose;
    if let Command::Janitor(janitor) = &cli.command {
        return Ok(local::janitor::run(janitor));
    }
    // It clones children, which only a process with one thread may.
    if let Command::Doctor(doctor) = &cli.command {
        return doctor::run(&output, doctor);
    }
    // It asks no coordinator and has threads of its own.
    if let Command::Simulate(simulate) = &cli.command {
        return simulate::run(&output, simulate);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot start: {error}")).caused_by(error))?;
    let done = runtime.block_on(dispatch(cli, output));
    // A thread that waits in read(2) on stdin must not hold up the end.
    runtime.shutdown_background();
    done
}

async fn dispatch(cli: Cli, output: Output) -> Result<ExitCode> {
    let context = Context { output, global: cli.global };
    match cli.command {
        Command::Demo(demo) => demo::run(&context, demo).await,
        Command::Up(up) => local::up::run(&context, up).await,
        Command::Run(run) => run::run(&context, *run).await,
        Command::Job(job) => job::run(&context, job).await,
        Command::Node(node) => node::run(&context, node).await,
        Command::Drain(drains) => drain::run(&context, drains).await,
        Command::Pool(pool) => pool::run(&context, pool).await,
        Command::Token(Token::Create { valid, pool }) => fleet::create_token(&context, valid, pool).await,
        Command::State(state) => state::run(&context, state).await,
        Command::Status => fleet::status(&context).await,
        Command::Events(events) => fleet::events(&context, events).await,
        Command::Version => fleet::version(&context).await,
        Command::Janitor(_) | Command::Doctor(_) | Command::Simulate(_) => unreachable!("run() has taken this one"),
    }
}

/// What every command has.
#[derive(Debug)]
pub struct Context {
    /// How answers are shown.
    pub output: Output,
    /// Options of every command.
    pub global: Global,
}

impl Context {
    /// The connection that the options ask for.
    pub async fn connect(&self) -> Result<Client> {
        let server = match &self.global.server {
            Some(text) => Server::parse(text).map_err(Failure::usage)?,
            None => Server::find(),
        };
        let tls = TlsFiles {
            ca: self.global.ca.clone(),
            certificate: self.global.cert.clone(),
            key: self.global.cert_key.clone(),
        };
        Client::connect(server, &tls, self.global.timeout.unwrap_or(REQUEST_TIMEOUT)).await
    }

    /// Lists an effect and asks; not on a terminal, `-y` is required.
    pub fn confirm(&self, effect: &str) -> Result<()> {
        if self.global.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(Failure::usage(format!("{effect}; not on a terminal this needs -y")));
        }
        let mut stderr = io::stderr();
        write!(stderr, "{effect}. Go on? [y/N] ")?;
        stderr.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::new(Exit::Interrupted, "nothing was done")),
        }
    }

    /// A wait under `--timeout`; Ctrl-C ends it with the way back.
    pub async fn wait<T>(&self, what: &str, way_back: &str, wait: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = async {
            match self.global.timeout {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            done = wait => done,
            signal = tokio::signal::ctrl_c() => {
                drop(signal);
                Err(Failure::new(Exit::Interrupted, format!("detached; {what} goes on. {way_back}")))
            }
            () = limit => Err(Failure::new(Exit::TimedOut, format!("--timeout is over and {what} goes on. {way_back}"))),
        }
    }
}

/// All asked done, or some, or none.
pub fn partial(done: usize, refused: &[String], output: &Output) -> Result<ExitCode> {
    for sentence in refused {
        output.say(&format!("muster: {}", crate::escape::text(sentence)));
    }
    Ok(match (done, refused.is_empty()) {
        (_, true) => Exit::Ok,
        (0, false) if refused.iter().all(|sentence| sentence.starts_with("there is no node")) => Exit::NotFound,
        (0, false) => Exit::Conflict,
        (_, false) => Exit::Partial,
    }
    .into())
}
