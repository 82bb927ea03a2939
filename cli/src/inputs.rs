//! Files that go with a job: found here, read once, and sent. A small one
//! travels inside the message; many small ones are packed into one blob and
//! named as slices of it; a large one is a blob of its own.
//!
//! Names are bytes. Below a named folder nothing is followed: a link, device,
//! socket or pipe there is told and left out.

use std::{
    ffi::OsString,
    fs::File,
    io::Read,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use muster_core::limits::{INLINE_FILE_BYTES_MAX, INPUT_FILES_MAX};

use crate::{
    escape,
    exit::{Exit, Failure, Result},
};

/// A file to send.
#[derive(Debug)]
pub struct Input {
    /// Its path below the job's working folder.
    pub name: Vec<u8>,
    /// Its bytes, or where they are.
    pub source: Source,
    /// Its owner may execute it.
    pub executable: bool,
}

/// Where a file's bytes are.
#[derive(Debug)]
pub enum Source {
    /// Read already.
    Bytes(Vec<u8>),
    /// Too large to be held: an open file.
    File(File, PathBuf),
}

/// Something below a folder that is not sent, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its path here.
    pub path: PathBuf,
    /// "a symbolic link", "permission denied" ...
    pub reason: String,
}

/// Splits `PATH=NAME`; a path that exists as it stands is not split.
pub fn split_name(text: &OsString) -> (PathBuf, Option<Vec<u8>>) {
    let bytes = text.as_bytes();
    let whole = PathBuf::from(text);
    match bytes.iter().rposition(|byte| *byte == b'=') {
        Some(at) if at > 0 && whole.symlink_metadata().is_err() => {
            (PathBuf::from(OsString::from_vec(bytes[..at].to_vec())), Some(bytes[at + 1..].to_vec()))
        }
        _ => (whole, None),
    }
}

/// Finds what `path` names: a file, or all regular files below a folder.
pub fn collect(path: &Path, name: Option<Vec<u8>>, inputs: &mut Vec<Input>, skipped: &mut Vec<Skipped>) -> Result<()> {
    let metadata = std::fs::metadata(path).map_err(|error| Failure::file("send the input", path, error))?;
    let own_name = || path.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
    if metadata.is_dir() {
        // A folder without a name of its own (`.`, `..`) is sent as its contents.
        let base = name.unwrap_or_else(own_name);
        if !base.is_empty() {
            check_name(&base)?;
        }
        for found in walk(path, &|_| true) {
            let found = match found {
                Found::File(found) => found,
                Found::Skipped(other) => {
                    skipped.push(other);
                    continue;
                }
            };
            let relative = found.strip_prefix(path).expect("the walk stays below the folder").as_os_str().as_bytes();
            let mut full = base.clone();
            if !full.is_empty() {
                full.push(b'/');
            }
            full.extend_from_slice(relative);
            let file = open_regular(&found).map_err(|reason| {
                Failure::new(Exit::Failed, format!("cannot send the input {}: {reason}", escape::path(&found)))
            })?;
            push(file, found, full, inputs)?;
        }
        return Ok(());
    }
    let name = name.unwrap_or_else(own_name);
    check_name(&name)?;
    // What the caller names may be a link; it is what it leads to that is sent.
    let real = path.canonicalize().map_err(|error| Failure::file("send the input", path, error))?;
    let file = open_regular(&real).map_err(|reason| {
        Failure::new(Exit::Failed, format!("cannot send the input {}: {reason}", escape::path(path)))
    })?;
    push(file, path.to_path_buf(), name, inputs)
}

fn push(mut file: File, path: PathBuf, name: Vec<u8>, inputs: &mut Vec<Input>) -> Result<()> {
    if inputs.len() >= INPUT_FILES_MAX {
        return Err(Failure::usage(format!(
            "a job takes at most {INPUT_FILES_MAX} input files; send an archive and unpack it in the job"
        )));
    }
    let metadata = file.metadata().map_err(|error| Failure::file("send the input", &path, error))?;
    let executable = metadata.mode() & 0o100 != 0;
    let source = if metadata.len() <= INLINE_FILE_BYTES_MAX as u64 {
        let mut bytes = Vec::new();
        // What is appended while we read is not part of it.
        (&mut file)
            .take(metadata.len())
            .read_to_end(&mut bytes)
            .map_err(|error| Failure::file("send the input", &path, error))?;
        Source::Bytes(bytes)
    } else {
        Source::File(file, path)
    };
    inputs.push(Input { name, source, executable });
    Ok(())
}

/// A name below the working folder: relative, no `..`, no NUL, not too long.
pub fn check_name(name: &[u8]) -> Result<()> {
    let shown = escape::bytes(name);
    if name.is_empty() || name.len() > muster_core::limits::PATH_BYTES_MAX || name.contains(&0) {
        return Err(Failure::usage(format!("`{shown}` is no name for a file in the job's working folder")));
    }
    if name.starts_with(b"/") || name.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return Err(Failure::usage(format!(
            "`{shown}` leads out of the job's working folder; give a name inside it with PATH=NAME"
        )));
    }
    Ok(())
}

/// Opens what is a regular file and nothing else, without following a link or waiting for a writer.
pub fn open_regular(path: &Path) -> std::result::Result<File, String> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| reason_of(&error))?;
    // It may have been replaced since it was found: what is open now counts.
    let metadata = file.metadata().map_err(|error| reason_of(&error))?;
    match kind_of(&metadata.file_type()) {
        None => Ok(file),
        Some(kind) => Err(kind.to_owned()),
    }
}

fn reason_of(error: &std::io::Error) -> String {
    if error.raw_os_error() == Some(libc::ELOOP) {
        return String::from("a symbolic link");
    }
    error.to_string().split(" (os error").next().unwrap_or_default().to_lowercase()
}

fn kind_of(kind: &std::fs::FileType) -> Option<&'static str> {
    if kind.is_file() {
        None
    } else if kind.is_symlink() {
        Some("a symbolic link")
    } else if kind.is_fifo() {
        Some("a named pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else if kind.is_dir() {
        Some("a folder")
    } else {
        Some("a device")
    }
}

/// One entry of a walk.
#[derive(Debug)]
pub enum Found {
    /// A regular file, when it was looked at.
    File(PathBuf),
    /// Something else, or a folder that cannot be read.
    Skipped(Skipped),
}

/// All entries below a folder in the order of their names; `enter` says which folders to look into.
pub fn walk(folder: &Path, enter: &dyn Fn(&Path) -> bool) -> Vec<Found> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                found.push(Found::Skipped(Skipped { path: folder, reason: reason_of(&error) }));
                continue;
            }
        };
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => paths.push(entry.path()),
                Err(error) => {
                    found.push(Found::Skipped(Skipped { path: folder.clone(), reason: reason_of(&error) }));
                    break;
                }
            }
        }
        paths.sort();
        let mut inner = Vec::new();
        for path in paths {
            match path.symlink_metadata() {
                Ok(metadata) if metadata.is_dir() => {
                    if enter(&path) {
                        inner.push(path);
                    }
                }
                Ok(metadata) => match kind_of(&metadata.file_type()) {
                    None => found.push(Found::File(path)),
                    Some(kind) => found.push(Found::Skipped(Skipped { path, reason: kind.to_owned() })),
                },
                Err(error) => found.push(Found::Skipped(Skipped { path, reason: reason_of(&error) })),
            }
        }
        folders.extend(inner.into_iter().rev());
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn odd_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &[u8]| folder.path().join(OsString::from_vec(name.to_vec()));
        for name in [&b"plain"[..], b"with space", b"new\nline", b"bad\xff\xfe", b"a=b"] {
            std::fs::write(at(name), name).unwrap();
        }
        std::fs::create_dir(at(b"deep")).unwrap();
        std::fs::write(at(b"deep/inner"), vec![7; INLINE_FILE_BYTES_MAX + 1]).unwrap();
        symlink("plain", at(b"link")).unwrap();
        nix::unistd::mkfifo(&at(b"pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _ = std::os::unix::net::UnixListener::bind(at(b"socket")).unwrap();
        folder
    }

    #[test]
    fn odd_names_are_sent_and_special_files_are_told() {
        let folder = odd_folder();
        let (mut inputs, mut skipped) = (Vec::new(), Vec::new());
        collect(folder.path(), Some(b"in".to_vec()), &mut inputs, &mut skipped).unwrap();
        let names: Vec<&[u8]> = inputs.iter().map(|input| &input.name[..]).collect();
        assert_eq!(
            names,
            [&b"in/a=b"[..], b"in/bad\xff\xfe", b"in/new\nline", b"in/plain", b"in/with space", b"in/deep/inner"]
        );
        assert!(matches!(inputs[5].source, Source::File(..)));
        assert!(matches!(&inputs[1].source, Source::Bytes(bytes) if bytes == b"bad\xff\xfe"));
        let reasons: Vec<&str> = skipped.iter().map(|skipped| skipped.reason.as_str()).collect();
        assert_eq!(reasons, ["a symbolic link", "a named pipe", "a socket"]);
    }

    #[test]
    fn a_missing_input_is_not_found_and_a_device_is_no_input() {
        let (mut inputs, mut skipped) = (Vec::new(), Vec::new());
        let missing = collect(Path::new("/no/such"), None, &mut inputs, &mut skipped).unwrap_err();
        assert_eq!(missing.exit, Exit::NotFound);
        let device = collect(Path::new("/dev/zero"), None, &mut inputs, &mut skipped).unwrap_err();
        assert!(device.sentence.contains("a device"), "{device}");
    }

    #[test]
    fn a_name_stays_inside_the_working_folder() {
        for name in [&b"/abs"[..], b"../x", b"a/../b", b"", b"a\0b"] {
            assert!(check_name(name).is_err());
        }
        check_name(b"a/..b/c").unwrap();
    }

    #[test]
    fn a_path_that_exists_is_not_split_at_its_equals_sign() {
        let folder = odd_folder();
        let path = folder.path().join("a=b").into_os_string();
        assert_eq!(split_name(&path), (PathBuf::from(&path), None));
        let named = OsString::from("x=y=z");
        assert_eq!(split_name(&named), (PathBuf::from("x=y"), Some(b"z".to_vec())));
    }
}
