//! Faults of calls inside a part: `faults.c` is compiled and preloaded, and told
//! by a page of shared memory which call is to meet what.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    process::Command,
};

use crate::host;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/harness/faults.c");

/// What a call meets. The numbers are those of `faults.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` before it is done.
    Killed = 1,
    /// EIO.
    Failed = 2,
    /// Half of it is written, then `kill -9`.
    Torn = 3,
}

/// Which calls count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Writes and syncs of the embedded store's files.
    Store = 1,
    /// These, and all that is written to a socket.
    StoreAndSockets = 3,
}

/// A library to be preloaded, and the page by which it is told.
#[derive(Debug)]
pub struct Preload {
    library: PathBuf,
    page: File,
    page_path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Preload {
    /// Compiles it. None: there is no C compiler.
    ///
    /// # Panics
    /// If there is one, and it refuses.
    #[must_use]
    pub fn compile() -> Option<Self> {
        if !host::has_program("cc") {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("muster-faults-").tempdir().expect("a temporary folder");
        let (library, page_path) = (folder.path().join("faults.so"), folder.path().join("page"));
        let mut compile = Command::new("cc");
        compile.args(["-O1", "-shared", "-fPIC", SOURCE, "-ldl", "-o"]).arg(&library);
        let done = compile.output().expect("a compiler that is there");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let page = OpenOptions::new().create_new(true).read(true).write(true).open(&page_path);
        let page = page.expect("a file in our own folder");
        page.set_len(4_096).expect("a page");
        Some(Self { library, page, page_path, _folder: folder })
    }

    /// To be added to a part's environment.
    #[must_use]
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        vec![
            ("LD_PRELOAD".into(), self.library.clone().into()),
            ("MUSTER_TEST_FAULTS".into(), self.page_path.clone().into()),
        ]
    }

    fn put(&self, field: u64, value: i32) {
        self.page.write_all_at(&value.to_ne_bytes(), field * 4).expect("a page of ours");
    }

    fn field(&self, field: u64) -> i32 {
        let mut bytes = [0; 4];
        self.page.read_exact_at(&mut bytes, field * 4).expect("a page of ours");
        i32::from_ne_bytes(bytes)
    }

    /// The fault comes at the so many-th call from now.
    pub fn arm(&self, call: i32, fault: Fault, scope: Scope) {
        self.put(1, fault as i32);
        self.put(2, scope as i32);
        self.put(0, call);
    }

    /// Nothing comes any more: how many faults there were.
    pub fn disarm(&self) -> i32 {
        self.put(0, 0);
        self.field(3)
    }

    /// Sets the wall clock of all that have it preloaded, so many milliseconds from the true time.
    pub fn set_clock(&self, ms: i64) {
        self.page.write_all_at(&ms.to_ne_bytes(), 16).expect("a page of ours");
    }
}
