//! People and programs that use a fleet: what they are named, and what they may do.

use std::{fmt, str::FromStr};

use muster_core::{limits, node::SCALER};

/// What a person may do; each role includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Role {
    /// See everything.
    Read,
    /// Submit jobs and cancel one's own.
    Submit,
    /// Cordon, drain, cancel anything.
    Operate,
    /// Pools, tokens, removal of nodes.
    Admin,
}

impl Role {
    /// By its word.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        match word {
            "read" => Some(Self::Read),
            "submit" => Some(Self::Submit),
            "operate" => Some(Self::Operate),
            "admin" => Some(Self::Admin),
            _unknown => None,
        }
    }

    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Submit => "submit",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

/// Who the fleet itself is where somebody is named: the coordinator, its pools' rules, its settings.
const OWN_NAMES: [&str; 3] = ["coordinator", SCALER, "start"];

/// A person's or program's name, as its certificate and the history say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersonName(String);

impl PersonName {
    /// Of the first person of a fleet.
    pub(crate) fn first() -> Self {
        Self("admin".to_owned())
    }
}

impl fmt::Display for PersonName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for PersonName {
    type Err = String;

    /// It is a part of a URI and of a file's name, and no name that the fleet itself gives.
    fn from_str(text: &str) -> Result<Self, String> {
        let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'@' | b'+');
        if text.is_empty() || text.len() > limits::NAME_LEN_MAX || text.starts_with('.') || !text.bytes().all(is_fit) {
            let most = limits::NAME_LEN_MAX;
            return Err(format!("a name has 1 to {most} letters, digits or ._-@+, and no dot first"));
        }
        if OWN_NAMES.contains(&text) {
            return Err(format!("`{text}` is the fleet itself, in its history"));
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path_no_part_of_an_address_and_not_the_fleets_own() {
        for refused in ["", "..", "a/b", "ana?role=admin", "uid:0", "coordinator", "scaler", &"a".repeat(129)] {
            assert!(refused.parse::<PersonName>().is_err(), "{refused}");
        }
    }
}
