//! What nobody will ask for again.

use super::Fleet;
use crate::ids::JobId;

impl Fleet {
    /// Forgets a job that is over, with its idempotency key; false if it is not over, or unknown. For a shell that
    /// keeps no history: nothing is told to be stored, so the coordinator must not call this.
    pub fn forget_job(&mut self, id: JobId) -> bool {
        let Some(job) = self.jobs.get(&id).filter(|job| job.finished.is_some() && job.live.is_empty()) else {
            return false;
        };
        if self.keys.get(&job.key) == Some(&id) {
            self.keys.remove(&job.key);
        }
        self.jobs.remove(&id);
        true
    }
}
