//! The host's files, below a root: `/`, or a folder that a test has filled.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Where files are read.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

/// What is known of a file that may be anybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// It is not there.
    Absent,
    /// We may not look.
    Hidden,
    /// Its owner, and its mode without the file's kind.
    Of { uid: u32, mode: u32 },
}

impl Host {
    /// The host that this process runs on.
    pub fn real() -> Self {
        Self { root: PathBuf::from("/") }
    }

    /// A folder in place of `/`.
    #[cfg(test)]
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Whether system calls tell of the same host as its files.
    pub fn is_real(&self) -> bool {
        self.root == Path::new("/")
    }

    /// An absolute path of the host, as this process reaches it.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A file's text; none if it is absent or not ours to read.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        fs::read(self.path(path)).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file's one line.
    pub fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        self.text(path).map(|text| text.trim().to_owned())
    }

    /// A file's one number.
    pub fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.line(path)?.parse().ok()
    }

    /// Whether it is there and may be seen.
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// Who may do what with a file.
    pub fn rights(&self, path: impl AsRef<Path>) -> Rights {
        match fs::metadata(self.path(path)) {
            Ok(metadata) => Rights::Of { uid: metadata.uid(), mode: metadata.mode() & 0o7777 },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Rights::Absent,
            Err(_) => Rights::Hidden,
        }
    }
}

/// A host of which only these files are there.
#[cfg(test)]
pub fn fixture(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::below(folder.path());
    for (path, text) in files {
        let path = host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    (folder, host)
}
