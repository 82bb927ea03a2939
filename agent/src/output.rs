//! A job's stdout and stderr: spliced from its pipes into spool files.
//!
//! A spool file is made at the first byte, so a silent job costs none. Its
//! length is the truth after a restart: a byte has left the pipe if and only
//! if it lies in the file. Past the job's limit bytes are dropped and the cut
//! is marked.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, AsRawFd, OwnedFd, RawFd},
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use muster_proto::v1;
use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Both streams of one attempt.
#[derive(Debug)]
pub struct Output {
    streams: [Spool; 2],
    limit: u64,
    /// Beside the spool files: made when bytes were cut.
    cut_mark: PathBuf,
    truncated: bool,
    /// Beside the spool files: made when bytes were lost.
    lost_mark: PathBuf,
    lost: bool,
}

/// One stream: its pipe, while it may bring more, and its spool file.
#[derive(Debug)]
struct Spool {
    pipe: Option<Rc<OwnedFd>>,
    path: PathBuf,
    file: Option<File>,
    length: u64,
    /// The coordinator has all bytes before this.
    stored: u64,
    /// Handed to the upload stream.
    sent: u64,
}

/// Which stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Which {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Both, in their order.
pub const BOTH: [Which; 2] = [Which::Stdout, Which::Stderr];

/// What one look at a pipe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes were moved or dropped; there may be more.
    Bytes,
    /// Nothing there now.
    Nothing,
    /// The last writer is gone.
    End,
}

impl Output {
    /// For an attempt that starts now: there are no spool files of this name.
    #[must_use]
    pub fn fresh(folder: &Path, name: &str, limit: u64) -> Self {
        let spool = |suffix| Spool::fresh(folder.join(format!("{name}.{suffix}")));
        let streams = [spool("out"), spool("err")];
        let (cut_mark, lost_mark) = marks(folder, name);
        Self { streams, limit, cut_mark, truncated: false, lost_mark, lost: false }
    }

    /// For an attempt of which an earlier agent may have left spool files.
    #[must_use]
    pub fn adopt(folder: &Path, name: &str, limit: u64) -> Self {
        let spool = |suffix| Spool::adopt(folder.join(format!("{name}.{suffix}")));
        let streams = [spool("out"), spool("err")];
        let (cut_mark, lost_mark) = marks(folder, name);
        let (truncated, lost) = (cut_mark.exists(), lost_mark.exists());
        Self { streams, limit, cut_mark, truncated, lost_mark, lost }
    }

    /// Takes over the read ends: stdout, then stderr.
    pub fn attach(&mut self, pipes: Vec<OwnedFd>) {
        for (spool, pipe) in self.streams.iter_mut().zip(pipes) {
            spool.pipe = Some(Rc::new(pipe));
        }
    }

    /// The pipe of a stream while it may bring more.
    #[must_use]
    pub fn pipe(&self, which: Which) -> Option<Rc<OwnedFd>> {
        self.spool(which).pipe.clone()
    }

    /// Moves what is in the pipe now, at most once the pipe's capacity.
    pub fn pull(&mut self, which: Which) -> Moved {
        let Some(pipe) = self.spool(which).pipe.clone() else { return Moved::End };
        let room = self.limit.saturating_sub(self.streams.iter().map(|spool| spool.length).sum());
        let moved =
            if room == 0 || self.lost { drop_bytes(&pipe) } else { self.spool_mut(which).take_from(&pipe, room) };
        match moved {
            Ok(0) => {
                self.spool_mut(which).pipe = None;
                Moved::End
            }
            Ok(_) => {
                if room == 0 && !self.truncated {
                    self.truncated = true;
                    // The mark outlives this agent; without it only the flag after a restart is wrong.
                    let _ = fs::write(&self.cut_mark, []);
                }
                Moved::Bytes
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Moved::Nothing,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Moved::Bytes,
            Err(error) => {
                // A job must not wait for ever on our full disk: its output is lost, and that is said.
                tracing::warn!(path = %self.spool(which).path.display(), %error, "output is lost: cannot spool it");
                self.lose();
                Moved::Bytes
            }
        }
    }

    /// Moves all that is left; called when nothing of the attempt runs any more,
    /// so whoever else holds a write end is not of this job and is not waited for.
    pub fn drain(&mut self) {
        for which in BOTH {
            while self.pull(which) == Moved::Bytes {}
            self.spool_mut(which).pipe = None;
        }
    }

    /// From here on nothing is kept: what follows a gap would look like one whole log.
    fn lose(&mut self) {
        self.lost = true;
        // The mark outlives this agent; on a full disk it may fail, and only the flag after a restart is wrong.
        let _ = fs::write(&self.lost_mark, []);
    }

    /// The spool cannot be read: what the coordinator does not have yet is lost, and nothing waits for it.
    pub fn give_up_unstored(&mut self) {
        self.lose();
        for spool in &mut self.streams {
            spool.length = spool.stored;
            spool.sent = spool.stored;
        }
    }

    /// Bytes were cut at the limit.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Bytes could not be kept.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        self.lost
    }

    /// Bytes that the coordinator has not acknowledged, of both streams.
    #[must_use]
    pub fn unstored(&self) -> u64 {
        self.streams.iter().map(|spool| spool.length - spool.stored).sum()
    }

    /// Bytes that were not handed to the upload yet, of both streams.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.streams.iter().map(|spool| spool.length - spool.sent).sum()
    }

    /// Bytes on their way.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.streams.iter().map(|spool| spool.sent.saturating_sub(spool.stored)).sum()
    }

    /// The next chunk for the upload; it counts as sent.
    ///
    /// # Errors
    /// The spool file cannot be read.
    pub fn next_chunk(&mut self, bytes_max: usize) -> io::Result<Option<(Which, u64, Vec<u8>)>> {
        for which in BOTH {
            let spool = self.spool_mut(which);
            if spool.sent < spool.length {
                let offset = spool.sent;
                let data = spool.read(offset, bytes_max)?;
                spool.sent += data.len() as u64;
                return Ok(Some((which, offset, data)));
            }
        }
        Ok(None)
    }

    /// The coordinator has all bytes of a stream before `offset`, and not more: its folder may have come from a backup
    /// since it said so of more, and then those go again.
    pub fn on_stored(&mut self, which: Which, offset: u64) {
        let spool = self.spool_mut(which);
        if offset < spool.stored {
            spool.sent = offset;
        }
        spool.stored = offset.min(spool.length);
        spool.sent = spool.sent.max(spool.stored);
    }

    /// The upload broke: what was not acknowledged goes again.
    pub fn rewind(&mut self) {
        for spool in &mut self.streams {
            spool.sent = spool.stored;
        }
    }

    /// All that is not stored, to travel inside the end's report.
    ///
    /// # Errors
    /// A spool file cannot be read.
    pub fn tails(&self) -> io::Result<Vec<v1::LogTail>> {
        let mut tails = Vec::new();
        for which in BOTH {
            let spool = self.spool(which);
            if spool.stored < spool.length {
                let length = usize::try_from(spool.length - spool.stored).unwrap_or(usize::MAX);
                let data = spool.read(spool.stored, length)?;
                tails.push(v1::LogTail { stream: which.wire().into(), offset: spool.stored, data: data.into() });
            }
        }
        Ok(tails)
    }

    /// Removes what is on the disk.
    pub fn remove(&self) {
        let spooled = self.streams.iter().filter(|spool| spool.file.is_some()).map(|spool| &spool.path);
        let marks = [(self.truncated, &self.cut_mark), (self.lost, &self.lost_mark)];
        for path in spooled.chain(marks.into_iter().filter_map(|(made, mark)| made.then_some(mark))) {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove a spool file");
            }
        }
    }

    const fn spool(&self, which: Which) -> &Spool {
        &self.streams[which as usize]
    }

    const fn spool_mut(&mut self, which: Which) -> &mut Spool {
        &mut self.streams[which as usize]
    }
}

/// Of which attempt a file of the spool folder is.
#[must_use]
pub fn key_of(file_name: &str) -> &str {
    let suffixes = [".out", ".err", ".cut", ".lost"];
    suffixes.iter().find_map(|suffix| file_name.strip_suffix(suffix)).unwrap_or(file_name)
}

/// The marks that bytes were cut, and lost.
fn marks(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    (folder.join(format!("{name}.cut")), folder.join(format!("{name}.lost")))
}

impl Spool {
    fn adopt(path: PathBuf) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(&path).ok();
        let length = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        Self { file, length, ..Self::fresh(path) }
    }

    const fn fresh(path: PathBuf) -> Self {
        Self { pipe: None, path, file: None, length: 0, stored: 0, sent: 0 }
    }

    /// Moves at most `room` bytes; `WouldBlock` if the pipe is empty, 0 at its end.
    fn take_from(&mut self, pipe: &OwnedFd, room: u64) -> io::Result<usize> {
        let file = match &mut self.file {
            Some(file) => file,
            None if !has_bytes(pipe)? => return Ok(0),
            none => none.insert(
                OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&self.path)?,
            ),
        };
        let mut offset = i64::try_from(self.length).unwrap_or(i64::MAX);
        let length = usize::try_from(room).unwrap_or(usize::MAX).min(PULL_BYTES_MAX);
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        let moved = match splice(pipe, None, &*file, Some(&mut offset), length, flags) {
            // Some file systems cannot splice.
            Err(Errno::EINVAL) => copy(pipe, file, self.length, length)?,
            other => other?,
        };
        self.length += moved as u64;
        Ok(moved)
    }

    fn read(&self, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.length - offset).unwrap_or(usize::MAX);
        let mut data = vec![0; left.min(bytes_max)];
        if let Some(file) = &self.file {
            file.read_exact_at(&mut data, offset)?;
        }
        Ok(data)
    }
}

impl Which {
    /// As on the wire.
    #[must_use]
    pub const fn wire(self) -> v1::Stream {
        match self {
            Self::Stdout => v1::Stream::Stdout,
            Self::Stderr => v1::Stream::Stderr,
        }
    }

    /// From the wire.
    #[must_use]
    pub fn from_wire(stream: i32) -> Option<Self> {
        match v1::Stream::try_from(stream).ok()? {
            v1::Stream::Unspecified => None,
            v1::Stream::Stdout => Some(Self::Stdout),
            v1::Stream::Stderr => Some(Self::Stderr),
        }
    }
}

/// A pipe that the reactor can watch while others hold it too.
#[derive(Debug)]
pub struct WatchedPipe(Rc<OwnedFd>);

impl WatchedPipe {
    /// Has the reactor watch for bytes and for the end.
    ///
    /// # Errors
    /// The kernel cannot watch it.
    pub fn watch(pipe: Rc<OwnedFd>) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor stays open and the same while the shared owner inside lives.
        Ok(unsafe { AsyncFd::register_with_interest(Self(pipe), Interest::READABLE) }?)
    }
}

impl AsRawFd for WatchedPipe {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// More than a pipe holds (/proc/sys/fs/pipe-max-size is 1 MiB).
const PULL_BYTES_MAX: usize = 1 << 20;

/// False at the pipe's end, `WouldBlock` while it is empty: so that no file is made for nothing.
fn has_bytes(pipe: &OwnedFd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO)?;
    let found = polled[0].revents().unwrap_or(PollFlags::empty());
    if found.contains(PollFlags::POLLIN) {
        Ok(true)
    } else if found.contains(PollFlags::POLLHUP) {
        Ok(false)
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

fn drop_bytes(pipe: &OwnedFd) -> io::Result<usize> {
    read_now(pipe, &mut [0; 64 << 10])
}

fn copy(pipe: &OwnedFd, file: &File, offset: u64, length: usize) -> io::Result<usize> {
    let mut buffer = vec![0; length.min(64 << 10)];
    let taken = read_now(pipe, &mut buffer)?;
    file.write_all_at(&buffer[..taken], offset)?;
    Ok(taken)
}

/// The pipe itself may block: its other holders share its flags, so look first.
fn read_now(pipe: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    if has_bytes(pipe)? { Ok(nix::unistd::read(pipe, buffer)?) } else { Ok(0) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn piped(folder: &Path, limit: u64) -> (Output, Vec<File>) {
        let mut output = Output::adopt(folder, "1.0.1.1", limit);
        let (ends, writers) = BOTH
            .map(|_| nix::unistd::pipe().map(|(read, write)| (read, File::from(write))).unwrap())
            .into_iter()
            .unzip();
        output.attach(ends);
        (output, writers)
    }

    #[test]
    fn a_silent_job_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, writers) = piped(folder.path(), 100);
        assert_eq!(output.pull(Which::Stdout), Moved::Nothing);
        drop(writers);
        output.drain();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(output.tails().unwrap().is_empty());
    }

    #[test]
    fn a_loss_is_known_after_a_restart_and_nothing_follows_the_gap() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, mut writers) = piped(folder.path(), 100);
        writers[0].write_all(b"before").unwrap();
        assert_eq!(output.pull(Which::Stdout), Moved::Bytes);
        assert_eq!(output.next_chunk(4).unwrap(), Some((Which::Stdout, 0, b"befo".to_vec())));
        output.on_stored(Which::Stdout, 4);
        output.give_up_unstored();
        assert!(output.is_lost());
        assert_eq!((output.unstored(), output.unsent()), (0, 0));
        writers[0].write_all(b"after").unwrap();
        output.drain();
        assert!(output.tails().unwrap().is_empty());
        let adopted = Output::adopt(folder.path(), "1.0.1.1", 100);
        assert!(adopted.is_lost());
        adopted.remove();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_restored_coordinator_no_longer_has_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, mut writers) = piped(folder.path(), 100);
        writers[0].write_all(b"one two three").unwrap();
        assert_eq!(output.pull(Which::Stdout), Moved::Bytes);
        assert_eq!(output.next_chunk(7).unwrap().map(|(_, offset, _)| offset), Some(0));
        output.on_stored(Which::Stdout, 7);
        assert_eq!(output.next_chunk(3).unwrap().map(|(_, offset, _)| offset), Some(7));
        output.on_stored(Which::Stdout, 4);
        assert_eq!(output.next_chunk(100).unwrap(), Some((Which::Stdout, 4, b"two three".to_vec())));
        // The answers to what was on its way before change nothing.
        output.on_stored(Which::Stdout, 4);
        assert_eq!((output.unsent(), output.in_flight(), output.unstored()), (0, 9, 9));
        output.on_stored(Which::Stdout, 13);
        assert_eq!(output.unstored(), 0);
    }

    #[test]
    fn bytes_are_kept_over_a_restart_and_counted_by_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, mut writers) = piped(folder.path(), 100);
        writers[0].write_all(b"hello ").unwrap();
        assert_eq!(output.pull(Which::Stdout), Moved::Bytes);
        writers[0].write_all(b"world").unwrap();
        let ends: Vec<OwnedFd> = BOTH.iter().map(|which| output.pipe(*which).unwrap().try_clone().unwrap()).collect();
        drop(output);
        let mut adopted = Output::adopt(folder.path(), "1.0.1.1", 100);
        adopted.attach(ends);
        drop(writers);
        adopted.drain();
        assert_eq!(&adopted.tails().unwrap()[0].data[..], b"hello world");
        adopted.remove();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn past_the_limit_bytes_are_dropped_and_the_cut_is_marked() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, mut writers) = piped(folder.path(), 10);
        writers[0].write_all(b"0123456").unwrap();
        output.drain_streams_for_test();
        writers[1].write_all(b"abcdef").unwrap();
        drop(writers);
        output.drain();
        assert!(output.is_truncated());
        assert_eq!(output.unstored(), 10);
        assert!(Output::adopt(folder.path(), "1.0.1.1", 10).is_truncated());
    }

    #[test]
    fn what_was_sent_and_not_acknowledged_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, mut writers) = piped(folder.path(), 100);
        writers[0].write_all(b"0123456789").unwrap();
        drop(writers);
        output.drain();
        assert_eq!(output.next_chunk(4).unwrap().unwrap().2, b"0123");
        assert_eq!(output.next_chunk(4).unwrap().unwrap().1, 4);
        output.on_stored(Which::Stdout, 4);
        output.rewind();
        assert_eq!(output.next_chunk(100).unwrap().unwrap(), (Which::Stdout, 4, b"456789".to_vec()));
        assert_eq!(&output.tails().unwrap()[0].data[..], b"456789");
    }

    impl Output {
        fn drain_streams_for_test(&mut self) {
            for which in BOTH {
                while self.pull(which) == Moved::Bytes {}
            }
        }
    }
}
