//! What attempts run: from a job's stored template to the orders of a node.
//!
//! A job's body and task table are decoded once and kept while they are in
//! use. Small files are read from their blob and travel inside the order, so
//! that an agent asks for large ones only.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use muster_core::{
    end::End,
    ids::{AttemptId, Epoch, JobId, TaskIndex},
    limits,
};
use muster_proto::{
    convert,
    v1::{self, file_content::Source},
};
use prost::Message;

use crate::{
    blobs::{self, Blobs},
    rpc::Detail,
    store::{self, Reader, StoredAttempt},
};

/// Jobs whose bodies are kept decoded.
const KEPT_JOBS_MAX: usize = 512;
/// Bytes of small files that one order's body, or one task of it, carries.
const INLINE_TOTAL_MAX: u64 = 1 << 20;
/// A Start message is closed at this size: well below the limit of a message.
const MESSAGE_BYTES_SOFT: usize = limits::MESSAGE_BYTES_MAX / 2;

/// Why a job's orders could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store failed.
    #[error("cannot read what job {job} runs")]
    Store {
        /// The job.
        job: JobId,
        /// Why.
        #[source]
        source: store::Error,
    },
    /// No template with the job.
    #[error("what job {job} runs is missing or does not read")]
    Missing {
        /// The job.
        job: JobId,
    },
    /// A blob that was there at submit is gone.
    #[error("a file of job {job} cannot be read")]
    Blob {
        /// The job.
        job: JobId,
        /// Why.
        #[source]
        source: blobs::Error,
    },
}

/// What a job's tasks run.
#[derive(Debug)]
pub struct Parts {
    /// Common to all tasks.
    pub body: v1::JobBody,
    /// What differs, if anything.
    pub table: Option<v1::TaskTable>,
    /// Told to tasks of a plain array.
    pub first_index: u32,
    /// A plain array: each task's item is its index.
    pub array: bool,
    /// Blobs are to be read for its orders.
    pub blobs: bool,
    /// What an attempt saved when it was drained is there when the next one starts.
    pub saves: bool,
}

impl Parts {
    /// From a template and its decoded table.
    #[must_use]
    pub fn new(template: &v1::JobTemplate, table: Option<v1::TaskTable>) -> Self {
        let mut body = template.body.clone().unwrap_or_default();
        body.first_index = template.first_index;
        let array = table.is_none() && (template.tasks > 1 || template.first_index > 0);
        let blobs = convert::blobs_in(&body, table.as_ref()).next().is_some();
        let saves = body.on_drain() == v1::OnDrain::Checkpoint && !body.outputs.is_empty();
        Self { body, table, first_index: template.first_index, array, blobs, saves }
    }

    fn item(&self, task: TaskIndex) -> Option<Bytes> {
        if self.array {
            return Some((u64::from(self.first_index) + u64::from(task)).to_string().into());
        }
        self.row(task).and_then(|row| row.item.clone())
    }

    fn row(&self, task: TaskIndex) -> Option<&v1::TaskParameters> {
        self.table.as_ref()?.tasks.get(task as usize)
    }
}

/// Decoded bodies, the most recently used ones kept.
pub struct Bodies {
    reader: Arc<dyn Reader>,
    blobs: Arc<Blobs>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    parts: HashMap<JobId, (Arc<Parts>, u64)>,
    by_use: BTreeMap<u64, JobId>,
    uses: u64,
}

impl Kept {
    fn touch(&mut self, job: JobId) -> Option<Arc<Parts>> {
        let (parts, used) = self.parts.get_mut(&job)?;
        self.by_use.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.by_use.insert(self.uses, job);
        Some(parts.clone())
    }

    fn put(&mut self, job: JobId, parts: Arc<Parts>) {
        self.uses += 1;
        if let Some((_, used)) = self.parts.insert(job, (parts, self.uses)) {
            self.by_use.remove(&used);
        }
        self.by_use.insert(self.uses, job);
        while self.parts.len() > KEPT_JOBS_MAX {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            self.parts.remove(&oldest);
        }
    }
}

impl Bodies {
    /// Nothing is kept yet.
    #[must_use]
    pub fn new(reader: Arc<dyn Reader>, blobs: Arc<Blobs>) -> Self {
        Self { reader, blobs, kept: Mutex::new(Kept::default()) }
    }

    /// Keeps a new job's parts: its first start follows at once.
    pub fn put(&self, job: JobId, parts: Arc<Parts>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).put(job, parts);
    }

    /// What a job runs. May block.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn get(&self, job: JobId) -> Result<Arc<Parts>, Error> {
        if let Some(parts) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).touch(job) {
            return Ok(parts);
        }
        let stored = self.reader.template(job).map_err(|source| Error::Store { job, source })?;
        let bytes = stored.ok_or(Error::Missing { job })?;
        let template = v1::JobTemplate::decode(bytes).map_err(|_| Error::Missing { job })?;
        let parts = Arc::new(self.decode(job, &template)?);
        self.put(job, parts.clone());
        Ok(parts)
    }

    /// The orders for these attempts can be made without a read from the disk.
    #[must_use]
    pub fn are_at_hand(&self, attempts: &[(AttemptId, Epoch)]) -> bool {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = None;
        attempts.iter().all(|(attempt, _)| {
            let again = attempt.number.get() > 1;
            // Attempts of one job come in a row.
            (last == Some(attempt.job) && !again) || {
                last = Some(attempt.job);
                kept.parts.get(&attempt.job).is_some_and(|(parts, _)| !(parts.blobs || (parts.saves && again)))
            }
        })
    }

    fn decode(&self, job: JobId, template: &v1::JobTemplate) -> Result<Parts, Error> {
        let table = match &template.task_table {
            Some(reference) => Some(self.table(reference).map_err(|source| Error::Blob { job, source })?),
            None => None,
        };
        let table = table.map(v1::TaskTable::decode).transpose().map_err(|_| Error::Missing { job })?;
        Ok(Parts::new(template, table))
    }

    /// A task table's bytes. Blocks.
    ///
    /// # Errors
    /// The blob is not there, or not that long.
    pub fn table(&self, reference: &v1::BlobRef) -> Result<Bytes, blobs::Error> {
        let (digest, offset, length) =
            convert::blob("task_table", reference).map_err(|_| blobs::Error::Unknown([0; 32]))?;
        let length = if length == 0 { self.blobs.length(&digest)?.saturating_sub(offset) } else { length };
        self.blobs.check(&digest, offset, length)?;
        self.blobs.slice(&digest, offset, usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// What an attempt of the task saved when it was drained: the next one finds it where it was.
    fn saved(&self, attempt: AttemptId) -> Result<Vec<v1::InputFile>, Error> {
        let tasks = attempt.task..attempt.task.saturating_add(1);
        let failed = |source| Error::Store { job: attempt.job, source };
        let earlier = self.reader.attempts(attempt.job, tasks).map_err(failed)?;
        let is_drained =
            |stored: &StoredAttempt| stored.record.ended.as_ref().is_some_and(|ended| ended.end == End::Drained);
        // One that was drained before it could save says nothing against what an earlier one saved.
        let outputs = earlier
            .into_iter()
            .rev()
            .filter(|stored| stored.id.number < attempt.number && is_drained(stored))
            .filter_map(|stored| Detail::read(stored.detail.as_deref()).ended)
            .map(|ended| ended.outputs)
            .find(|outputs| !outputs.is_empty());
        let to_input =
            |output: v1::OutputFile| v1::InputFile { path: output.path, content: output.content, executable: false };
        Ok(outputs.unwrap_or_default().into_iter().map(to_input).collect())
    }

    /// The orders for these attempts, as few messages as fit. Blocks when files are read.
    ///
    /// # Errors
    /// The store failed. What one job runs may be unreadable for good, which is told beside the orders of the others.
    pub fn orders(&self, attempts: &[(AttemptId, Epoch)]) -> Result<Orders, Error> {
        let mut orders = Orders::default();
        let mut current = v1::StartAttempts::default();
        let mut size = 0;
        let mut files = Files::new(&self.blobs);
        for &(attempt, epoch) in attempts {
            let has_body = current.bodies.iter().any(|body: &v1::JobBody| body.job == attempt.job.0);
            let made = self.start(attempt, epoch, &mut files).and_then(|(parts, start)| {
                let full = size + start.encoded_len() > MESSAGE_BYTES_SOFT && !current.attempts.is_empty();
                let failed = |source| Error::Blob { job: attempt.job, source };
                let body = (full || !has_body).then(|| files.inline_body(&parts.body, attempt.job));
                Ok((full, start, body.transpose().map_err(failed)?))
            });
            let (full, start, body) = match made {
                Ok(made) => made,
                Err(error @ Error::Store { .. }) => return Err(error),
                Err(error @ (Error::Missing { .. } | Error::Blob { .. })) => {
                    orders.unreadable.push(Unreadable { attempt, epoch, error });
                    continue;
                }
            };
            if full {
                orders.messages.push(std::mem::take(&mut current));
                size = 0;
            }
            size += start.encoded_len() + body.as_ref().map_or(0, Message::encoded_len);
            current.bodies.extend(body);
            current.attempts.push(start);
        }
        if !current.attempts.is_empty() {
            orders.messages.push(current);
        }
        Ok(orders)
    }

    fn start(
        &self,
        attempt: AttemptId,
        epoch: Epoch,
        files: &mut Files<'_>,
    ) -> Result<(Arc<Parts>, v1::StartAttempt), Error> {
        let parts = self.get(attempt.job)?;
        let mut own = parts.row(attempt.task).map(|row| row.inputs.clone()).unwrap_or_default();
        if parts.saves && attempt.number.get() > 1 {
            let saved = self.saved(attempt)?;
            own.retain(|input| !saved.iter().any(|saved| saved.path == input.path));
            own.extend(saved);
        }
        let failed = |source| Error::Blob { job: attempt.job, source };
        let inputs = if own.is_empty() { own } else { files.inline_inputs(&own).map_err(failed)? };
        let item = parts.item(attempt.task);
        Ok((parts, v1::StartAttempt { attempt: Some(attempt.into()), epoch: Some(epoch.into()), item, inputs }))
    }
}

/// What goes to a node for the attempts that are placed on it.
#[derive(Debug, Default)]
pub struct Orders {
    /// To send, in order.
    pub messages: Vec<v1::StartAttempts>,
    /// Attempts that cannot be ordered, on no node.
    pub unreadable: Vec<Unreadable>,
}

/// An attempt whose job cannot be read: it ends without having run, so that one damaged file holds up that job alone.
#[derive(Debug)]
pub struct Unreadable {
    /// The attempt.
    pub attempt: AttemptId,
    /// As it would have been ordered.
    pub epoch: Epoch,
    /// Why.
    pub error: Error,
}

impl Unreadable {
    /// How it ends: at the step of its start that the coordinator could not prepare.
    #[must_use]
    pub fn end(&self) -> End {
        let (step, errno) = match &self.error {
            Error::Blob { source, .. } => ("inputs", source.errno()),
            Error::Missing { .. } | Error::Store { .. } => ("order", libc::ENODATA),
        };
        End::StartFailed { step: step.to_owned(), errno }
    }
}

/// Open blobs of one order: tasks of a job often share a pack.
struct Files<'a> {
    blobs: &'a Blobs,
    open: HashMap<blobs::Digest, File>,
}

impl<'a> Files<'a> {
    fn new(blobs: &'a Blobs) -> Self {
        Self { blobs, open: HashMap::new() }
    }

    fn inline_body(&mut self, body: &v1::JobBody, job: JobId) -> Result<v1::JobBody, blobs::Error> {
        let mut body = body.clone();
        body.job = job.0;
        body.inputs = self.inline_inputs(&body.inputs)?;
        if let Some(stdin) = &mut body.stdin {
            let mut left = INLINE_TOTAL_MAX;
            self.inline(stdin, &mut left)?;
        }
        Ok(body)
    }

    fn inline_inputs(&mut self, inputs: &[v1::InputFile]) -> Result<Vec<v1::InputFile>, blobs::Error> {
        let mut inputs = inputs.to_vec();
        let mut left = INLINE_TOTAL_MAX;
        for content in inputs.iter_mut().filter_map(|input| input.content.as_mut()) {
            self.inline(content, &mut left)?;
        }
        Ok(inputs)
    }

    fn inline(&mut self, content: &mut v1::FileContent, left: &mut u64) -> Result<(), blobs::Error> {
        let Some(Source::Blob(reference)) = &content.source else { return Ok(()) };
        let length = reference.length;
        if length > limits::INLINE_FILE_BYTES_MAX as u64 || length > *left {
            return Ok(());
        }
        let Ok(digest) = blobs::Digest::try_from(reference.digest.as_ref()) else { return Ok(()) };
        *left -= length;
        let offset = reference.offset;
        let bytes = self.read(digest, offset, length)?;
        content.source = Some(Source::Inline(bytes));
        Ok(())
    }

    fn read(&mut self, digest: blobs::Digest, offset: u64, length: u64) -> Result<Bytes, blobs::Error> {
        let file = match self.open.entry(digest) {
            std::collections::hash_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => free.insert(self.blobs.file(&digest)?),
        };
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, offset).map_err(|source| blobs::Error::Io { doing: "read", source })?;
        Ok(bytes.into())
    }
}

impl std::fmt::Debug for Bodies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bodies").finish_non_exhaustive()
    }
}
