//! What no panic shows. Each input is written to a file before it is tried, so
//! that it is there when the process is not: ended by an overflown stack, by
//! memory past a limit, or by the watch over inputs that take for ever.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// An input may make the process this much larger.
pub const DATA_BYTES_MAX: u64 = 256 << 20;
/// An input that takes longer than this hangs. Far more than any needs: a machine may be busy.
pub const HANG: Duration = Duration::from_secs(60);

/// The file with the input under way: its length in eight bytes, then itself.
#[derive(Debug)]
pub struct Ahead {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    noted: Arc<AtomicU64>,
}

impl Ahead {
    /// Begins the file.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn begin(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { file, path: path.to_owned(), buffer: Vec::new(), noted: Arc::default() })
    }

    pub(crate) fn note(&mut self, input: &[u8]) {
        self.buffer.clear();
        self.buffer.extend_from_slice(&(input.len() as u64).to_le_bytes());
        self.buffer.extend_from_slice(input);
        // Without it a failure is still told, only its input is not kept.
        let _full_disk = self.file.write_all_at(&self.buffer, 0);
        self.noted.fetch_add(1, Ordering::Relaxed);
    }

    /// The input under way when the process that wrote this file ended.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(path: &Path) -> io::Result<Vec<u8>> {
        let bytes = fs::read(path)?;
        let Some((length, rest)) = bytes.split_first_chunk() else { return Ok(Vec::new()) };
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        Ok(rest[..length.min(rest.len())].to_vec())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Gone: nobody was in the middle of anything.
        let _gone_already = fs::remove_file(&self.path);
    }
}

/// Ends the process if an input takes longer than [`HANG`], until the returned sender is dropped.
#[must_use]
pub fn watch(ahead: &Ahead) -> mpsc::Sender<()> {
    let (over, ended) = mpsc::channel();
    let noted = ahead.noted.clone();
    thread::spawn(move || {
        let mut before = u64::MAX;
        while ended.recv_timeout(HANG) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = noted.load(Ordering::Relaxed);
            if now == before {
                eprintln!("an input takes longer than {} s", HANG.as_secs());
                std::process::abort();
            }
            before = now;
        }
    });
    over
}

/// From here on the process ends if it wants [`DATA_BYTES_MAX`] more memory than it has.
///
/// # Errors
/// The kernel does not say what it has, or takes no limit.
pub fn limit_memory() -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read what memory this process has")?;
    let has = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB")?.parse().ok());
    let has: u64 = has.context("/proc/self/status has no VmData")?;
    let most = has * 1_024 + DATA_BYTES_MAX;
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA).context("cannot ask for the limit on memory")?;
    setrlimit(Resource::RLIMIT_DATA, most.min(hard), hard).context("cannot limit the memory of this process")
}
