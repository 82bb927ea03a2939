//! Content-addressed bytes in and out: the same for operators and agents.

use std::{os::unix::fs::FileExt as _, sync::Arc};

use bytes::Bytes;
use muster_core::limits;
use muster_proto::{convert, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::{Answers, Context, blocking, status};
use crate::blobs::Digest;

/// Between two looks at the room that is left.
const ROOM_EVERY: usize = 16 << 20;

/// Chunks read ahead of a slow receiver.
const AHEAD: usize = 4;

pub(super) async fn store(
    context: &Arc<Context>,
    mut chunks: Streaming<v1::BlobChunk>,
) -> Result<Response<v1::BlobRef>, Status> {
    context.room.check().await.map_err(status::no_room)?;
    let Some(first) = chunks.message().await? else { return Err(Status::invalid_argument("a blob has a first chunk")) };
    let announced = match first.digest.len() {
        0 => None,
        _some => Some(
            Digest::try_from(first.digest.as_ref())
                .map_err(|_| Status::invalid_argument("digest: is a SHA-256 of 32 bytes"))?,
        ),
    };
    let blobs = context.blobs.clone();
    let mut incoming = blocking(move || blobs.begin(announced).map_err(status::blob)).await?;
    let mut data = first.data;
    let mut unlooked = 0;
    loop {
        unlooked += data.len();
        if unlooked >= ROOM_EVERY {
            // What is under way has to be stored, too: a blob may be larger than the disk.
            context.room.check().await.map_err(status::no_room)?;
            unlooked = 0;
        }
        incoming = blocking(move || incoming.write(&data).map(|()| incoming).map_err(status::blob)).await?;
        match chunks.message().await? {
            Some(chunk) => data = chunk.data,
            None => break,
        }
    }
    let blobs = context.blobs.clone();
    let (digest, length) = blocking(move || blobs.finish(incoming).map_err(status::blob)).await?;
    Ok(Response::new(v1::BlobRef { digest: digest.to_vec().into(), offset: 0, length }))
}

/// A slice of a blob; length 0: to its end.
pub(super) async fn fetch(
    context: &Arc<Context>,
    reference: v1::BlobRef,
) -> Result<Response<Answers<v1::BlobChunk>>, Status> {
    let (digest, offset, length) = convert::blob("blob", &reference).map_err(status::rejected)?;
    let blobs = context.blobs.clone();
    let (file, end) = blocking(move || {
        let whole = blobs.length(&digest).map_err(status::blob)?;
        let length = if length == 0 { whole.saturating_sub(offset) } else { length };
        blobs.check(&digest, offset, length).map_err(status::blob)?;
        Ok((blobs.file(&digest).map_err(status::blob)?, offset + length))
    })
    .await?;
    let (out, answers) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut at = offset;
        while at < end {
            let size = usize::try_from(end - at).unwrap_or(usize::MAX).min(limits::CHUNK_BYTES);
            let mut data = vec![0; size];
            let chunk = file
                .read_exact_at(&mut data, at)
                .map(|()| v1::BlobChunk { digest: Bytes::new(), data: data.into() })
                .map_err(|source| status::blob(crate::blobs::Error::Io { doing: "read", source }));
            let failed = chunk.is_err();
            // The receiver went away, or has been told why it gets no more.
            if out.blocking_send(chunk).is_err() || failed {
                return;
            }
            at += size as u64;
        }
    });
    Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
}
