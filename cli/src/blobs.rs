//! Bytes to and from the coordinator's blob store, always checked by digest.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use bytes::Bytes;
use muster_core::limits::CHUNK_BYTES;
use muster_proto::v1::{BlobChunk, BlobRef, FileContent, InputFile, file_content};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    client::Client,
    escape,
    exit::{Exit, Failure, Result},
    inputs::{Input, Source},
};

/// Small files are packed up to this.
pub const PACK_BYTES: usize = 8 << 20;
/// The inline files of one template stay below this.
const INLINE_BYTES_MAX: usize = 768 << 10;

/// Stores bytes.
pub async fn store_bytes(client: &Client, bytes: Bytes) -> Result<BlobRef> {
    let digest = Bytes::copy_from_slice(&Sha256::digest(&bytes));
    let length = bytes.len() as u64;
    let chunks: Vec<BlobChunk> = std::iter::once(BlobChunk { digest: digest.clone(), data: Bytes::new() })
        .chain(
            (0..bytes.len())
                .step_by(CHUNK_BYTES)
                .map(|at| BlobChunk { digest: Bytes::new(), data: bytes.slice(at..bytes.len().min(at + CHUNK_BYTES)) }),
        )
        .collect();
    client.jobs().store_blob(tokio_stream::iter(chunks)).await?;
    Ok(BlobRef { digest, offset: 0, length })
}

/// Stores an open file's content. It is read twice; a file that changes between is refused.
pub async fn store_file(client: &Client, file: File, path: &Path) -> Result<BlobRef> {
    let shown = path.to_path_buf();
    let hashing = tokio::task::spawn_blocking(move || {
        let mut file = file;
        let length = file.metadata()?.len();
        let mut hash = Sha256::new();
        let read = std::io::copy(&mut Read::by_ref(&mut file).take(length), &mut hash)?;
        file.seek(SeekFrom::Start(0))?;
        Ok::<_, std::io::Error>((file, read, Bytes::copy_from_slice(&hash.finalize())))
    });
    let (file, length, digest) = hashing
        .await
        .expect("hashing does not panic")
        .map_err(|error| Failure::file("send the input", &shown, error))?;

    let (sender, receiver) = mpsc::channel(4);
    let first = BlobChunk { digest: digest.clone(), data: Bytes::new() };
    let reading = tokio::task::spawn_blocking(move || send_chunks(file, length, first, &sender));
    let stored = client.jobs().store_blob(ReceiverStream::new(receiver)).await;
    let read = reading.await.expect("reading does not panic");
    read.map_err(|error| Failure::file("send the input", &shown, error))?;
    stored.map_err(|status| {
        let hint = format!(
            "the input {} was not stored ({}); if it changed while it was read, send it again",
            escape::path(&shown),
            escape::text(status.message())
        );
        Failure { sentence: hint, ..Failure::from(status) }
    })?;
    Ok(BlobRef { digest, offset: 0, length })
}

fn send_chunks(file: File, length: u64, first: BlobChunk, sender: &mpsc::Sender<BlobChunk>) -> std::io::Result<()> {
    let mut file = file.take(length);
    if sender.blocking_send(first).is_err() {
        return Ok(());
    }
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        (&mut file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        // A receiver that is gone has its own error to tell.
        if chunk.is_empty() || sender.blocking_send(BlobChunk { digest: Bytes::new(), data: chunk.into() }).is_err() {
            return Ok(());
        }
    }
}

/// All bytes of a blob or slice; refused if there are more than `limit`.
pub async fn fetch(client: &Client, blob: &BlobRef, sink: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> Result<()> {
    let mut chunks = client.jobs().fetch_blob(blob.clone()).await?.into_inner();
    let mut received = 0u64;
    while let Some(chunk) = chunks.message().await? {
        received += chunk.data.len() as u64;
        if received > blob.length {
            break;
        }
        sink(&chunk.data)?;
    }
    if received == blob.length {
        return Ok(());
    }
    Err(Failure::new(Exit::Failed, format!("a blob of {} bytes came with {received}", blob.length)))
}

/// Collects small files into blobs of [`PACK_BYTES`].
#[derive(Debug, Default)]
pub struct Packer {
    open: Vec<u8>,
    stored: Vec<BlobRef>,
}

/// A file's place in a pack.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pack: usize,
    offset: u64,
    length: u64,
}

impl Packer {
    /// Adds a file; a full pack is stored first.
    pub async fn add(&mut self, client: &Client, bytes: &[u8]) -> Result<Slot> {
        if !self.open.is_empty() && self.open.len() + bytes.len() > PACK_BYTES {
            self.flush(client).await?;
        }
        let slot = Slot { pack: self.stored.len(), offset: self.open.len() as u64, length: bytes.len() as u64 };
        self.open.extend_from_slice(bytes);
        Ok(slot)
    }

    /// Stores what is left; then [`Packer::content`] knows all slots.
    pub async fn flush(&mut self, client: &Client) -> Result<()> {
        let bytes = std::mem::take(&mut self.open);
        self.stored.push(store_bytes(client, bytes.into()).await?);
        Ok(())
    }

    /// A slot as it is named on the wire.
    pub fn content(&self, slot: Slot) -> FileContent {
        let pack = &self.stored[slot.pack];
        from_blob(BlobRef { digest: pack.digest.clone(), offset: slot.offset, length: slot.length })
    }
}

/// Content by reference.
pub const fn from_blob(blob: BlobRef) -> FileContent {
    FileContent { source: Some(file_content::Source::Blob(blob)) }
}

/// Content inside the message.
pub fn inline(bytes: impl Into<Bytes>) -> FileContent {
    FileContent { source: Some(file_content::Source::Inline(bytes.into())) }
}

/// Sends a job's inputs: inline while all small ones together stay small, else packed.
pub async fn send_inputs(client: &Client, inputs: Vec<Input>) -> Result<Vec<InputFile>> {
    let small: usize = inputs
        .iter()
        .map(|input| match &input.source {
            Source::Bytes(bytes) => bytes.len() + input.name.len() + 16,
            Source::File(..) => input.name.len() + 64,
        })
        .sum();
    let mut packer = (small > INLINE_BYTES_MAX).then(Packer::default);
    let mut slots = Vec::new();
    let mut files = Vec::with_capacity(inputs.len());
    for input in inputs {
        let content = match input.source {
            Source::File(file, path) => Some(from_blob(store_file(client, file, &path).await?)),
            Source::Bytes(bytes) => match &mut packer {
                None => Some(inline(bytes)),
                Some(packer) => {
                    slots.push((files.len(), packer.add(client, &bytes).await?));
                    None
                }
            },
        };
        files.push(InputFile { path: input.name.into(), content, executable: input.executable });
    }
    if let Some(mut packer) = packer {
        packer.flush(client).await?;
        for (at, slot) in slots {
            files[at].content = Some(packer.content(slot));
        }
    }
    Ok(files)
}
