//! What both back ends write alike: records as JSON, ids as signed numbers.

use muster_core::effect::{Sizes, Subject};
use serde::{Serialize, de::DeserializeOwned};

use super::Error;

pub(super) fn damaged(what: impl Into<String>) -> Error {
    Error::Damaged { what: what.into() }
}

pub(super) fn parse<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| damaged(format!("{what}: {error}")))
}

pub(super) fn to_json<T: Serialize>(record: &T) -> String {
    serde_json::to_string(record).expect("our records have only string keys or numbers")
}

/// The data bases' integers are signed; no id of ours comes near the limit.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// "from,to,inputs" of a scaling decision; an older release wrote no inputs.
pub(super) fn sizes_to_text(subject: &Subject) -> Option<String> {
    match subject {
        Subject::Pool { sizes: Some(Sizes { from, to, inputs }), .. } => Some(format!("{from},{to},{inputs}")),
        Subject::Pool { sizes: None, .. } | Subject::Fleet | Subject::Job(_) | Subject::Node(_) => None,
    }
}

/// What [`sizes_to_text`] wrote.
pub(super) fn sizes_of_text(text: &str) -> Option<Sizes> {
    let (from, rest) = text.split_once(',')?;
    let (to, inputs) = rest.split_once(',').unwrap_or((rest, ""));
    Some(Sizes { from: from.parse().ok()?, to: to.parse().ok()?, inputs: inputs.to_owned() })
}
