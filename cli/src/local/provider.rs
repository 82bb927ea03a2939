//! The local provider: the coordinator asks on a Unix socket, one JSON object
//! a line, for nodes to be made and ended. Every request may come twice.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use muster_coordinator::provider::local_lines::{Create, Op, Told};
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

/// The nodes of this machine.
#[derive(Clone, Debug)]
pub struct Hosts {
    shared: Arc<Mutex<BTreeMap<u64, watch::Sender<bool>>>>,
    words: broadcast::Sender<Told>,
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
                    match serde_json::from_slice::<Op>(&line) {
                        Ok(Op::Create(new)) => self.create(new),
                        Ok(Op::Delete { host }) => self.delete(host),
                        Ok(Op::List) => send(&mut write, &self.all()).await?,
                        Err(error) => {
                            self.context.note(&format!("the coordinator asked what is not understood: {error}"));
                        }
                    }
                    line.clear();
                }
            }
        }
    }

    fn all(&self) -> Told {
        Told::Hosts { hosts: self.lock().keys().copied().collect() }
    }

    fn create(&self, new: Create) {
        let host = new.host;
        let (stop, stopped) = watch::channel(false);
        {
            let mut hosts = self.lock();
            if hosts.contains_key(&host) {
                drop(self.words.send(Told::Created { host }));
                return;
            }
            hosts.insert(host, stop);
        }
        let hosts = self.clone();
        tokio::spawn(async move {
            let tell = |word| drop(hosts.words.send(word));
            let lived = host::live(&hosts.context, new, stopped, || tell(Told::Created { host })).await;
            hosts.lock().remove(&host);
            match lived {
                Ok(()) => tell(Told::Gone { host }),
                Err(reason) => {
                    hosts.context.note(&format!("host {host} failed: {reason}"));
                    tell(Told::Failed { host, reason });
                    tell(Told::Gone { host });
                }
            }
        });
    }

    fn delete(&self, host: u64) {
        match self.lock().get(&host) {
            Some(stop) => drop(stop.send(true)),
            None => drop(self.words.send(Told::Gone { host })),
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

async fn send(write: &mut (impl AsyncWriteExt + Unpin), word: &Told) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    write.write_all(&line).await
}
