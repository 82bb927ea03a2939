//! Names of things: newtypes, never bare numbers.
//!
//! A job is shown in Crockford's base 32 (`7k2`), a task as `7k2.15`, an
//! attempt as `7k2.15.1`: short, sortable, safe to read aloud.

use alloc::string::String;
use core::{fmt, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Serialize};

/// Crockford's base 32: no i, l, o, u (<https://www.crockford.com/base32.html>).
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// The first job's number: shown with three characters, as `100`.
pub const FIRST_JOB: JobId = JobId(1024);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

number! {
    /// What a user asked for: 1..N tasks with one template.
    JobId
}
number! {
    /// Our record of a host.
    NodeId
}
number! {
    /// One stream of one agent; chosen by the driver, never stored.
    SessionId
}
number! {
    /// The driver's handle for a question that gets exactly one reply.
    RequestId
}
number! {
    /// A coordinator's time as leader. Rises with each start or takeover.
    Term
}
number! {
    /// Counts the changes of one record, or of the fleet.
    Revision
}
number! {
    /// Counts the lives of a node: a reboot or a return after silence starts another.
    Incarnation
}
number! {
    /// A host asked of a provider and not yet confirmed gone.
    HostRequestId
}

/// A member of a job's array, counted from 0.
pub type TaskIndex = u32;

/// One try at a task on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptId {
    /// The job.
    pub job: JobId,
    /// The task within the job.
    pub task: TaskIndex,
    /// Counts from 1 within the task.
    pub number: NonZeroU32,
}

/// Fences an attempt: what carries an older epoch is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// The leader's term at the placement.
    pub term: Term,
    /// The attempt's number within its task.
    pub attempt: NonZeroU32,
}

/// Who asked: a person, a program, or a part of the coordinator ("scaler").
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Actor(pub String);

/// A pool's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PoolName(pub String);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0u8; 13];
        let mut rest = self.0;
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = ALPHABET[(rest % 32) as usize];
            rest /= 32;
            if rest == 0 {
                break;
            }
        }
        f.pad(core::str::from_utf8(&digits[at..]).unwrap_or("?"))
    }
}

/// The text is no job number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAJobId;

impl fmt::Display for NotAJobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a job id is 1 to 13 characters of 0-9 and a-z without i, l, o, u")
    }
}

impl core::error::Error for NotAJobId {}

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        if text.is_empty() || text.len() > 13 {
            return Err(NotAJobId);
        }
        text.bytes()
            .try_fold(0u64, |number, byte| {
                let digit = ALPHABET.iter().position(|letter| *letter == byte.to_ascii_lowercase()).ok_or(NotAJobId)?;
                number.checked_mul(32).and_then(|shifted| shifted.checked_add(digit as u64)).ok_or(NotAJobId)
            })
            .map(JobId)
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.job, self.task, self.number)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn a_job_id_reads_back_as_it_is_shown() {
        for number in [0, 31, 32, 1023, 1024, 7 * 1024 + 19 * 32 + 2, u64::MAX] {
            assert_eq!(JobId(number).to_string().parse(), Ok(JobId(number)));
        }
        assert_eq!(FIRST_JOB.to_string(), "100");
    }

    #[test]
    fn letters_that_look_like_digits_are_refused() {
        for text in ["", "7i", "l", "7k2-", "zzzzzzzzzzzzzz"] {
            assert_eq!(text.parse::<JobId>(), Err(NotAJobId), "{text}");
        }
    }
}
