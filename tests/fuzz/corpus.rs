//! The inputs that are kept, in `tests/fuzz/corpus/TARGET/`: real encodings to
//! begin with, and every input that ever failed.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::target::Target;

/// A target's folder.
#[must_use]
pub fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// All members, in the order of their names.
///
/// # Errors
/// The folder or a file in it cannot be read.
pub fn load(target: &Target) -> anyhow::Result<Vec<Vec<u8>>> {
    let folder = folder(target);
    let listed = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = listed.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    paths.iter().map(|path| fs::read(path).with_context(|| format!("cannot read {}", path.display()))).collect()
}

/// Writes the target's real encodings, as this version makes them.
///
/// # Errors
/// A file cannot be written.
pub fn write_seeds(target: &Target) -> anyhow::Result<usize> {
    let folder = folder(target);
    fs::create_dir_all(&folder)?;
    let seeds = (target.seeds)();
    for (name, bytes) in &seeds {
        fs::write(folder.join(name), bytes).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(seeds.len())
}

/// Keeps an input that failed, under a name that follows from what it holds.
///
/// # Errors
/// The file cannot be written.
pub fn keep(target: &Target, input: &[u8]) -> anyhow::Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let path = folder(target).join(format!("failed-{:016x}", hasher.finish()));
    fs::write(&path, input).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
