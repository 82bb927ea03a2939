//! The one table from our errors to gRPC codes. The message is a sentence for a person.

use muster_core::denied::Denied;
use muster_proto::convert::Rejected;
use tonic::{Code, Status};

use crate::{blobs, driver::Stopped, identity, logs, room, starts, store, tokens};

/// An expected refusal.
#[must_use]
pub fn denied(denied: Denied) -> Status {
    let code = match &denied {
        Denied::KeyConflict { .. } | Denied::NameTaken { .. } => Code::AlreadyExists,
        Denied::UnknownJob(_)
        | Denied::UnknownTask { .. }
        | Denied::UnknownNode(_)
        | Denied::UnknownPool(_)
        | Denied::UnknownRolling(_) => Code::NotFound,
        Denied::NeverFits { .. } | Denied::NodeState { .. } | Denied::JobState { .. } | Denied::PoolState { .. } => {
            Code::FailedPrecondition
        }
        Denied::BadPolicy { .. } => Code::InvalidArgument,
        Denied::LimitReached { .. } => Code::ResourceExhausted,
    };
    Status::new(code, denied.to_string())
}

/// A message that must not be acted on.
#[must_use]
pub fn rejected(rejected: Rejected) -> Status {
    Status::invalid_argument(rejected.to_string())
}

/// The driver is gone: it is open whether the request was done.
#[must_use]
pub fn stopped(stopped: Stopped) -> Status {
    Status::unavailable(stopped.to_string())
}

/// The store failed for a reader.
#[must_use]
pub fn store(error: store::Error) -> Status {
    internal(&error)
}

/// A blob.
#[must_use]
pub fn blob(error: blobs::Error) -> Status {
    match &error {
        blobs::Error::Unknown(_) => Status::not_found(error.to_string()),
        blobs::Error::Mismatch { .. } => Status::data_loss(error.to_string()),
        blobs::Error::TooLarge | blobs::Error::PastEnd { .. } => Status::out_of_range(error.to_string()),
        blobs::Error::DiskFull => Status::resource_exhausted(error.to_string()),
        blobs::Error::Io { .. } => internal(&error),
    }
}

/// Output.
#[must_use]
pub fn log(error: logs::Error) -> Status {
    match &error {
        logs::Error::DiskFull => Status::resource_exhausted(error.to_string()),
        logs::Error::Io { .. } => internal(&error),
    }
}

/// No room for more.
#[must_use]
pub fn no_room(lack: room::NoRoom) -> Status {
    match &lack {
        room::NoRoom::Full { .. } => Status::resource_exhausted(lack.to_string()),
        room::NoRoom::Silent => Status::unavailable(lack.to_string()),
    }
}

/// What a job runs.
#[must_use]
pub fn start(error: starts::Error) -> Status {
    internal(&error)
}

/// A join token.
#[must_use]
pub fn token(error: tokens::Error) -> Status {
    match error {
        tokens::Error::Malformed => Status::invalid_argument(error.to_string()),
        tokens::Error::Unknown | tokens::Error::WrongSecret | tokens::Error::Expired(_) | tokens::Error::Used => {
            Status::unauthenticated(error.to_string())
        }
        tokens::Error::Store(source) => store(source),
    }
}

/// A certificate.
#[must_use]
pub fn identity(error: identity::Error) -> Status {
    match &error {
        identity::Error::Request { .. } => Status::invalid_argument(error.to_string()),
        identity::Error::Folder(_)
        | identity::Error::Certificate { .. }
        | identity::Error::Pem { .. }
        | identity::Error::Damaged { .. }
        | identity::Error::Exists { .. }
        | identity::Error::Tls(_) => internal(&error),
    }
}

/// The caller gets the sentence; the chain of causes, with its paths, stays in our log.
fn internal(error: &dyn std::error::Error) -> Status {
    tracing::error!("{}", crate::chain(error));
    Status::internal(error.to_string())
}
