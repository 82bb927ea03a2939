//! What a job reads at its start, as descriptors for the spawner: small files
//! packed into one memfd, blobs as slices of cached files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::OwnedFd,
    path::Path,
    rc::Rc,
};

use muster_proto::{convert, v1};
use nix::{
    errno::Errno,
    sys::memfd::{MFdFlags, memfd_create},
};

use crate::{
    blob_cache::{BlobCache, BlobError, ChannelWatch, Digest},
    spawner::protocol::Input,
};

/// All that goes beside a start.
#[derive(Debug, Default)]
pub struct Inputs {
    /// To be copied into the working folder.
    pub files: Vec<Input>,
    /// Which descriptor becomes stdin.
    pub stdin: Option<u8>,
    /// What the numbers mean.
    pub descriptors: Vec<Rc<OwnedFd>>,
}

/// The inputs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// The order makes no sense.
    #[error("an input of the order makes no sense")]
    Wrong(#[from] convert::Rejected),
    /// A file without content.
    #[error("an input of the order has no content")]
    Empty,
    /// A blob cannot be had.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// They cannot be packed.
    #[error("cannot pack the inputs")]
    Pack(#[source] io::Error),
}

impl InputError {
    /// The step of the start: `inputs` is the job's own fault, `fetch` speaks against this host.
    #[must_use]
    pub const fn step(&self) -> &'static str {
        match self {
            Self::Wrong(_) | Self::Empty | Self::Blob(BlobError::Refused { .. } | BlobError::Leaving) => "inputs",
            Self::Blob(BlobError::Mismatch(_) | BlobError::Disk { .. }) | Self::Pack(_) => "fetch",
        }
    }

    /// For the record of the failed start.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Wrong(_) | Self::Empty => Errno::EINVAL,
            Self::Blob(BlobError::Refused { .. }) => Errno::ENOENT,
            Self::Blob(BlobError::Mismatch(_)) => Errno::EBADMSG,
            Self::Blob(BlobError::Leaving) => Errno::ECANCELED,
            Self::Blob(BlobError::Disk { source, .. }) | Self::Pack(source) => {
                source.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
            }
        }
    }
}

/// Does the order need anything fetched first?
#[must_use]
pub fn need_blobs(body: &v1::JobBody, start: &v1::StartAttempt) -> bool {
    contents(body, start).any(|content| matches!(content.source, Some(v1::file_content::Source::Blob(_))))
}

/// Fetches what is missing, then packs.
///
/// # Errors
/// Something cannot be had.
pub async fn fetch_and_pack(
    body: &v1::JobBody,
    start: &v1::StartAttempt,
    cache: &BlobCache,
    channels: &mut ChannelWatch,
) -> Result<Inputs, InputError> {
    let mut blobs = BTreeMap::new();
    for content in contents(body, start) {
        if let Some(v1::file_content::Source::Blob(blob)) = &content.source {
            let (digest, _, _) = convert::blob("input", blob)?;
            if let std::collections::btree_map::Entry::Vacant(vacant) = blobs.entry(digest) {
                vacant.insert(Rc::new(cache.get(digest, channels).await?));
            }
        }
    }
    pack(body, start, &blobs)
}

/// Packs what is all there: call it with no blobs if none are needed.
///
/// # Errors
/// The order makes no sense, or there is no memory.
pub fn pack(
    body: &v1::JobBody,
    start: &v1::StartAttempt,
    blobs: &BTreeMap<Digest, Rc<File>>,
) -> Result<Inputs, InputError> {
    let mut packer = Packer { inputs: Inputs::default(), small: None, blobs, numbers: BTreeMap::new() };
    if let Some(content) = &body.stdin {
        packer.add_stdin(content)?;
    }
    for file in files_of(body, start) {
        packer.add_file(file)?;
    }
    packer.finish()
}

/// A file of the attempt's own takes the place of one that all tasks share.
fn files_of<'a>(body: &'a v1::JobBody, start: &'a v1::StartAttempt) -> impl Iterator<Item = &'a v1::InputFile> {
    let own: BTreeSet<&[u8]> = start.inputs.iter().map(|file| file.path.as_ref()).collect();
    body.inputs.iter().filter(move |file| !own.contains(file.path.as_ref())).chain(&start.inputs)
}

fn contents<'a>(body: &'a v1::JobBody, start: &'a v1::StartAttempt) -> impl Iterator<Item = &'a v1::FileContent> {
    let files = files_of(body, start).filter_map(|file| file.content.as_ref());
    body.stdin.iter().chain(files)
}

struct Packer<'a> {
    inputs: Inputs,
    /// Number and length of the pack of small files.
    small: Option<(u8, File, u64)>,
    blobs: &'a BTreeMap<Digest, Rc<File>>,
    numbers: BTreeMap<Digest, u8>,
}

/// More distinct blobs than this are copied into the pack: a packet carries few descriptors.
const BLOB_DESCRIPTORS_MAX: usize = 128;

impl Packer<'_> {
    /// A stream from its first byte on: a slice of its own.
    fn add_stdin(&mut self, content: &v1::FileContent) -> Result<(), InputError> {
        let mut file = memfd().map_err(InputError::Pack)?;
        match content.source.as_ref().ok_or(InputError::Empty)? {
            v1::file_content::Source::Inline(data) => file.write_all(data).map_err(InputError::Pack)?,
            v1::file_content::Source::Blob(blob) => {
                let (digest, offset, length) = convert::blob("stdin", blob)?;
                let source = self.blobs.get(&digest).ok_or(InputError::Empty)?;
                let whole = source.metadata().map_err(InputError::Pack)?.len();
                if offset == 0 && length == whole {
                    // A file of its own for the job, so that no other job moves its position.
                    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&**source));
                    file = File::open(Path::new(&path)).map_err(InputError::Pack)?;
                } else {
                    copy_slice(source, offset, length, &mut file).map_err(InputError::Pack)?;
                }
            }
        }
        file.rewind().map_err(InputError::Pack)?;
        self.inputs.stdin = Some(self.add_descriptor(file));
        Ok(())
    }

    fn add_file(&mut self, file: &v1::InputFile) -> Result<(), InputError> {
        let content = file.content.as_ref().and_then(|content| content.source.as_ref()).ok_or(InputError::Empty)?;
        let (descriptor, offset, length) = match content {
            v1::file_content::Source::Inline(data) => {
                self.append(data.len() as u64, |pack| pack.write_all(data)).map_err(InputError::Pack)?
            }
            v1::file_content::Source::Blob(blob) => {
                let (digest, offset, length) = convert::blob("input", blob)?;
                self.add_blob(digest, offset, length)?
            }
        };
        let (path, executable) = (file.path.to_vec(), file.executable);
        self.inputs.files.push(Input { path, descriptor, offset, length, executable });
        Ok(())
    }

    fn add_blob(&mut self, digest: Digest, offset: u64, length: u64) -> Result<(u8, u64, u64), InputError> {
        if let Some(number) = self.numbers.get(&digest) {
            return Ok((*number, offset, length));
        }
        let source = Rc::clone(self.blobs.get(&digest).ok_or(InputError::Empty)?);
        if self.numbers.len() < BLOB_DESCRIPTORS_MAX {
            let number = self.add_descriptor(source.try_clone().map_err(InputError::Pack)?);
            self.numbers.insert(digest, number);
            return Ok((number, offset, length));
        }
        self.append(length, |pack| copy_slice(&source, offset, length, pack)).map_err(InputError::Pack)
    }

    fn append(&mut self, length: u64, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<(u8, u64, u64)> {
        let (number, mut file, end) = match self.small.take() {
            Some(small) => small,
            None => {
                let file = memfd()?;
                (self.add_descriptor(file.try_clone()?), file, 0)
            }
        };
        write(&mut file)?;
        self.small = Some((number, file, end + length));
        Ok((number, end, length))
    }

    fn add_descriptor(&mut self, file: File) -> u8 {
        let number = self.inputs.descriptors.len();
        self.inputs.descriptors.push(Rc::new(file.into()));
        u8::try_from(number).expect("at most BLOB_DESCRIPTORS_MAX and two more")
    }

    fn finish(self) -> Result<Inputs, InputError> {
        Ok(self.inputs)
    }
}

fn memfd() -> io::Result<File> {
    Ok(memfd_create("muster-inputs", MFdFlags::MFD_CLOEXEC)?.into())
}

fn copy_slice(source: &File, offset: u64, length: u64, to: &mut File) -> io::Result<()> {
    let mut source = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(source)))?;
    source.seek(SeekFrom::Start(offset))?;
    let copied = io::copy(&mut source.take(length), to)?;
    if copied == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn inline(path: &str, data: &'static [u8]) -> v1::InputFile {
        let source = Some(v1::file_content::Source::Inline(data.into()));
        let content = Some(v1::FileContent { source });
        v1::InputFile { path: path.to_owned().into(), content, executable: false }
    }

    #[test]
    fn small_files_share_one_descriptor() {
        let body = v1::JobBody { inputs: vec![inline("a", b"aaa"), inline("b", b"bb")], ..Default::default() };
        let start = v1::StartAttempt { inputs: vec![inline("c", b"c")], ..Default::default() };
        let inputs = pack(&body, &start, &BTreeMap::new()).unwrap();
        assert_eq!(inputs.descriptors.len(), 1);
        let slices: Vec<_> = inputs.files.iter().map(|file| (file.offset, file.length)).collect();
        assert_eq!(slices, [(0, 3), (3, 2), (5, 1)]);
        let mut all = [0; 6];
        File::from(inputs.descriptors[0].try_clone().unwrap()).read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all, b"aaabbc");
    }

    #[test]
    fn a_file_of_the_attempts_own_takes_the_place_of_a_shared_one() {
        let body = v1::JobBody { inputs: vec![inline("a", b"new"), inline("b", b"bb")], ..Default::default() };
        let start = v1::StartAttempt { inputs: vec![inline("a", b"saved")], ..Default::default() };
        let inputs = pack(&body, &start, &BTreeMap::new()).unwrap();
        let files: Vec<_> = inputs.files.iter().map(|file| (file.path.as_slice(), file.length)).collect();
        assert_eq!(files, [(&b"b"[..], 2), (&b"a"[..], 5)]);
    }

    #[test]
    fn a_job_without_inputs_costs_no_descriptor() {
        let inputs = pack(&v1::JobBody::default(), &v1::StartAttempt::default(), &BTreeMap::new()).unwrap();
        assert!(inputs.descriptors.is_empty() && inputs.stdin.is_none());
    }
}
