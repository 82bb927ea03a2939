//! How a command ends: the exit codes, in one enum, and the one table from
//! gRPC codes to them. An error is one sentence; its causes are shown with -v.

use std::{fmt, process::ExitCode};

use tonic::Code;

/// What a command's exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Failed; or the job failed, under `--wait`.
    Failed = 1,
    /// The command line or a file that it names is wrong.
    Usage = 2,
    /// What was named does not exist.
    NotFound = 3,
    /// The caller may not do this.
    NotAllowed = 4,
    /// The state of what was named forbids it.
    Conflict = 5,
    /// No answer from the coordinator.
    Unreachable = 6,
    /// A wait reached its time limit.
    TimedOut = 7,
    /// Some targets were done and some were not.
    Partial = 8,
    /// A dry run found something to do, or a replay is worse than its bounds.
    Pending = 10,
    /// Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The one table from gRPC codes to exit codes.
    pub const fn of_code(code: Code) -> Self {
        match code {
            Code::Ok => Self::Ok,
            Code::InvalidArgument | Code::OutOfRange => Self::Usage,
            Code::NotFound => Self::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Self::NotAllowed,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Self::Conflict,
            Code::Unavailable | Code::Cancelled => Self::Unreachable,
            Code::DeadlineExceeded => Self::TimedOut,
            Code::Unknown | Code::ResourceExhausted | Code::Unimplemented | Code::Internal | Code::DataLoss => {
                Self::Failed
            }
        }
    }
}

/// Why a command failed: the sentence that is shown, its causes, its exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What was asked, why not, what to do.
    pub sentence: String,
    /// Shown with -v.
    pub cause: Option<anyhow::Error>,
}

/// What commands return.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure without a cause of its own.
    pub fn new(exit: Exit, sentence: impl Into<String>) -> Self {
        Self { exit, sentence: sentence.into(), cause: None }
    }

    /// A wrong command line or file.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self::new(Exit::Usage, sentence)
    }

    /// The same failure with its cause.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// A file that could not be opened, read or written: exit 3 if it is missing, else 1.
    pub fn file(asked: &str, path: &std::path::Path, error: std::io::Error) -> Self {
        let exit = match error.kind() {
            std::io::ErrorKind::NotFound => Exit::NotFound,
            std::io::ErrorKind::PermissionDenied => Exit::NotAllowed,
            _ => Exit::Failed,
        };
        let why = error.to_string();
        let why = why.split(" (os error").next().unwrap_or_default();
        Self::new(exit, format!("cannot {asked} {}: {why}", crate::escape::path(path))).caused_by(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Failure {}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let exit = Exit::of_code(status.code());
        let message = crate::escape::text(status.message());
        let sentence = match exit {
            Exit::Unreachable => {
                format!(
                    "the connection to the coordinator broke ({message}); whether the request was done is not known, ask again"
                )
            }
            Exit::TimedOut => {
                String::from("the coordinator did not answer in time; whether the request was done is not known")
            }
            _ if message.is_empty() => format!("the coordinator answered {:?} without a reason", status.code()),
            _ => message,
        };
        Self { exit, sentence, cause: Some(status.into()) }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(Exit::Failed, format!("cannot write the answer: {error}")).caused_by(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grpc_code_has_the_exit_code_of_the_manual() {
        let table = [
            (Code::Ok, 0),
            (Code::InvalidArgument, 2),
            (Code::OutOfRange, 2),
            (Code::NotFound, 3),
            (Code::PermissionDenied, 4),
            (Code::Unauthenticated, 4),
            (Code::AlreadyExists, 5),
            (Code::FailedPrecondition, 5),
            (Code::Aborted, 5),
            (Code::Unavailable, 6),
            (Code::Cancelled, 6),
            (Code::DeadlineExceeded, 7),
            (Code::Internal, 1),
            (Code::ResourceExhausted, 1),
        ];
        for (code, exit) in table {
            assert_eq!(Exit::of_code(code) as u8, exit, "{code:?}");
        }
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let failure = Failure::file("read", std::path::Path::new("/no"), std::io::ErrorKind::NotFound.into());
        assert_eq!(failure.exit, Exit::NotFound);
    }
}
