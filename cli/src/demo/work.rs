//! The demo's work: every regular file below a folder is one task's input. A
//! file is read once; what was read is hashed here and is what is sent, so a
//! file that changes meanwhile changes nothing.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use muster_proto::v1::{FileContent, InputFile, TaskParameters, TaskTable};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::{
    blobs::{self, PACK_BYTES, Packer, Slot},
    client::Client,
    exit::{Exit, Failure, Result},
    inputs::{self, Found, Skipped},
};

/// The input's name inside the sandbox; the real name is only data.
pub const INPUT: &str = "input";
/// A larger file is copied aside, not held in memory.
const HELD_BYTES_MAX: u64 = PACK_BYTES as u64 / 2;
/// Files read ahead of what is being sent.
const READ_AHEAD: usize = 4;
/// One read.
const BUFFER_BYTES: usize = 128 << 10;

/// A file as it was sent.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Its path here.
    pub path: PathBuf,
    /// Of what was sent.
    pub sha256: [u8; 32],
    /// Of what was sent.
    pub bytes: u64,
}

/// All the work, sent and ready to be submitted.
#[derive(Debug, Default)]
pub struct Work {
    /// In task order.
    pub files: Vec<Sent>,
    /// Left out, by name.
    pub skipped: Vec<Skipped>,
    /// What differs between the tasks.
    pub table: TaskTable,
}

/// Where the work is.
#[derive(Clone, Debug)]
pub struct Source {
    /// The folder.
    pub folder: PathBuf,
    /// Leave out `target` and `.git`.
    pub only_sources: bool,
    /// The run's own folder, which is no work.
    pub run: PathBuf,
    /// No more than this is read of a file: it was the largest when the nodes were made.
    pub largest: u64,
}

impl Source {
    fn enters(&self, folder: &Path) -> bool {
        let build = self.only_sources && folder.file_name().is_some_and(|name| name == "target" || name == ".git");
        !build && folder != self.run
    }
}

/// Size of the largest file.
pub fn largest(source: &Source) -> u64 {
    let found = inputs::walk(&source.folder, &|folder| source.enters(folder));
    let sizes = found.iter().filter_map(|found| match found {
        Found::File(path) => path.symlink_metadata().ok().map(|metadata| metadata.len()),
        Found::Skipped(_) => None,
    });
    sizes.max().unwrap_or(0)
}

enum Content {
    Held(Vec<u8>),
    Aside(File),
}

enum Read1 {
    File(Sent, Content),
    Skipped(Skipped),
}

/// Reads all files and sends them.
pub async fn send(client: &Client, source: Source) -> Result<Work> {
    let (sender, mut receiver) = mpsc::channel(READ_AHEAD);
    let reading = tokio::task::spawn_blocking(move || read_all(&source, &sender));
    let mut work = Work::default();
    let mut packer = Packer::default();
    let mut places: Vec<std::result::Result<Slot, FileContent>> = Vec::new();
    while let Some(next) = receiver.recv().await {
        match next {
            Read1::Skipped(skipped) => work.skipped.push(skipped),
            Read1::File(sent, content) => {
                places.push(match content {
                    Content::Held(bytes) => Ok(packer.add(client, &bytes).await?),
                    Content::Aside(file) => Err(blobs::from_blob(blobs::store_file(client, file, &sent.path).await?)),
                });
                work.files.push(sent);
            }
        }
    }
    reading.await.map_err(|error| Failure::new(Exit::Failed, format!("reading the files failed: {error}")))?;
    if !work.files.is_empty() {
        packer.flush(client).await?;
    }
    work.table.tasks = places
        .into_iter()
        .map(|place| {
            let content = place.map_or_else(|content| content, |slot| packer.content(slot));
            let input = InputFile { path: INPUT.into(), content: Some(content), executable: false };
            TaskParameters { item: None, inputs: vec![input] }
        })
        .collect();
    Ok(work)
}

fn read_all(source: &Source, sender: &mpsc::Sender<Read1>) {
    for found in inputs::walk(&source.folder, &|folder| source.enters(folder)) {
        let next = match found {
            Found::Skipped(skipped) => Read1::Skipped(skipped),
            Found::File(path) => match read_one(&path, source) {
                Ok((sent, content)) => Read1::File(sent, content),
                Err(reason) => Read1::Skipped(Skipped { path, reason }),
            },
        };
        if sender.blocking_send(next).is_err() {
            return;
        }
    }
}

fn read_one(path: &Path, source: &Source) -> std::result::Result<(Sent, Content), String> {
    let file = inputs::open_regular(path)?;
    let words = |error: io::Error| error.to_string();
    let length = file.metadata().map_err(words)?.len().min(source.largest);
    // What is appended from now on is not part of it: a log that grows for ever still ends here.
    let mut file = file.take(length);
    if length <= HELD_BYTES_MAX {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(words)?;
        let sha256 = Sha256::digest(&bytes).into();
        let sent = Sent { path: path.to_path_buf(), sha256, bytes: bytes.len() as u64 };
        return Ok((sent, Content::Held(bytes)));
    }
    let mut copy = tempfile::tempfile_in(&source.run).map_err(words)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer).map_err(words)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        copy.write_all(&buffer[..read]).map_err(words)?;
        bytes += read as u64;
    }
    copy.seek(SeekFrom::Start(0)).map_err(words)?;
    Ok((Sent { path: path.to_path_buf(), sha256: hash.finalize().into(), bytes }, Content::Aside(copy)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn what_is_read_is_what_is_hashed() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source {
            folder: folder.path().into(),
            only_sources: false,
            run: folder.path().into(),
            largest: PACK_BYTES as u64,
        };
        let small = folder.path().join(std::ffi::OsString::from_vec(b"a\n\xff b".to_vec()));
        std::fs::write(&small, b"abc").unwrap();
        let (sent, content) = read_one(&small, &source).unwrap();
        assert_eq!(crate::commands::hex(&sent.sha256)[..8], *"ba7816bf");
        assert!(matches!(content, Content::Held(bytes) if bytes == b"abc"));

        let large = folder.path().join("large");
        std::fs::write(&large, vec![1; PACK_BYTES]).unwrap();
        let (sent, content) = read_one(&large, &source).unwrap();
        assert_eq!(sent.bytes, PACK_BYTES as u64);
        assert!(matches!(content, Content::Aside(_)));
    }

    #[test]
    fn build_results_are_left_out_only_where_it_was_not_asked() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["target", ".git", "src"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("f"), name).unwrap();
        }
        for (only_sources, expected) in [(true, 1), (false, 3)] {
            let source = Source { folder: folder.path().into(), only_sources, run: "/nowhere".into(), largest: 9 };
            let (sender, mut receiver) = mpsc::channel(16);
            read_all(&source, &sender);
            drop(sender);
            let mut files = 0;
            while receiver.blocking_recv().is_some() {
                files += 1;
            }
            assert_eq!(files, expected);
        }
    }
}
