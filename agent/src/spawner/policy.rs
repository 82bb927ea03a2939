//! What the host's owner allows: `spawner.toml`, root-owned. The spawner
//! refuses the rest, also from the genuine agent.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::protocol::Profile;

/// The policy in force.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// First uid (and gid) that a job may have. Never 0.
    pub uid_first: u32,
    /// Last uid that a job may have.
    pub uid_last: u32,
    /// The weakest profile that a job may ask for: "strict", "shared" or "none".
    pub weakest_profile: Weakest,
    /// The agent may have the host powered off.
    pub allow_poweroff: bool,
    /// Attempts held at once, ended ones included.
    pub attempts_max: usize,
    /// Sandboxes that are made ahead at most; 0: each is made when its job comes, and none is used again.
    pub prepared_max: usize,
    /// Whose `usr`, `bin`, `lib`, `etc` ... a strict job sees, read-only: `/`, or the folder of an image.
    pub image: PathBuf,
    /// When the host's system stops the spawner, what runs may finish for so long; 0: it is ended at once.
    pub drain_at_stop_seconds: u32,
    /// What a job may read from each disk; 0: no limit. Needs the cgroup v2 controller `io`.
    pub io_read_bytes_per_second: u64,
    /// What a job may write to each disk; 0: no limit.
    pub io_write_bytes_per_second: u64,
}

/// The weakest profile that a job may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weakest {
    /// Plain processes are allowed.
    None,
    /// The host's file system and network are allowed.
    Shared,
    /// Only the full sandbox.
    Strict,
}

/// Why a policy is not usable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read the policy {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Someone else could have written it.
    #[error("the policy {path} must belong to root or to the spawner's user, and be writable by nobody else")]
    Owner {
        /// The file.
        path: PathBuf,
    },
    /// Unknown key or wrong type.
    #[error("the policy {path} is wrong: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// Uid 0, or an empty range.
    #[error("the uid range {first}-{last} must not be empty and must not contain 0")]
    Range {
        /// First uid.
        first: u32,
        /// Last uid.
        last: u32,
    },
    /// No such folder.
    #[error("the image {image} must be the absolute path of a folder that holds usr, bin, lib and etc")]
    Image {
        /// The path.
        image: PathBuf,
    },
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            uid_first: 200_000,
            uid_last: 204_095,
            weakest_profile: Weakest::None,
            allow_poweroff: false,
            attempts_max: 8_192,
            prepared_max: 8,
            image: PathBuf::from("/"),
            drain_at_stop_seconds: 0,
            io_read_bytes_per_second: 0,
            io_write_bytes_per_second: 0,
        }
    }
}

impl Policy {
    /// Reads and checks a policy file.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let metadata = fs::metadata(path).map_err(read)?;
        let own = nix::unistd::geteuid().as_raw();
        if ![0, own].contains(&metadata.uid()) || metadata.mode() & 0o022 != 0 {
            return Err(Error::Owner { path: path.to_owned() });
        }
        let text = fs::read_to_string(path).map_err(read)?;
        let policy: Self = toml::from_str(&text).map_err(|source| Error::Parse { path: path.to_owned(), source })?;
        policy.checked()
    }

    /// The same with another uid range.
    ///
    /// # Errors
    /// The range is empty or contains 0.
    pub fn with_uids(self, first: u32, last: u32) -> Result<Self, Error> {
        Self { uid_first: first, uid_last: last, ..self }.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        if self.uid_first == 0 || self.uid_first > self.uid_last {
            return Err(Error::Range { first: self.uid_first, last: self.uid_last });
        }
        if !self.image.is_absolute() || !self.image.is_dir() {
            return Err(Error::Image { image: self.image });
        }
        Ok(self)
    }

    /// May a job ask for this profile?
    #[must_use]
    pub fn allows(&self, profile: Profile) -> bool {
        let strength = match profile {
            Profile::None => Weakest::None,
            Profile::Shared => Weakest::Shared,
            Profile::Strict => Weakest::Strict,
        };
        strength >= self.weakest_profile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weakest_profile_bounds_what_a_job_may_ask() {
        let policy = Policy { weakest_profile: Weakest::Shared, ..Policy::default() };
        assert!(policy.allows(Profile::Strict) && policy.allows(Profile::Shared) && !policy.allows(Profile::None));
    }

    #[test]
    fn uid_0_is_never_in_the_range() {
        assert!(matches!(Policy::default().with_uids(0, 10), Err(Error::Range { .. })));
        assert!(matches!(Policy::default().with_uids(10, 9), Err(Error::Range { .. })));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = toml::from_str::<Policy>("alow_poweroff = true").expect_err("a misspelt key");
        assert!(error.to_string().contains("alow_poweroff"), "{error}");
    }
}
