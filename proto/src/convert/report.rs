//! What an agent says: hello, heartbeats, ends.

use muster_core::{
    effect::StopReason,
    end::{End, Limit, NodeLoss},
    event::{DrainThen, Held, HeldPhase, Hello, HostSample},
    ids::Revision,
    limits,
};
use prost::Message as _;

use super::{Checked, amounts, attempt_id, epoch, labels, reject, required, text};
use crate::v1;

const FENCES_MAX: usize = 256;

/// An agent's first message.
///
/// # Errors
/// Names the field that is missing or senseless.
pub fn hello(wire: &v1::Hello) -> Checked<Hello> {
    if wire.boot_id.is_empty() {
        return reject("hello.boot_id", "is missing");
    }
    if wire.fences.len() > FENCES_MAX {
        return reject("hello.fences", format!("has at most {FENCES_MAX} entries"));
    }
    let fences = wire.fences.iter().map(|fence| text("hello.fences", fence, limits::NAME_LEN_MAX));
    let capacity = amounts("hello.capacity", required("hello.capacity", wire.capacity.as_ref())?)?;
    if capacity.cpu_milli == 0 || capacity.memory_bytes == 0 {
        return reject("hello.capacity", "has CPU and memory");
    }
    let agent = text("hello.agent_version", &wire.agent_version, limits::NAME_LEN_MAX)?;
    let kernel = text("hello.kernel", &wire.kernel, limits::NAME_LEN_MAX)?;
    Ok(Hello {
        boot_id: text("hello.boot_id", &wire.boot_id, limits::NAME_LEN_MAX)?,
        agent_start: wire.agent_start,
        stream: wire.stream,
        instance: text("hello.instance", &wire.instance, limits::NAME_LEN_MAX)?,
        capacity,
        labels: labels("hello.labels", &wire.labels)?,
        fences: fences.collect::<Checked<_>>()?,
        held: held(&wire.held)?,
        closed_for_drain: Revision(wire.closed_for_drain),
        version: format!("{agent}, {kernel}"),
    })
}

/// The running set.
///
/// # Errors
/// An entry without id, epoch or phase.
pub fn held(wire: &[v1::HeldAttempt]) -> Checked<Vec<Held>> {
    use v1::held_attempt::Phase;
    wire.iter()
        .map(|held| {
            let phase = match Phase::try_from(held.phase) {
                Ok(Phase::Queued) => HeldPhase::Queued,
                Ok(Phase::Running) => HeldPhase::Running,
                Ok(Phase::Stopping) => HeldPhase::Stopping,
                Ok(Phase::Ended) => HeldPhase::Ended,
                Ok(Phase::Unspecified) | Err(_) => return reject("held.phase", "is none that this version knows"),
            };
            Ok(Held { attempt: attempt_id(held.attempt.as_ref())?, epoch: epoch(held.epoch.as_ref())?, phase })
        })
        .collect()
}

/// The figures of a heartbeat that rules read.
#[must_use]
pub fn sample(wire: Option<&v1::HostMetrics>) -> HostSample {
    wire.map_or_else(HostSample::default, |metrics| HostSample {
        cpu_used_milli: metrics.cpu_used_milli,
        memory_used_bytes: metrics.memory_used_bytes,
        disk_total_bytes: metrics.disk_total_bytes,
        disk_available_bytes: metrics.disk_available_bytes,
        // From hundredths of a percent to thousandths, of the resource that is shortest.
        pressure_permille: [metrics.cpu_pressure, metrics.memory_pressure, metrics.io_pressure]
            .into_iter()
            .flatten()
            .max()
            .map(|pressure| u64::from(pressure / 10)),
    })
}

/// How an attempt ended.
///
/// # Errors
/// No reason, or one that this version does not know.
pub fn end(wire: Option<&v1::End>) -> Checked<End> {
    use v1::end::Reason;
    let wire = required("end", wire)?;
    Ok(match required("end.reason", wire.reason.as_ref())? {
        Reason::Succeeded(_) => End::Succeeded,
        Reason::Exited(0) => End::Succeeded,
        Reason::Exited(code) => End::Exited(*code),
        Reason::Signaled(signal) => End::Signaled(*signal),
        Reason::OutOfMemory(memory) => {
            End::OutOfMemory { limit_bytes: memory.limit_bytes, peak_bytes: memory.peak_bytes }
        }
        Reason::TimedOut(_) => End::TimedOut,
        Reason::Limit(kind) => match v1::LimitKind::try_from(*kind) {
            Ok(v1::LimitKind::Disk) => End::Limit(Limit::Disk),
            Ok(v1::LimitKind::Output) => End::Limit(Limit::Output),
            Ok(v1::LimitKind::Unspecified) | Err(_) => return reject("end.limit", "is none that this version knows"),
        },
        Reason::Cancelled(_) => End::Cancelled,
        Reason::Drained(_) => End::Drained,
        Reason::Preempted(_) => End::Preempted,
        Reason::NodeLost(lost) => match v1::node_lost::Cause::try_from(lost.cause) {
            Ok(v1::node_lost::Cause::Silent) => End::NodeLost(NodeLoss::Silent),
            Ok(v1::node_lost::Cause::Rebooted) => End::NodeLost(NodeLoss::Rebooted),
            Ok(v1::node_lost::Cause::Unspecified) | Err(_) => {
                return reject("end.node_lost.cause", "is none that this version knows");
            }
        },
        Reason::SpawnerLost(_) => End::SpawnerLost,
        Reason::Refused(fence) => End::Refused(text("end.refused", fence, limits::REASON_LEN_MAX)?),
        Reason::StartFailed(failed) => End::StartFailed {
            step: text("end.start_failed.step", &failed.step, limits::NAME_LEN_MAX)?,
            errno: failed.errno,
        },
        Reason::OutputLost(_) => End::OutputLost,
    })
}

/// How an attempt ended, for the wire.
#[must_use]
pub fn end_to_wire(end: &End) -> v1::End {
    use v1::end::Reason;
    let empty = v1::Empty {};
    let reason = match end {
        End::Succeeded => Reason::Succeeded(empty),
        End::Exited(code) => Reason::Exited(*code),
        End::Signaled(signal) => Reason::Signaled(*signal),
        End::OutOfMemory { limit_bytes, peak_bytes } => {
            Reason::OutOfMemory(v1::OutOfMemory { limit_bytes: *limit_bytes, peak_bytes: *peak_bytes })
        }
        End::TimedOut => Reason::TimedOut(empty),
        End::Limit(Limit::Disk) => Reason::Limit(v1::LimitKind::Disk.into()),
        End::Limit(Limit::Output) => Reason::Limit(v1::LimitKind::Output.into()),
        End::Cancelled => Reason::Cancelled(empty),
        End::Drained => Reason::Drained(empty),
        End::Preempted => Reason::Preempted(empty),
        End::NodeLost(NodeLoss::Silent) => {
            Reason::NodeLost(v1::NodeLost { cause: v1::node_lost::Cause::Silent.into() })
        }
        End::NodeLost(NodeLoss::Rebooted) => {
            Reason::NodeLost(v1::NodeLost { cause: v1::node_lost::Cause::Rebooted.into() })
        }
        End::SpawnerLost => Reason::SpawnerLost(empty),
        End::Refused(fence) => Reason::Refused(fence.clone()),
        End::StartFailed { step, errno } => Reason::StartFailed(v1::StartFailed { step: step.clone(), errno: *errno }),
        End::OutputLost => Reason::OutputLost(empty),
    };
    v1::End { reason: Some(reason) }
}

/// What is kept with an end, encoded: the message less what the record itself holds.
///
/// # Errors
/// Tails or inline outputs beyond their limits.
pub fn detail(wire: &v1::AttemptEnded) -> Checked<Vec<u8>> {
    let tails: usize = wire.tails.iter().map(|tail| tail.data.len()).sum();
    if tails > limits::INLINE_TAIL_BYTES_MAX {
        return reject("ended.tails", format!("have at most {} bytes together", limits::INLINE_TAIL_BYTES_MAX));
    }
    if wire.outputs.len() + wire.skipped_outputs.len() > limits::INPUT_FILES_MAX {
        return reject("ended.outputs", format!("has at most {} files", limits::INPUT_FILES_MAX));
    }
    for output in &wire.outputs {
        if let Some(v1::file_content::Source::Inline(data)) = output.content.as_ref().and_then(|c| c.source.as_ref())
            && data.len() > limits::INLINE_FILE_BYTES_MAX
        {
            return reject(
                "ended.outputs",
                format!("an inline file has at most {} bytes", limits::INLINE_FILE_BYTES_MAX),
            );
        }
    }
    Ok(wire.encode_to_vec())
}

/// What follows a drain, by its word; empty: nothing.
///
/// # Errors
/// No such word.
pub fn drain_then(word: &str) -> Checked<DrainThen> {
    match word {
        "" | "nothing" => Ok(DrainThen::Nothing),
        "stop" => Ok(DrainThen::Stop),
        "poweroff" => Ok(DrainThen::Poweroff),
        "delete" => Ok(DrainThen::Delete),
        _unknown => reject("then", "is nothing, stop, poweroff or delete"),
    }
}

/// The word for what follows a drain.
#[must_use]
pub const fn then_name(then: DrainThen) -> &'static str {
    match then {
        DrainThen::Nothing => "nothing",
        DrainThen::Stop => "stop",
        DrainThen::Poweroff => "poweroff",
        DrainThen::Delete => "delete",
    }
}

/// What follows a drain, for the wire.
#[must_use]
pub const fn then_to_wire(then: DrainThen) -> v1::release::Then {
    match then {
        DrainThen::Nothing => v1::release::Then::Nothing,
        DrainThen::Stop => v1::release::Then::Stop,
        DrainThen::Poweroff => v1::release::Then::Poweroff,
        DrainThen::Delete => v1::release::Then::Delete,
    }
}

/// Why an attempt is being ended, for the wire.
#[must_use]
pub const fn stop_to_wire(reason: StopReason) -> v1::StopReason {
    match reason {
        StopReason::Cancelled => v1::StopReason::Cancelled,
        StopReason::Drained => v1::StopReason::Drained,
        StopReason::Preempted => v1::StopReason::Preempted,
        StopReason::Superseded => v1::StopReason::Superseded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_comes_back_as_it_went() {
        let ends = [
            End::Succeeded,
            End::Exited(3),
            End::Signaled(9),
            End::OutOfMemory { limit_bytes: 1, peak_bytes: 2 },
            End::TimedOut,
            End::Limit(Limit::Disk),
            End::Limit(Limit::Output),
            End::Cancelled,
            End::Drained,
            End::Preempted,
            End::NodeLost(NodeLoss::Silent),
            End::NodeLost(NodeLoss::Rebooted),
            End::SpawnerLost,
            End::Refused("ns.pid".into()),
            End::StartFailed { step: "exec".into(), errno: 2 },
            End::OutputLost,
        ];
        for known in ends {
            assert_eq!(end(Some(&end_to_wire(&known))), Ok(known));
        }
    }

    #[test]
    fn an_end_without_a_reason_is_rejected() {
        assert_eq!(end(Some(&v1::End { reason: None })).unwrap_err().field, "end.reason");
        assert!(end(None).is_err());
    }
}
