//! Connections: TLS over TCP and the local Unix socket, as one stream of
//! accepted peers, each with who it is. What is no TLS is closed quietly.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use muster_core::limits;
use nix::unistd::Uid;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use crate::{
    identity::{self, Caller},
    person::Role,
};

/// Handshakes under way at once: a storm of reconnects waits its turn in the kernel's queue.
const HANDSHAKES_MAX: usize = 256;
/// Accepted connections that wait for the server.
const ACCEPTED_MAX: usize = 64;
/// Failed handshakes are told at most this often.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    caller: Arc<Caller>,
}

#[derive(Debug)]
enum Stream {
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

impl Connected for Connection {
    type ConnectInfo = Arc<Caller>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Tls(stream) => stream.is_write_vectored(),
            Stream::Unix(stream) => stream.is_write_vectored(),
        }
    }
}

/// What the server takes connections from.
pub type Incoming = mpsc::Receiver<io::Result<Connection>>;

/// Accepts on both listeners until the receiver is dropped.
#[must_use]
pub fn accept(tcp: TcpListener, tls: TlsAcceptor, unix: UnixListener) -> Incoming {
    let (accepted, incoming) = mpsc::channel(ACCEPTED_MAX);
    tokio::spawn(accept_tcp(tcp, tls, accepted.clone()));
    tokio::spawn(accept_unix(unix, accepted));
    incoming
}

async fn accept_tcp(listener: TcpListener, tls: TlsAcceptor, accepted: mpsc::Sender<io::Result<Connection>>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let failures = Arc::new(Failures::default());
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let next = tokio::select! {
            next = listener.accept() => next,
            () = accepted.closed() => return,
        };
        let (stream, peer) = match next {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, most likely: others must end first.
                failures.tell(&error.to_string(), None);
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (tls, accepted, failures) = (tls.clone(), accepted.clone(), failures.clone());
        tokio::spawn(async move {
            let handshake =
                tokio::time::timeout(Duration::from_millis(limits::HANDSHAKE_TIMEOUT.0), shake(stream, &tls));
            let failure = match handshake.await {
                Ok(Ok(connection)) => {
                    drop(place);
                    // The server is stopping.
                    let _ = accepted.send(Ok(connection)).await;
                    return;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no handshake in time".to_owned(),
            };
            failures.tell(&failure, Some(peer));
        });
    }
}

async fn shake(stream: TcpStream, tls: &TlsAcceptor) -> io::Result<Connection> {
    // Orders are small and must not wait for more to come.
    stream.set_nodelay(true)?;
    let stream = tls.accept(stream).await?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let caller = leaf.map_or(Caller::Nobody, identity::caller);
    Ok(Connection { stream: Stream::Tls(Box::new(stream)), caller: Arc::new(caller) })
}

async fn accept_unix(listener: UnixListener, accepted: mpsc::Sender<io::Result<Connection>>) {
    loop {
        let next = tokio::select! {
            next = listener.accept() => next,
            () = accepted.closed() => return,
        };
        let Ok((stream, _)) = next else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(peer) = stream.peer_cred() else { continue };
        let caller = local_caller(peer.uid());
        let connection = Connection { stream: Stream::Unix(stream), caller: Arc::new(caller) };
        if accepted.send(Ok(connection)).await.is_err() {
            return;
        }
    }
}

/// Root and our own user may do everything: they can read the CA's key as well.
fn local_caller(uid: u32) -> Caller {
    if uid == 0 || uid == Uid::effective().as_raw() {
        Caller::Person { name: format!("uid:{uid}"), role: Role::Admin }
    } else {
        Caller::Stranger { uid }
    }
}

/// Port scanners and misconfigured clients fill no log.
struct Failures {
    since: Instant,
    told_ms: AtomicU64,
    untold: AtomicU64,
}

impl Default for Failures {
    fn default() -> Self {
        Self { since: Instant::now(), told_ms: AtomicU64::new(0), untold: AtomicU64::new(0) }
    }
}

impl Failures {
    fn tell(&self, failure: &str, peer: Option<SocketAddr>) {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let told = self.told_ms.load(Ordering::Relaxed);
        let due = told == 0 || now.saturating_sub(told) >= u64::try_from(TELL_EVERY.as_millis()).unwrap_or(u64::MAX);
        if !due || self.told_ms.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            self.untold.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let untold = self.untold.swap(0, Ordering::Relaxed);
        let peer = peer.map_or_else(String::new, |peer| peer.to_string());
        tracing::warn!(peer, untold, "a connection was closed before it began: {failure}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_user_on_this_machine_is_a_stranger() {
        assert!(matches!(local_caller(0), Caller::Person { role: Role::Admin, .. }));
        let other = Uid::effective().as_raw() + 12_345;
        assert_eq!(local_caller(other), Caller::Stranger { uid: other });
    }
}
