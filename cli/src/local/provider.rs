//! The local provider: the coordinator asks on a Unix socket, one JSON object
//! a line, for nodes to be made and ended. Every request may come twice.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{broadcast, watch},
};

use super::host::{self, HostContext};

/// A line is never longer.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// Words waiting for a coordinator that does not read; what is lost is found again by `list`.
const WORDS_MAX: usize = 1_024;

/// From the coordinator.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Ask {
    /// Make a node. Idempotent by `host`.
    Create(NewHost),
    /// End it. Idempotent.
    Delete {
        /// The request that made it.
        host: u64,
    },
    /// Answered by `hosts`.
    List,
}

/// A node to make.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct NewHost {
    /// The stored request's number.
    pub host: u64,
    /// Its pool.
    #[serde(default)]
    pub pool: String,
    /// Its name.
    pub name: String,
    /// Its slice of this machine.
    pub cpu_milli: u64,
    /// Its slice of this machine.
    pub memory_bytes: u64,
    /// Its slice of this machine.
    pub disk_bytes: u64,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// With which it joins.
    pub token: String,
    /// Where it joins.
    pub coordinator: String,
}

/// To the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Tell {
    /// Its processes run.
    Created {
        /// The request.
        host: u64,
    },
    /// It could not be made.
    Failed {
        /// The request.
        host: u64,
        /// The sentence.
        reason: String,
    },
    /// Nothing of it is left.
    Gone {
        /// The request.
        host: u64,
    },
    /// All that there are.
    Hosts {
        /// Their requests.
        hosts: Vec<u64>,
    },
}

/// The nodes of this machine.
#[derive(Clone, Debug)]
pub struct Hosts {
    shared: Arc<Mutex<BTreeMap<u64, watch::Sender<bool>>>>,
    words: broadcast::Sender<Tell>,
    context: Arc<HostContext>,
}

impl Hosts {
    /// None yet.
    pub fn new(context: Arc<HostContext>) -> Self {
        Self { shared: Arc::default(), words: broadcast::channel(WORDS_MAX).0, context }
    }

    /// Serves the coordinator until the socket breaks.
    pub fn serve(&self, socket: &Path) -> io::Result<()> {
        let listener = UnixListener::bind(socket)?;
        let hosts = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let hosts = hosts.clone();
                // A coordinator that was killed leaves a stream behind; its successor has its own.
                tokio::spawn(async move { hosts.converse(stream).await });
            }
        });
        Ok(())
    }

    async fn converse(&self, stream: UnixStream) -> io::Result<()> {
        if stream.peer_cred()?.uid() != nix::unistd::geteuid().as_raw() {
            return Ok(());
        }
        let mut words = self.words.subscribe();
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut line = Vec::new();
        loop {
            tokio::select! {
                word = words.recv() => match word {
                    Ok(word) => send(&mut write, &word).await?,
                    // Some words were lost: the whole list says the same.
                    Err(broadcast::error::RecvError::Lagged(_)) => send(&mut write, &self.all()).await?,
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
                read = read_line(&mut read, &mut line) => {
                    if read? == 0 {
                        return Ok(());
                    }
                    match serde_json::from_slice::<Ask>(&line) {
                        Ok(Ask::Create(new)) => self.create(new),
                        Ok(Ask::Delete { host }) => self.delete(host),
                        Ok(Ask::List) => send(&mut write, &self.all()).await?,
                        Err(error) => {
                            self.context.note(&format!("the coordinator asked what is not understood: {error}"));
                        }
                    }
                    line.clear();
                }
            }
        }
    }

    fn all(&self) -> Tell {
        Tell::Hosts { hosts: self.lock().keys().copied().collect() }
    }

    fn create(&self, new: NewHost) {
        let host = new.host;
        let (stop, stopped) = watch::channel(false);
        {
            let mut hosts = self.lock();
            if hosts.contains_key(&host) {
                drop(self.words.send(Tell::Created { host }));
                return;
            }
            hosts.insert(host, stop);
        }
        let hosts = self.clone();
        tokio::spawn(async move {
            let tell = |word| drop(hosts.words.send(word));
            let lived = host::live(&hosts.context, new, stopped, || tell(Tell::Created { host })).await;
            hosts.lock().remove(&host);
            match lived {
                Ok(()) => tell(Tell::Gone { host }),
                Err(reason) => {
                    hosts.context.note(&format!("host {host} failed: {reason}"));
                    tell(Tell::Failed { host, reason });
                    tell(Tell::Gone { host });
                }
            }
        });
    }

    fn delete(&self, host: u64) {
        match self.lock().get(&host) {
            Some(stop) => drop(stop.send(true)),
            None => drop(self.words.send(Tell::Gone { host })),
        }
    }

    /// No host is left.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, watch::Sender<bool>>> {
        self.shared.lock().expect("nobody panics with this lock")
    }
}

async fn read_line(read: &mut (impl AsyncBufReadExt + Unpin), line: &mut Vec<u8>) -> io::Result<usize> {
    // Cancel-safe: what was read stays in `line` until the line is whole.
    let mut limited = tokio::io::AsyncReadExt::take(read, LINE_BYTES_MAX);
    let read = limited.read_until(b'\n', line).await?;
    if line.len() as u64 >= LINE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
    }
    Ok(read)
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), word: &Tell) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    write.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_words_are_as_the_coordinator_has_them() {
        let line = r#"{"op":"create","host":7,"pool":"local","name":"local-7","cpu_milli":500,"memory_bytes":1,
            "disk_bytes":2,"labels":{},"token":"t","coordinator":"127.0.0.1:1"}"#;
        let Ask::Create(new) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        assert_eq!((new.host, new.name.as_str(), new.cpu_milli), (7, "local-7", 500));
        assert_eq!(serde_json::from_str::<Ask>(r#"{"op":"delete","host":7}"#).unwrap(), Ask::Delete { host: 7 });
        assert_eq!(serde_json::from_str::<Ask>(r#"{"op":"list"}"#).unwrap(), Ask::List);
        let gone = serde_json::to_string(&Tell::Gone { host: 7 }).unwrap();
        assert_eq!(gone, r#"{"event":"gone","host":7}"#);
        let hosts = serde_json::to_string(&Tell::Hosts { hosts: vec![7, 8] }).unwrap();
        assert_eq!(hosts, r#"{"event":"hosts","hosts":[7,8]}"#);
    }
}
