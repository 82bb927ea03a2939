//! Checks every result by other means than the task's: the sum that
//! `sha256sum` printed against a library's, and the bytes that `gzip` made by
//! decompressing them. What is compared is what was sent.

use std::{collections::BTreeMap, io::Read};

use flate2::read::MultiGzDecoder;
use futures_util::{StreamExt, stream};
use muster_proto::v1::{ListTasksRequest, LogsRequest, OutputFile, Stream, Task, file_content};
use sha2::{Digest, Sha256};

use super::work::Sent;
use crate::{blobs, client::Client, commands, escape, exit::Result};

/// The file that comes back.
pub const OUTPUT: &str = "out.gz";
/// Tasks asked for at once: their small outputs come inside the answer.
const TASKS_PAGE: u32 = 64;
/// Results checked at once.
const AT_ONCE: usize = 16;
/// A larger one is unpacked on a thread of its own.
const UNPACKED_HERE_MAX: u64 = 256 << 10;

/// What the checks found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Results that are right.
    pub verified: u64,
    /// Those that are not, each with its sentence.
    pub wrong: Vec<String>,
    /// Tasks that each node ended well, from the store.
    pub nodes: BTreeMap<String, u64>,
}

/// Checks all tasks of the job.
pub async fn all(client: &Client, job: u64, files: &[Sent], mut each: impl FnMut(u64)) -> Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut next = 0;
    loop {
        let request = ListTasksRequest { job, first: next, limit: TASKS_PAGE };
        let page = client.jobs().list_tasks(client.ask(request)).await?.into_inner();
        for task in &page.tasks {
            if let Some(last) = task.attempts.last() {
                *verdict.nodes.entry(last.node_name.clone()).or_default() += 1;
            }
            next = task.index + 1;
        }
        let checks = page.tasks.iter().map(|task| async move {
            let file = files.get(task.index as usize);
            (task.index, file, check(client, job, task, file).await)
        });
        let mut checks = stream::iter(checks).buffer_unordered(AT_ONCE);
        while let Some((index, file, checked)) = checks.next().await {
            match checked {
                Ok(()) => verdict.verified += 1,
                Err(why) => {
                    let name = file.map(|file| escape::path(&file.path)).unwrap_or_default();
                    verdict.wrong.push(format!("task {index} ({name}): {why}"));
                }
            }
            each(verdict.verified);
        }
        if !page.more || page.tasks.is_empty() {
            return Ok(verdict);
        }
    }
}

async fn check(client: &Client, job: u64, task: &Task, file: Option<&Sent>) -> std::result::Result<(), String> {
    let file = file.ok_or("there is no such file")?;
    if task.state != "succeeded" {
        return Err(format!("it ended as {} ({})", escape::text(&task.state), escape::text(&task.reason)));
    }
    let last = task.attempts.last().ok_or("it has no attempt on record")?;
    let output = last.outputs.iter().find(|output| output.path == OUTPUT.as_bytes());
    let output = output.ok_or_else(|| match last.skipped_outputs.first() {
        Some(skipped) => format!("{OUTPUT} did not come back: {}", escape::text(&skipped.reason)),
        None => format!("{OUTPUT} did not come back"),
    })?;
    check_sum(client, job, task.index, file).await?;
    check_output(client, output, file).await
}

/// What `sha256sum` printed is the sum of what was sent.
async fn check_sum(client: &Client, job: u64, task: u32, file: &Sent) -> std::result::Result<(), String> {
    let words = |status: tonic::Status| format!("its log did not come: {}", escape::text(status.message()));
    let request = LogsRequest { job, task, attempt: 0, follow: false };
    let mut pieces = client.jobs().logs(client.ask(request)).await.map_err(words)?.into_inner();
    let (mut printed, mut complaints) = (Vec::new(), Vec::new());
    while let Some(piece) = pieces.message().await.map_err(words)? {
        let to = if piece.stream() == Stream::Stderr { &mut complaints } else { &mut printed };
        to.extend_from_slice(&piece.data);
    }
    if !complaints.is_empty() {
        return Err(format!("it complained: {}", escape::bytes(&complaints)));
    }
    let expected = format!("{}  -\n", commands::hex(&file.sha256));
    if printed == expected.as_bytes() {
        return Ok(());
    }
    Err(format!("sha256sum printed `{}`, not {}", escape::bytes(&printed), expected.trim_end()))
}

/// What came back unpacks to what was sent.
async fn check_output(client: &Client, output: &OutputFile, file: &Sent) -> std::result::Result<(), String> {
    let packed = match output.content.as_ref().and_then(|content| content.source.as_ref()) {
        Some(file_content::Source::Inline(bytes)) => bytes.to_vec(),
        Some(file_content::Source::Blob(blob)) => {
            let mut bytes = Vec::new();
            let mut sink = |chunk: &[u8]| {
                bytes.extend_from_slice(chunk);
                Ok(())
            };
            blobs::fetch(client, blob, &mut sink).await.map_err(|failure| failure.sentence)?;
            bytes
        }
        None => return Err(format!("{OUTPUT} has no content")),
    };
    let (length, sha256) = (file.bytes, file.sha256);
    if length <= UNPACKED_HERE_MAX {
        return unpacks_to(&packed, length, sha256);
    }
    let unpacking = tokio::task::spawn_blocking(move || unpacks_to(&packed, length, sha256));
    unpacking.await.map_err(|error| error.to_string())?
}

fn unpacks_to(packed: &[u8], length: u64, sha256: [u8; 32]) -> std::result::Result<(), String> {
    let mut hash = Sha256::new();
    // One byte more than expected is enough to know that it is wrong.
    let mut unpacked = MultiGzDecoder::new(packed).take(length + 1);
    let read = std::io::copy(&mut unpacked, &mut hash).map_err(|error| format!("{OUTPUT} does not unpack: {error}"))?;
    if read == length && hash.finalize()[..] == sha256 {
        return Ok(());
    }
    Err(format!("{OUTPUT} unpacks to {read} bytes that are not the {length} that were sent"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_the_very_bytes_verify() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        gzip.write_all(b"abc").unwrap();
        let packed = gzip.finish().unwrap();
        let sum = |bytes: &[u8]| Sha256::digest(bytes).into();
        unpacks_to(&packed, 3, sum(b"abc")).unwrap();
        assert!(unpacks_to(&packed, 2, sum(b"ab")).is_err());
        assert!(unpacks_to(&packed, 3, sum(b"abd")).is_err());
        assert!(unpacks_to(b"no gzip", 3, sum(b"abc")).is_err());
    }
}
