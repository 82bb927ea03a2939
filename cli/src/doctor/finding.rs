//! What the doctor says of one thing: its state, what was seen, what hangs on
//! it, and what mends it.

use serde_json::{Value, json};

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// It works; something may be lost or be weaker than it could.
    Warn,
    /// A fence that the profile `strict` asks, or a promise of the fleet, does not hold on this host.
    Missing,
    /// It could not be seen from here.
    Unknown,
}

impl State {
    /// Its word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        }
    }
}

/// One line of the doctor's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at: a fence by its name, or `area.thing`.
    pub check: String,
    /// How it is.
    pub state: State,
    /// What was seen.
    pub seen: String,
    /// The fences or promises that hang on it.
    pub affects: String,
    /// The command or setting that mends it; empty if all is well.
    pub mend: String,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &str, affects: &str, seen: impl Into<String>) -> Self {
        Self {
            check: check.to_owned(),
            state: State::Ok,
            seen: seen.into(),
            affects: affects.to_owned(),
            mend: String::new(),
        }
    }

    /// It is not as it should be.
    pub fn bad(state: State, check: &str, affects: &str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { state, mend: mend.into(), ..Self::ok(check, affects, seen) }
    }

    /// [`State::Warn`].
    pub fn warn(check: &str, affects: &str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(State::Warn, check, affects, seen, mend)
    }

    /// [`State::Missing`].
    pub fn missing(check: &str, affects: &str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(State::Missing, check, affects, seen, mend)
    }

    /// [`State::Unknown`].
    pub fn unknown(check: &str, affects: &str, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(State::Unknown, check, affects, seen, mend)
    }

    /// For programs.
    pub fn value(&self) -> Value {
        let mend = (!self.mend.is_empty()).then_some(&self.mend);
        json!({
            "check": self.check, "state": self.state.word(), "seen": self.seen, "affects": self.affects, "mend": mend,
        })
    }
}
