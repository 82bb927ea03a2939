//! Follows a job to its end, over breaks of the connection: a coordinator that
//! is started again goes on with the same jobs.

use std::time::Duration;

use muster_core::ids::JobId;
use muster_proto::v1::{JobProgress, WatchJobRequest};
use tonic::Code;

use crate::{
    client::Client,
    exit::{Exit, Failure, Result},
};

/// A stream that broke is opened again this often in a row.
const TRIES: u32 = 20;
/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(250);

/// Counts the breaks of a stream, and waits before it is opened again.
#[derive(Debug, Default)]
pub struct Breaks {
    in_a_row: u32,
}

impl Breaks {
    /// Something came: the stream works.
    pub const fn works(&mut self) {
        self.in_a_row = 0;
    }

    /// Waits, or gives the error back when it is none of the connection's or has come too often.
    pub async fn wait(&mut self, client: &Client, error: tonic::Status) -> Result<()> {
        self.in_a_row += 1;
        let broken = matches!(error.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted);
        if !broken || self.in_a_row > TRIES {
            return Err(error.into());
        }
        tokio::time::sleep(TRY_AGAIN).await;
        client.find_again().await;
        Ok(())
    }
}

/// Progress until the job is finished; the last step.
pub async fn until_finished(client: &Client, job: u64, each: &mut dyn FnMut(&JobProgress)) -> Result<JobProgress> {
    let mut breaks = Breaks::default();
    loop {
        let error = match client.jobs().watch(WatchJobRequest { job, follow: true }).await {
            Err(status) => status,
            Ok(steps) => {
                let mut steps = steps.into_inner();
                loop {
                    match steps.message().await {
                        Ok(Some(step)) => {
                            breaks.works();
                            each(&step);
                            if step.finished {
                                return Ok(step);
                            }
                        }
                        Ok(None) => break tonic::Status::unavailable("the coordinator ended the watch"),
                        Err(status) => break status,
                    }
                }
            }
        };
        breaks.wait(client, error).await.map_err(|failure| told(failure, job))?;
    }
}

fn told(failure: Failure, job: u64) -> Failure {
    if failure.exit != Exit::Unreachable {
        return failure;
    }
    let id = JobId(job);
    Failure {
        sentence: format!(
            "the coordinator cannot be reached any more; job {id} goes on, `muster job wait {id}` comes back to it"
        ),
        ..failure
    }
}
