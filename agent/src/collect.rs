//! Output files of an ended attempt: hashed, small ones inline, others stored
//! as blobs before the end is reported.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::OwnedFd,
};

use bytes::Bytes;
use muster_core::limits;
use muster_proto::v1;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{
    blob_cache::{ChannelWatch, FETCH_AGAIN, is_passing, wait_for_channel},
    spawner::protocol::Collected,
};

/// Attempts whose files are on their way from the spawner or to the coordinator at once; less than a spawner bears.
pub const COLLECTED_AT_ONCE_MAX: usize = 128;
/// Their files together: each is an open descriptor until it is stored.
pub const PATHS_AT_ONCE_MAX: usize = 2_000;

/// What the spawner handed out, in the order asked.
#[derive(Debug, Default)]
pub struct Found {
    files: Vec<(Vec<u8>, OwnedFd, u64)>,
    skipped: Vec<v1::SkippedOutput>,
}

/// What goes into the end's report.
#[derive(Debug, Default)]
pub struct Stored {
    /// Files that came back.
    pub outputs: Vec<v1::OutputFile>,
    /// Files that did not, each with why.
    pub skipped: Vec<v1::SkippedOutput>,
}

impl Found {
    /// Adds one packet of the spawner's answer.
    pub fn add(&mut self, files: Vec<(Vec<u8>, Collected)>, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        for (path, collected) in files {
            match (collected, &mut descriptors) {
                (Collected::File { length }, descriptors) => match descriptors.next() {
                    Some(descriptor) => self.files.push((path, descriptor, length)),
                    None => self.skip(path, "its descriptor did not come".into()),
                },
                (Collected::Skipped { reason }, _) => self.skip(path, reason),
            }
        }
    }

    /// The path is not taken.
    pub fn skip(&mut self, path: Vec<u8>, reason: String) {
        self.skipped.push(v1::SkippedOutput { path: path.into(), reason });
    }

    /// Stores all of it. Waits while there is no connection.
    pub async fn store(self, mut channels: ChannelWatch) -> Stored {
        let mut stored = Stored { outputs: Vec::new(), skipped: self.skipped };
        let mut inline_left = INLINE_BYTES_MAX;
        for (path, descriptor, length) in self.files {
            match store_one(descriptor.into(), length, &mut inline_left, &mut channels).await {
                Ok((content, digest)) => {
                    let content = Some(v1::FileContent { source: Some(content) });
                    stored.outputs.push(v1::OutputFile { path: path.into(), content, digest });
                }
                Err(reason) => stored.skipped.push(v1::SkippedOutput { path: path.into(), reason }),
            }
        }
        stored
    }
}

/// Inline files of one attempt together, so that its report stays a small message.
const INLINE_BYTES_MAX: u64 = 512 << 10;

async fn store_one(
    file: File,
    length: u64,
    inline_left: &mut u64,
    channels: &mut ChannelWatch,
) -> Result<(v1::file_content::Source, Bytes), String> {
    if length <= (limits::INLINE_FILE_BYTES_MAX as u64).min(*inline_left) {
        let mut data = Vec::new();
        file.take(length).read_to_end(&mut data).map_err(|error| format!("cannot be read: {error}"))?;
        *inline_left -= data.len() as u64;
        let digest = Bytes::copy_from_slice(&Sha256::digest(&data));
        return Ok((v1::file_content::Source::Inline(data.into()), digest));
    }
    // Hashing a large file must not delay heartbeats.
    let (file, digest, length) = tokio::task::spawn_blocking(move || hash(file, length))
        .await
        .expect("hashing does not panic")
        .map_err(|error| format!("cannot be read: {error}"))?;
    loop {
        let Some(channel) = wait_for_channel(channels).await else { return Err("the agent left".into()) };
        let copy = file.try_clone().map_err(|error| format!("cannot be read: {error}"))?;
        match upload(copy, length, digest.clone(), channel).await {
            Ok(()) => {
                let blob = v1::BlobRef { digest: digest.clone(), offset: 0, length };
                return Ok((v1::file_content::Source::Blob(blob), digest));
            }
            Err(status) if is_passing(&status) => tokio::time::sleep(FETCH_AGAIN).await,
            Err(status) => return Err(format!("the coordinator did not store it: {}", status.message())),
        }
    }
}

fn hash(mut file: File, length: u64) -> io::Result<(File, Bytes, u64)> {
    let mut hash = Sha256::new();
    let length = io::copy(&mut (&mut file).take(length), &mut hash)?;
    Ok((file, Bytes::copy_from_slice(&hash.finalize()), length))
}

async fn upload(file: File, length: u64, digest: Bytes, channel: tonic::transport::Channel) -> Result<(), Status> {
    let (sender, receiver) = mpsc::channel(2);
    let reading = tokio::task::spawn_blocking(move || send_chunks(file, length, digest, &sender));
    let answer = v1::agent_client::AgentClient::new(channel).store_blob(ReceiverStream::new(receiver)).await;
    reading.await.expect("reading does not panic").map_err(|error| Status::invalid_argument(error.to_string()))?;
    answer.map(drop)
}

fn send_chunks(mut file: File, length: u64, digest: Bytes, sender: &mpsc::Sender<v1::BlobChunk>) -> io::Result<()> {
    file.rewind()?;
    let mut left = file.take(length);
    let mut digest = Some(digest);
    loop {
        let mut data = Vec::with_capacity(limits::CHUNK_BYTES);
        let taken = (&mut left).take(limits::CHUNK_BYTES as u64).read_to_end(&mut data)?;
        let first = digest.take();
        if taken == 0 && first.is_none() {
            return Ok(());
        }
        let chunk = v1::BlobChunk { digest: first.unwrap_or_default(), data: data.into() };
        if sender.blocking_send(chunk).is_err() {
            // The answer on the other side says why.
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    async fn inline_of(content: &[u8], length: u64) -> (Vec<u8>, Bytes, u64) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        let (_, mut channels) = tokio::sync::watch::channel(None);
        let mut left = INLINE_BYTES_MAX;
        let (source, digest) = store_one(file, length, &mut left, &mut channels).await.unwrap();
        let v1::file_content::Source::Inline(data) = source else { panic!("it is small") };
        (data.to_vec(), digest, INLINE_BYTES_MAX - left)
    }

    #[tokio::test]
    async fn a_file_that_changes_after_it_was_opened_is_taken_up_to_its_length_then() {
        for (content, length, taken) in [(&b"grown since"[..], 5, &b"grown"[..]), (b"cut", 500, b"cut")] {
            let (data, digest, charged) = inline_of(content, length).await;
            assert_eq!((data.as_slice(), charged), (taken, taken.len() as u64));
            assert_eq!(digest, Bytes::copy_from_slice(&Sha256::digest(taken)), "of what was taken");
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"larger than it was").unwrap();
        file.rewind().unwrap();
        assert_eq!(hash(file, 6).unwrap().2, 6);
    }
}
