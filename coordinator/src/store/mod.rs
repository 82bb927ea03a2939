//! Where the fleet's state is kept: what a store promises, whatever it is.
//!
//! A commit is all or nothing and durable when it returns. There is one writer,
//! the driver; readers see only what is committed and never delay it.

mod checksum;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod damage;
mod embedded;
pub mod postgres;
mod rows;
mod salvage;
mod survey;
mod wal;

use bytes::Bytes;
use muster_core::{
    effect::{AttemptRecord, Evidence, HistoryEntry, Sizes, Subject},
    fleet::{Image, Meta},
    ids::{AttemptId, HostRequestId, JobId, NodeId, PoolName, TaskIndex},
    job::JobRecord,
    node::NodeRecord,
    pool::PoolRecord,
    time::Timestamp,
};

pub use self::{
    embedded::EmbeddedStore,
    salvage::salvage,
    survey::{Findings, check_state, survey},
};

/// Why a data base failed.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data base refused or failed.
    #[error("cannot {doing} in the store")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: Cause,
    },
    /// Nobody answers, or not in time.
    #[error("cannot reach the store at {place}")]
    Unreachable {
        /// Where, without its password.
        place: String,
        /// Why.
        #[source]
        source: Cause,
    },
    /// The address or what the server has set does not serve.
    #[error("the store is refused: {reason}")]
    Unfit {
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Another coordinator leads: what this one decides no longer counts.
    #[error("another coordinator leads now; nothing of this batch was stored")]
    Deposed,
    /// A row does not read as what it must be.
    #[error("the store is damaged: {what}")]
    Damaged {
        /// Which row, and what is wrong.
        what: String,
    },
    /// Written by a later version.
    #[error("the store has schema {found}, and this version knows {known}; start the version that wrote it")]
    NewerSchema {
        /// In the store.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The folder says that there must be one.
    #[error(
        "{folder} belongs to a fleet, but its store {file} is missing; restore it from a backup, or move the folder away to begin anew"
    )]
    Missing {
        /// The data folder.
        folder: String,
        /// The file.
        file: String,
    },
}

/// All that one batch changes, committed in one transaction.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    /// The driver's time: the next start begins after it.
    pub now: Timestamp,
    /// Counters, if they changed.
    pub meta: Option<&'a Meta>,
    /// Bodies of newly accepted jobs.
    pub templates: Vec<(JobId, Bytes)>,
    /// Jobs as they are now.
    pub jobs: Vec<(JobId, &'a JobRecord)>,
    /// Nodes as they are now; none: forgotten.
    pub nodes: Vec<(NodeId, Option<&'a NodeRecord>)>,
    /// Pools as they are now; none: delete the row.
    pub pools: Vec<(&'a PoolName, Option<&'a PoolRecord>)>,
    /// Attempts as they are now.
    pub attempts: Vec<(AttemptId, &'a AttemptRecord)>,
    /// Taken back before they started: their rows go.
    pub withdrawn: Vec<AttemptId>,
    /// To be appended.
    pub history: &'a [HistoryEntry],
    /// To be appended.
    pub evidence: &'a [Evidence],
}

impl Batch<'_> {
    /// Nothing is to be stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.meta.is_none()
            && self.templates.is_empty()
            && self.jobs.is_empty()
            && self.nodes.is_empty()
            && self.pools.is_empty()
            && self.attempts.is_empty()
            && self.withdrawn.is_empty()
            && self.history.is_empty()
            && self.evidence.is_empty()
    }
}

/// The one writer's side.
pub trait Store: Send {
    /// All that the core starts from, and the last stored time.
    ///
    /// # Errors
    /// Unreadable or damaged rows.
    fn load(&mut self) -> Result<(Image, Timestamp), Error>;

    /// How many commits it has taken since it was made.
    ///
    /// # Errors
    /// The data base failed.
    fn commits(&mut self) -> Result<u64, Error>;

    /// Makes a batch durable, all or nothing. Answers the last history revision.
    ///
    /// # Errors
    /// Whatever it is, nobody knows what is on the disk: the process must end.
    fn commit(&mut self, batch: &Batch<'_>) -> Result<u64, Error>;
}

/// A history entry with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place.
    pub revision: u64,
    /// When.
    pub at: Timestamp,
    /// As [`subject_name`] says it.
    pub subject: String,
    /// The kind of event.
    pub kind: String,
    /// The sentence.
    pub reason: String,
    /// Who caused it.
    pub actor: Option<String>,
    /// Size before and after, of a scaling decision.
    pub sizes: Option<Sizes>,
}

/// Which part of the history is asked.
#[derive(Clone, Debug, Default)]
pub struct HistoryQuery {
    /// Only later ones.
    pub after: u64,
    /// Only about this; empty: all.
    pub subject: String,
    /// Only of this kind; empty: all.
    pub kind: String,
    /// At most so many.
    pub limit: u32,
    /// The newest of them rather than the first; in order all the same.
    pub newest: bool,
}

/// An attempt with what the shell keeps beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAttempt {
    /// Which.
    pub id: AttemptId,
    /// As the core knows it.
    pub record: AttemptRecord,
    /// `muster.v1.AttemptEnded`, once it has ended by a report.
    pub detail: Option<Vec<u8>>,
}

/// A join token as it is stored: the secret itself never is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRecord {
    /// Public part.
    pub id: [u8; 16],
    /// SHA-256 of the secret.
    pub secret: [u8; 32],
    /// Pool of the node that uses it.
    pub pool: PoolName,
    /// The provider's request that it was made for.
    pub host: Option<HostRequestId>,
    /// By the driver's clock.
    pub expires: Timestamp,
    /// The first key that used it.
    pub used_by: Option<[u8; 32]>,
}

/// The readers' side: committed rows only. Cheap to clone; each call may block.
pub trait Reader: Send + Sync {
    /// A job's template, encoded.
    ///
    /// # Errors
    /// The data base failed.
    fn template(&self, job: JobId) -> Result<Option<Bytes>, Error>;

    /// Attempts of a range of a job's tasks, in task order, oldest first.
    ///
    /// # Errors
    /// The data base failed, or a row is damaged.
    fn attempts(&self, job: JobId, tasks: std::ops::Range<TaskIndex>) -> Result<Vec<StoredAttempt>, Error>;

    /// A part of the history, in order.
    ///
    /// # Errors
    /// The data base failed.
    fn history(&self, query: &HistoryQuery) -> Result<Vec<Entry>, Error>;

    /// Keeps a new token.
    ///
    /// # Errors
    /// The data base failed.
    fn add_token(&self, token: &TokenRecord) -> Result<(), Error>;

    /// A token by its public part.
    ///
    /// # Errors
    /// The data base failed.
    fn token(&self, id: [u8; 16]) -> Result<Option<TokenRecord>, Error>;

    /// Binds a token to the first key that uses it; answers the key that it is bound to now.
    ///
    /// # Errors
    /// The data base failed.
    fn bind_token(&self, id: [u8; 16], key: [u8; 32]) -> Result<Option<[u8; 32]>, Error>;
}

/// How history names what an entry is about.
#[must_use]
pub fn subject_name(subject: &Subject) -> String {
    match subject {
        Subject::Fleet => "fleet".to_owned(),
        Subject::Job(job) => format!("job/{job}"),
        Subject::Node(node) => format!("node/{node}"),
        Subject::Pool { name, .. } => format!("pool/{name}"),
    }
}
