//! Wire to core and back: the one place that distrusts the wire.
//!
//! Whatever comes in is checked here as a whole, or rejected with the field's
//! name and a sentence; past this file a value means what its type says.
//! Nothing here panics on any input. What goes out needs no check.

mod report;
mod template;

use core::num::NonZeroU32;
use std::collections::{BTreeMap, HashMap};

use muster_core::{
    ids::{Actor, AttemptId, Epoch, JobId, PoolName, Term},
    limits,
    resources::Resources,
};

pub use self::{
    report::{detail, drain_then, end, end_to_wire, held, hello, sample, stop_to_wire, then_name, then_to_wire},
    template::{Template, blobs_in, profile_fences, task_table, template},
};
use crate::v1;

/// A message that must not be acted on: which field, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Rejected {
    /// As in the proto: "template.body.arguments[2]".
    pub field: String,
    /// The sentence.
    pub reason: String,
}

/// Shorthand for the one error of this module.
pub type Checked<T> = Result<T, Rejected>;

pub(crate) fn reject<T>(field: impl Into<String>, reason: impl Into<String>) -> Checked<T> {
    Err(Rejected { field: field.into(), reason: reason.into() })
}

pub(crate) fn required<'a, T>(field: &str, value: Option<&'a T>) -> Checked<&'a T> {
    value.map_or_else(|| reject(field, "is missing"), Ok)
}

/// An attempt's id.
///
/// # Errors
/// It is missing, or its number is 0.
pub fn attempt_id(wire: Option<&v1::AttemptId>) -> Checked<AttemptId> {
    let wire = required("attempt", wire)?;
    let Some(number) = NonZeroU32::new(wire.number) else { return reject("attempt.number", "counts from 1") };
    Ok(AttemptId { job: JobId(wire.job), task: wire.task, number })
}

/// An attempt's epoch.
///
/// # Errors
/// It is missing, or its attempt number is 0.
pub fn epoch(wire: Option<&v1::Epoch>) -> Checked<Epoch> {
    let wire = required("epoch", wire)?;
    let Some(attempt) = NonZeroU32::new(wire.attempt) else { return reject("epoch.attempt", "counts from 1") };
    Ok(Epoch { term: Term(wire.term), attempt })
}

impl From<AttemptId> for v1::AttemptId {
    fn from(id: AttemptId) -> Self {
        Self { job: id.job.0, task: id.task, number: id.number.get() }
    }
}

impl From<Epoch> for v1::Epoch {
    fn from(epoch: Epoch) -> Self {
        Self { term: epoch.term.0, attempt: epoch.attempt.get() }
    }
}

impl From<Resources> for v1::Resources {
    fn from(amounts: Resources) -> Self {
        Self { cpu_milli: amounts.cpu_milli, memory_bytes: amounts.memory_bytes, disk_bytes: amounts.disk_bytes }
    }
}

/// Amounts that sums of many still hold: no host has an exbibyte or a million cores.
pub(crate) fn amounts(field: &str, wire: &v1::Resources) -> Checked<Resources> {
    const CPU_MILLI_MAX: u64 = 1_000_000_000;
    const BYTES_MAX: u64 = 1 << 60;
    if wire.cpu_milli > CPU_MILLI_MAX || wire.memory_bytes > BYTES_MAX || wire.disk_bytes > BYTES_MAX {
        return reject(field, "is more than any host has");
    }
    Ok(Resources { cpu_milli: wire.cpu_milli, memory_bytes: wire.memory_bytes, disk_bytes: wire.disk_bytes })
}

/// A name of a job, node or pool: what a table can show and a shell can take.
///
/// # Errors
/// It is empty, too long, or has characters other than letters, digits and `._-`.
pub fn name(field: &str, text: &str) -> Checked<String> {
    if text.is_empty() || text.len() > limits::NAME_LEN_MAX {
        return reject(field, format!("has 1 to {} characters", limits::NAME_LEN_MAX));
    }
    if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return reject(field, "has only letters, digits, dots, dashes and underscores");
    }
    Ok(text.to_owned())
}

/// Text that a person wrote and others read: no control characters, bounded.
///
/// # Errors
/// It is longer than `most` bytes or has a control character.
pub fn text(field: &str, text: &str, most: usize) -> Checked<String> {
    if text.len() > most {
        return reject(field, format!("has at most {most} bytes"));
    }
    if text.chars().any(char::is_control) {
        return reject(field, "has no control characters");
    }
    Ok(text.to_owned())
}

/// An operator's reason.
///
/// # Errors
/// As [`text`].
pub fn reason(reason: &str) -> Checked<String> {
    text("reason", reason, limits::REASON_LEN_MAX)
}

/// A pool by name; empty: any.
///
/// # Errors
/// As [`name`].
pub fn pool(field: &str, pool: &str) -> Checked<Option<PoolName>> {
    if pool.is_empty() { Ok(None) } else { name(field, pool).map(|name| Some(PoolName(name))) }
}

/// An idempotency key.
///
/// # Errors
/// It is empty, too long, or has other than printable ASCII characters.
pub fn idempotency_key(key: &str) -> Checked<String> {
    if key.is_empty() || key.len() > limits::KEY_LEN_MAX {
        return reject("idempotency_key", format!("has 1 to {} characters", limits::KEY_LEN_MAX));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return reject("idempotency_key", "has only printable ASCII characters");
    }
    Ok(key.to_owned())
}

/// Labels of a node, or constraints of a job.
///
/// # Errors
/// Too many, or a key or value that is no label.
pub fn labels(field: &str, wire: &HashMap<String, String>) -> Checked<BTreeMap<String, String>> {
    if wire.len() > limits::LABELS_MAX {
        return reject(field, format!("has at most {} entries", limits::LABELS_MAX));
    }
    let mut labels = BTreeMap::new();
    for (key, value) in wire {
        if key.is_empty() || key.len() > limits::NAME_LEN_MAX || !key.bytes().all(is_label_byte) {
            return reject(field, "a key is 1 to 128 letters, digits or `._-/`");
        }
        labels.insert(key.clone(), text(field, value, limits::NAME_LEN_MAX)?);
    }
    Ok(labels)
}

const fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/')
}

/// A blob's reference: a whole SHA-256 and a range that does not wrap.
///
/// # Errors
/// The digest has not 32 bytes, or the range is beyond any blob.
pub fn blob(field: &str, wire: &v1::BlobRef) -> Checked<([u8; 32], u64, u64)> {
    let Ok(digest) = <[u8; 32]>::try_from(wire.digest.as_ref()) else {
        return reject(format!("{field}.digest"), "is a SHA-256 of 32 bytes");
    };
    match wire.offset.checked_add(wire.length) {
        Some(end) if end <= limits::BLOB_BYTES_MAX => Ok((digest, wire.offset, wire.length)),
        Some(_) | None => {
            reject(field, format!("reaches past the {} bytes that a blob may have", limits::BLOB_BYTES_MAX))
        }
    }
}

/// Which of an attempt's two streams.
///
/// # Errors
/// Neither.
pub fn stream(wire: i32) -> Checked<v1::Stream> {
    match v1::Stream::try_from(wire) {
        Ok(stream @ (v1::Stream::Stdout | v1::Stream::Stderr)) => Ok(stream),
        Ok(v1::Stream::Unspecified) | Err(_) => reject("stream", "is stdout or stderr"),
    }
}

/// The actor of a person's request.
#[must_use]
pub fn actor(name: &str) -> Actor {
    Actor(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_range_that_wraps_is_rejected() {
        let wire = v1::BlobRef { digest: vec![7; 32].into(), offset: u64::MAX, length: 2 };
        assert!(blob("input", &wire).is_err());
        let short = v1::BlobRef { digest: vec![7; 31].into(), offset: 0, length: 2 };
        assert_eq!(blob("input", &short).unwrap_err().field, "input.digest");
    }

    #[test]
    fn names_are_what_a_shell_can_take() {
        assert!(name("node", "web-01.example").is_ok());
        for bad in ["", "a b", "a/b", "é", "a\n", &"x".repeat(129)] {
            assert!(name("node", bad).is_err(), "{bad:?}");
        }
    }
}
