//! What the host's owner allows: `spawner.toml`, root-owned. The spawner
//! refuses the rest, also from the genuine agent.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use muster_core::fence;
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
    /// Fences of that profile that a job may do without where this host lacks them: names, or a family's (`limits`).
    pub may_lack: Vec<String>,
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
    /// Not the name of a fence.
    #[error("may_lack names {name:?}, which is no fence; `muster doctor` lists them")]
    Fence {
        /// The word.
        name: String,
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
            may_lack: Vec::new(),
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
        if let Some(name) = self.may_lack.iter().find(|name| !fence::ALL.iter().any(|known| fence::covers(name, known)))
        {
            return Err(Error::Fence { name: name.clone() });
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

    /// A fence of the weakest profile that an attempt would not have and must: however much a job can do without, it is
    /// never weaker than that profile. The network is the job's choice in every profile.
    #[must_use]
    pub fn misses(&self, has: impl Fn(&str) -> bool) -> Option<&'static str> {
        let floor: &[&'static str] = match self.weakest_profile {
            Weakest::None => &[],
            Weakest::Shared => &fence::SHARED,
            Weakest::Strict => &fence::STRICT,
        };
        let may_lack = |name: &str| self.may_lack.iter().any(|word| fence::covers(word, name));
        floor.iter().copied().find(|name| *name != fence::NETWORK && !has(name) && !may_lack(name))
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
    fn nothing_that_a_job_does_without_makes_it_weaker_than_the_weakest_profile() {
        let policy = |weakest_profile, words: &[&str]| Policy {
            weakest_profile,
            may_lack: words.iter().map(|word| (*word).to_owned()).collect(),
            ..Policy::default()
        };
        let hybrid = |name: &str| !matches!(name, "limits.cpu" | "limits.memory" | "ns.net");
        assert_eq!(policy(Weakest::Strict, &[]).misses(hybrid), Some("limits.cpu"));
        assert_eq!(policy(Weakest::Strict, &["limits.cpu"]).misses(hybrid), Some("limits.memory"));
        assert_eq!(policy(Weakest::Strict, &["limits"]).misses(hybrid), None);
        assert_eq!(policy(Weakest::Shared, &["limits"]).misses(|name| name != "ns.mount" && hybrid(name)), None);
        assert_eq!(policy(Weakest::None, &[]).misses(|_| false), None);
        assert!(matches!(policy(Weakest::Strict, &["limit"]).checked(), Err(Error::Fence { .. })));
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
