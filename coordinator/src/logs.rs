//! Output of attempts: `logs/<job>/<task>.<attempt>.<term>.<out|err>`.
//!
//! The term of the leader that placed it tells it from one whose number was given out before, by writes that a store
//! has lost since: what that one left is not a part of it. (An earlier release wrote no term; its files are read on.)
//!
//! Bytes come with their offset. What is there already is taken again in
//! silence (a repeat after a lost answer), a gap is refused, and nothing is
//! acknowledged before it is on the disk. All calls here block.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use muster_core::ids::{AttemptId, JobId, Term};
use muster_proto::v1::Stream;

/// Why output could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk is full.
    #[error("the coordinator's disk is full; the output stays on the host until there is room")]
    DiskFull,
    /// The system refused.
    #[error("cannot {doing} the output of {attempt}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Whose.
        attempt: AttemptId,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Logs {
    root: PathBuf,
}

/// Bytes at their offset.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Whose.
    pub attempt: AttemptId,
    /// Of the leader that placed it.
    pub term: Term,
    /// Which stream.
    pub stream: Stream,
    /// Of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
}

fn failed(doing: &'static str, attempt: AttemptId) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull,
        _other => Error::Io { doing, attempt, source },
    }
}

const fn suffix(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout | Stream::Unspecified => "out",
        Stream::Stderr => "err",
    }
}

impl Logs {
    /// The folder, which need not be there yet.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn folder(&self, job: JobId) -> PathBuf {
        self.root.join(job.to_string())
    }

    fn path(&self, attempt: AttemptId, term: Term, stream: Stream) -> PathBuf {
        let (task, number, suffix) = (attempt.task, attempt.number, suffix(stream));
        let folder = self.folder(attempt.job);
        let without_term = folder.join(format!("{task}.{number}.{suffix}"));
        if without_term.exists() { without_term } else { folder.join(format!("{task}.{number}.{}.{suffix}", term.0)) }
    }

    /// Writes chunks in order and syncs each file once. Answers, for each stream of a chunk, how many bytes are on the
    /// disk. A chunk that would leave a gap is left out: by the answer its host sees from where on to send.
    ///
    /// # Errors
    /// The system refuses; chunks before it may be kept.
    pub fn append(&self, chunks: &[Chunk]) -> Result<Vec<(AttemptId, Stream, u64)>, Error> {
        let mut open: Vec<(AttemptId, Stream, File, u64)> = Vec::new();
        for chunk in chunks {
            let at = match open.iter().position(|(id, stream, ..)| (*id, *stream) == (chunk.attempt, chunk.stream)) {
                Some(at) => at,
                None => {
                    let (file, length) = self.open_for_append(chunk)?;
                    open.push((chunk.attempt, chunk.stream, file, length));
                    open.len() - 1
                }
            };
            let (attempt, _, file, length) = &mut open[at];
            // Folders from a backup may be older than what their hosts were told is kept.
            let Some(known) = length.checked_sub(chunk.offset) else { continue };
            let fresh = chunk.data.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default();
            file.write_all_at(fresh, *length).map_err(failed("write", *attempt))?;
            *length += fresh.len() as u64;
        }
        open.into_iter()
            .map(|(attempt, stream, file, length)| {
                file.sync_data().map_err(failed("sync", attempt))?;
                Ok((attempt, stream, length))
            })
            .collect()
    }

    fn open_for_append(&self, chunk: &Chunk) -> Result<(File, u64), Error> {
        let attempt = chunk.attempt;
        let path = self.path(attempt, chunk.term, chunk.stream);
        let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let folder = self.folder(attempt.job);
                fs::create_dir_all(&folder)
                    .and_then(|()| File::open(&self.root)?.sync_all())
                    .and_then(|()| open())
                    .and_then(|file| File::open(&folder)?.sync_all().map(|()| file))
            }
            opened => opened,
        };
        let file = file.map_err(failed("open", attempt))?;
        let length = file.metadata().map_err(failed("look at", attempt))?.len();
        Ok((file, length))
    }

    /// Bytes from an offset on, at most `most`; empty at the end.
    ///
    /// # Errors
    /// The system refuses.
    pub fn read(
        &self,
        attempt: AttemptId,
        term: Term,
        stream: Stream,
        offset: u64,
        most: usize,
    ) -> Result<Bytes, Error> {
        let file = match File::open(self.path(attempt, term, stream)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Bytes::new()),
            opened => opened.map_err(failed("open", attempt))?,
        };
        let length = file.metadata().map_err(failed("look at", attempt))?.len();
        let there = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; there.min(most)];
        file.read_exact_at(&mut bytes, offset).map_err(failed("read", attempt))?;
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, data: &'static str) -> Chunk {
        let attempt = AttemptId { job: JobId(1024), task: 0, number: std::num::NonZeroU32::MIN };
        Chunk { attempt, term: Term(1), stream: Stream::Stdout, offset, data: Bytes::from_static(data.as_bytes()) }
    }

    #[test]
    fn a_repeat_is_taken_and_what_leaves_a_gap_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        let logs = Logs::new(root.path());
        let id = chunk(0, "").attempt;
        assert_eq!(logs.append(&[chunk(0, "one "), chunk(4, "two")]).unwrap(), [(id, Stream::Stdout, 7)]);
        assert_eq!(logs.append(&[chunk(4, "two"), chunk(2, "e two three")]).unwrap(), [(id, Stream::Stdout, 13)]);
        assert_eq!(logs.append(&[chunk(20, "x")]).unwrap(), [(id, Stream::Stdout, 13)]);
        assert_eq!(logs.read(id, Term(1), Stream::Stdout, 0, 100).unwrap().as_ref(), b"one two three");
        assert_eq!(logs.read(id, Term(1), Stream::Stdout, 8, 2).unwrap().as_ref(), b"th");
        assert!(logs.read(id, Term(1), Stream::Stderr, 0, 100).unwrap().is_empty());
    }

    /// A store that was restored from a backup gives the numbers of later jobs out again.
    #[test]
    fn what_an_attempt_of_a_lost_job_left_is_no_part_of_the_one_that_has_its_number() {
        let root = tempfile::tempdir().unwrap();
        let logs = Logs::new(root.path());
        let of = |term, data| Chunk { term: Term(term), ..chunk(0, data) };
        let id = chunk(0, "").attempt;
        logs.append(&[of(1, "lost, and longer")]).unwrap();
        assert_eq!(logs.append(&[of(2, "new")]).unwrap(), [(id, Stream::Stdout, 3)]);
        assert_eq!(logs.read(id, Term(2), Stream::Stdout, 0, 100).unwrap().as_ref(), b"new");
    }

    #[test]
    fn a_file_of_an_earlier_release_is_gone_on_with() {
        let root = tempfile::tempdir().unwrap();
        let logs = Logs::new(root.path());
        fs::create_dir(root.path().join("100")).unwrap();
        fs::write(root.path().join("100/0.1.out"), "one ").unwrap();
        let id = chunk(0, "").attempt;
        assert_eq!(logs.append(&[chunk(4, "two")]).unwrap(), [(id, Stream::Stdout, 7)]);
        assert_eq!(logs.read(id, Term(1), Stream::Stdout, 0, 100).unwrap().as_ref(), b"one two");
    }
}
