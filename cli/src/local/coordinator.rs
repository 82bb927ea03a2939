//! The run's coordinator as a child: started, awaited until it serves, and
//! started again at the same address when it dies.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{process::Child, sync::watch, time::sleep};

use super::{
    children::{self, Backoff},
    host::HostContext,
};

/// It serves by then, or it failed.
const SERVES_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks at its port file.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// It ends within this after SIGTERM or the pipe's end.
const LEAVES: Duration = Duration::from_secs(15);

/// How the coordinator of a run is started.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its data.
    pub data: PathBuf,
    /// The data goes with the run.
    pub ephemeral: bool,
    /// First start: where to listen. Later ones listen where the first did.
    pub listen: String,
    /// For health and metrics.
    pub http: Option<String>,
    /// Operators' socket.
    pub socket: PathBuf,
    /// Written when it serves.
    pub port_file: PathBuf,
    /// The provider's socket.
    pub provider: PathBuf,
    /// Policies to load.
    pub policies: Vec<PathBuf>,
}

impl Plan {
    fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = ["serve", "--init", "--listen", &self.listen].map(OsString::from).into();
        for (flag, path) in [
            ("--data", &self.data),
            ("--socket", &self.socket),
            ("--port-file", &self.port_file),
            ("--local-provider", &self.provider),
        ] {
            args.extend([OsString::from(flag), path.as_os_str().to_owned()]);
        }
        for policy in &self.policies {
            args.extend([OsString::from("--policy"), policy.as_os_str().to_owned()]);
        }
        if let Some(http) = &self.http {
            args.extend([OsString::from("--http"), http.into()]);
        }
        if self.ephemeral {
            args.push("--ephemeral".into());
        }
        args
    }

    async fn start(&self, context: &HostContext) -> Result<(Child, String), String> {
        drop(fs::remove_file(&self.port_file));
        let tail = || children::tail(&context.logs.join("coordinator.log"));
        let mut child = context
            .start("muster-coordinator", &self.args(), &[], "coordinator.log")
            .map_err(|error| format!("the coordinator cannot be started: {error}"))?;
        let serves = async {
            loop {
                match read_port(&self.port_file) {
                    Ok(address) => return address,
                    Err(_) => sleep(LOOK_AGAIN).await,
                }
            }
        };
        tokio::select! {
            address = serves => Ok((child, address)),
            ended = child.wait() => {
                Err(format!("the coordinator ended ({}): {}", children::words(&ended), tail()))
            }
            () = sleep(SERVES_WITHIN) => Err(format!("the coordinator does not serve: {}", tail())),
        }
    }
}

/// The port file has `HOST:PORT`, or only the port.
fn read_port(path: &Path) -> io::Result<String> {
    let text = fs::read_to_string(path)?;
    let text = text.trim();
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "no port yet");
    if text.is_empty() {
        return Err(missing());
    }
    Ok(if text.contains(':') { text.to_owned() } else { format!("127.0.0.1:{text}") })
}

/// A running coordinator.
#[derive(Debug)]
pub struct Coordinator {
    /// Where agents and operators reach it.
    pub address: String,
    keeper: tokio::task::JoinHandle<()>,
    /// Says why, when it was given up.
    pub given_up: watch::Receiver<Option<String>>,
    stop: watch::Sender<bool>,
}

impl Coordinator {
    /// Starts it and waits until it serves.
    pub async fn start(context: Arc<HostContext>, mut plan: Plan) -> Result<Self, String> {
        let (child, address) = plan.start(&context).await?;
        plan.listen.clone_from(&address);
        let (say_given_up, given_up) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        let keeper = tokio::spawn(async move {
            if let Err(why) = keep(&context, &plan, child, stopped).await {
                context.note(&why);
                drop(say_given_up.send(Some(why)));
            }
        });
        Ok(Self { address, keeper, given_up, stop })
    }

    /// SIGTERM, and waits for its end.
    pub async fn end(self) {
        let _already_ended = self.stop.send(true);
        // The keeper does not panic, and its end is all that is asked.
        drop(self.keeper.await);
    }
}

async fn keep(
    context: &HostContext,
    plan: &Plan,
    mut child: Child,
    mut stopped: watch::Receiver<bool>,
) -> Result<(), String> {
    let mut ending = context.ending.clone();
    let mut backoff = Backoff::new();
    loop {
        tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => break,
            _ = stopped.wait_for(|stopped| *stopped) => {
                children::terminate(&child);
                break;
            }
            ended = child.wait() => {
                context.note(&format!("the coordinator ended ({}); it is started again", children::words(&ended)));
            }
        }
        child = loop {
            let Some(wait) = backoff.after_failure() else {
                return Err(String::from("the coordinator ends again and again; it is given up"));
            };
            sleep(wait).await;
            if *ending.borrow() || *stopped.borrow() {
                return Ok(());
            }
            match plan.start(context).await {
                Ok((child, _)) => break child,
                Err(why) => context.note(&why),
            }
        };
        backoff.started();
    }
    drop(children::end_within(&mut child, LEAVES).await);
    Ok(())
}
