//! The stream of log bytes to the coordinator, apart from the agent's stream
//! so that it never delays a lease. Opened at the first byte.

use std::time::Duration;

use muster_core::ids::AttemptId;
use muster_proto::{convert, v1};
use tokio::{sync::mpsc, task::AbortHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

use crate::output::Which;

/// Bytes in one chunk; this much goes at once, less after a quiet moment.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Less than a chunk waits this long for more.
pub const QUIET: Duration = Duration::from_millis(200);
/// Bytes on their way at once, of all attempts.
pub const WINDOW_BYTES: u64 = 1 << 20;
/// Before a broken upload stream is opened again.
pub const AGAIN: Duration = Duration::from_secs(1);
const CHUNKS_WAITING_MAX: usize = 4;

/// What the stream tells the agent's loop.
#[derive(Debug)]
pub enum UploadNotice {
    /// The coordinator has all bytes before the offset.
    Stored {
        /// The attempt.
        attempt: AttemptId,
        /// Its stream.
        which: Which,
        /// All before this.
        offset: u64,
    },
    /// The stream broke.
    Broken(Box<Status>),
}

/// An open stream.
pub struct Upload {
    chunks: mpsc::Sender<v1::LogChunk>,
    task: AbortHandle,
}

impl Upload {
    /// Opens the stream; `tell` gets its notices until it is dropped.
    pub fn open<F>(channel: Channel, tell: impl Fn(UploadNotice) -> F + 'static) -> Self
    where
        F: Future<Output = ()>,
    {
        let (chunks, receiver) = mpsc::channel(CHUNKS_WAITING_MAX);
        let task = tokio::task::spawn_local(async move {
            let status =
                run(channel, receiver, &tell).await.err().unwrap_or_else(|| Status::unavailable("it was closed"));
            tell(UploadNotice::Broken(Box::new(status))).await;
        });
        Self { chunks, task: task.abort_handle() }
    }

    /// There is room for one more chunk.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.chunks.capacity() > 0
    }

    /// Hands a chunk over; call it only if there is room.
    pub fn send(&self, attempt: AttemptId, which: Which, offset: u64, data: Vec<u8>) {
        let chunk =
            v1::LogChunk { attempt: Some(attempt.into()), stream: which.wire().into(), offset, data: data.into() };
        // A stream that broke this moment says so by a notice, and all goes again.
        let _ = self.chunks.try_send(chunk);
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run<F>(
    channel: Channel,
    chunks: mpsc::Receiver<v1::LogChunk>,
    tell: &impl Fn(UploadNotice) -> F,
) -> Result<(), Status>
where
    F: Future<Output = ()>,
{
    let mut client = v1::agent_client::AgentClient::new(channel);
    let mut acks = client.upload_logs(ReceiverStream::new(chunks)).await?.into_inner();
    while let Some(ack) = acks.message().await? {
        let attempt = convert::attempt_id(ack.attempt.as_ref());
        if let (Ok(attempt), Some(which)) = (attempt, Which::from_wire(ack.stream)) {
            tell(UploadNotice::Stored { attempt, which, offset: ack.offset }).await;
        }
    }
    Ok(())
}
