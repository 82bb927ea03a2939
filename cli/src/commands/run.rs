//! `muster run`: one job, its output as it comes, its exit code. Ctrl-C leaves
//! it running and says how to come back.

use std::process::ExitCode;

use muster_core::ids::JobId;
use muster_proto::v1::{End, JobProgress, end};

use super::{Context, logs, submit, watch::until_finished};
use crate::{
    args::Run,
    exit::{Exit, Result},
    template::Draft,
};

/// Submits, streams, and answers with the job's code.
pub async fn run(context: &Context, run: Run) -> Result<ExitCode> {
    let client = context.connect().await?;
    let mut draft = Draft::default();
    draft.apply(run.command, run.options);
    let job = submit::submit(context, &client, draft).await?.job;
    let id = JobId(job);
    let way_back = format!("`muster job logs -f {id}` comes back to it; `muster job cancel {id}` ends it.");
    let both = async {
        let shown = logs::follow(context, &client, job, 0, 0, run.raw);
        let mut nobody = |_: &JobProgress| ();
        let (shown, last) = tokio::join!(shown, until_finished(&client, job, &mut nobody));
        shown?;
        Ok(last?.end)
    };
    let end = context.wait(&format!("job {id}"), &way_back, both).await?;
    Ok(exit_code(context, id, end.as_ref()))
}

/// The job's own code; what was not its own doing is told.
pub fn exit_code(context: &Context, id: JobId, end: Option<&End>) -> ExitCode {
    let Some(reason) = end.and_then(|end| end.reason.as_ref()) else {
        context.output.say(&format!("muster: job {id} has finished; how is not known, see `muster job inspect {id}`"));
        return Exit::Failed.into();
    };
    let code = code_of(reason);
    if !matches!(reason, end::Reason::Succeeded(_) | end::Reason::Exited(_)) {
        context.output.say(&format!("muster: job {id} ended: {}", super::show::end_name(reason)));
    }
    ExitCode::from(code)
}

/// As a shell would say it: 128 and the signal; 127 and 126 for a program that is not there or not to be run.
fn code_of(reason: &end::Reason) -> u8 {
    match reason {
        end::Reason::Succeeded(_) => 0,
        end::Reason::Exited(code) => u8::try_from(*code).unwrap_or(1),
        end::Reason::Signaled(signal) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(1),
        end::Reason::OutOfMemory(_) => 137,
        end::Reason::TimedOut(_) => 124,
        end::Reason::StartFailed(failed) if failed.step == "exec" => match failed.errno {
            libc::ENOENT => 127,
            libc::EACCES | libc::ENOEXEC => 126,
            _ => 1,
        },
        end::Reason::StartFailed(_)
        | end::Reason::Limit(_)
        | end::Reason::Cancelled(_)
        | end::Reason::Drained(_)
        | end::Reason::Preempted(_)
        | end::Reason::NodeLost(_)
        | end::Reason::SpawnerLost(_)
        | end::Reason::Refused(_)
        | end::Reason::OutputLost(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use muster_proto::v1::{Empty, StartFailed};

    use super::*;

    #[test]
    fn codes_are_those_of_a_shell() {
        assert_eq!(code_of(&end::Reason::Succeeded(Empty {})), 0);
        assert_eq!(code_of(&end::Reason::Exited(42)), 42);
        assert_eq!(code_of(&end::Reason::Signaled(9)), 137);
        let missing = StartFailed { step: "exec".into(), errno: libc::ENOENT };
        assert_eq!(code_of(&end::Reason::StartFailed(missing)), 127);
        assert_eq!(code_of(&end::Reason::Refused("ns.pid".into())), 1);
    }
}
