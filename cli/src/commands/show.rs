//! The coordinator's messages as JSON values and words, the same in every command.

use muster_core::{ids::JobId, resources::Bytes};
use muster_proto::v1::{self, Attempt, End, FleetEvent, JobSummary, Node, Resources, Task, TaskCounts, end};
use serde_json::{Value, json};

use crate::{
    escape,
    output::{Output, time_value},
};

/// The name of an end, as in the closed table.
pub fn end_name(reason: &end::Reason) -> String {
    match reason {
        end::Reason::Succeeded(_) => String::from("succeeded"),
        end::Reason::Exited(code) => format!("exited({code})"),
        end::Reason::Signaled(signal) => format!("signaled({signal})"),
        end::Reason::OutOfMemory(memory) => {
            format!("out_of_memory(limit {}, peak {})", Bytes(memory.limit_bytes), Bytes(memory.peak_bytes))
        }
        end::Reason::TimedOut(_) => String::from("timed_out"),
        end::Reason::Limit(kind) => match v1::LimitKind::try_from(*kind) {
            Ok(v1::LimitKind::Disk) => String::from("limit(disk)"),
            Ok(v1::LimitKind::Output) => String::from("limit(output)"),
            Ok(v1::LimitKind::Unspecified) | Err(_) => String::from("limit"),
        },
        end::Reason::Cancelled(_) => String::from("cancelled"),
        end::Reason::Drained(_) => String::from("drained"),
        end::Reason::Preempted(_) => String::from("preempted"),
        end::Reason::NodeLost(lost) => match lost.cause() {
            v1::node_lost::Cause::Silent => String::from("node_lost(silent)"),
            v1::node_lost::Cause::Rebooted => String::from("node_lost(rebooted)"),
            v1::node_lost::Cause::Unspecified => String::from("node_lost"),
        },
        end::Reason::SpawnerLost(_) => String::from("spawner_lost"),
        end::Reason::Refused(fence) => format!("refused({})", escape::text(fence)),
        end::Reason::StartFailed(failed) => {
            let why = std::io::Error::from_raw_os_error(failed.errno).to_string();
            let why = why.split(" (os error").next().unwrap_or_default().to_lowercase();
            format!("start_failed({}: {why})", escape::text(&failed.step))
        }
        end::Reason::OutputLost(_) => String::from("output_lost"),
    }
}

/// The name of an end that may be absent.
pub fn end_text(end: Option<&End>) -> Option<String> {
    end.and_then(|end| end.reason.as_ref()).map(end_name)
}

fn end_value(end: Option<&End>) -> Value {
    let Some(reason) = end.and_then(|end| end.reason.as_ref()) else { return Value::Null };
    match reason {
        end::Reason::Exited(code) => json!({ "name": "exited", "exit_code": code }),
        end::Reason::Signaled(signal) => json!({ "name": "signaled", "signal": signal }),
        end::Reason::OutOfMemory(memory) => json!({
            "name": "out_of_memory", "limit_bytes": memory.limit_bytes, "peak_bytes": memory.peak_bytes,
        }),
        end::Reason::Refused(fence) => json!({ "name": "refused", "fence": fence }),
        end::Reason::StartFailed(failed) => {
            json!({ "name": "start_failed", "step": failed.step, "errno": failed.errno })
        }
        other => json!({ "name": end_name(other) }),
    }
}

/// Tasks by state.
pub fn counts(counts: Option<&TaskCounts>) -> Value {
    let counts = counts.cloned().unwrap_or_default();
    json!({
        "total": counts.total, "waiting": counts.waiting, "placed": counts.placed, "running": counts.running,
        "stopping": counts.stopping, "succeeded": counts.succeeded, "failed": counts.failed,
        "cancelled": counts.cancelled,
    })
}

/// A job in a list.
pub fn job(job: &JobSummary) -> Value {
    json!({
        "job": JobId(job.job).to_string(), "name": job.name, "state": job.state, "tasks": counts(job.counts.as_ref()),
        "submitted_at": time_value(Some(job.submitted_ms)), "finished_at": time_value(job.finished_ms),
        "owner": job.owner, "priority": job.priority, "reason": job.reason,
    })
}

/// Amounts, as integers.
pub fn resources(resources: Option<&Resources>) -> Value {
    match resources {
        None => Value::Null,
        Some(amounts) => json!({
            "cpu_milli": amounts.cpu_milli, "memory_bytes": amounts.memory_bytes, "disk_bytes": amounts.disk_bytes,
        }),
    }
}

/// An event.
pub fn event(event: &FleetEvent) -> Value {
    json!({
        "revision": event.revision, "time": time_value(Some(event.time_ms)), "subject": event.subject,
        "kind": event.kind, "reason": event.reason, "actor": event.actor,
    })
}

/// An event in one line.
pub fn event_line(event: &FleetEvent, output: &Output) -> String {
    let actor = if event.actor.is_empty() { String::new() } else { format!(" ({})", escape::text(&event.actor)) };
    format!(
        "{}  {}  {}  {}{actor}",
        output.time(event.time_ms),
        escape::text(&event.subject),
        escape::text(&event.kind),
        escape::text(&event.reason),
    )
}

/// A path is bytes: shown escaped, and exactly, in hex, when it is not text.
fn path(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "shown": escape::bytes(bytes), "hex": hex(bytes) }),
    }
}

/// Bytes in hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A try at a task.
pub fn attempt(attempt: &Attempt) -> Value {
    let id = attempt.attempt.unwrap_or_default();
    let usage = attempt.usage.as_ref().map(|usage| {
        json!({
            "cpu_ms": usage.cpu_milliseconds, "memory_bytes": usage.memory_bytes,
            "memory_peak_bytes": usage.memory_peak_bytes, "memory_byte_seconds": usage.memory_byte_seconds,
            "processes": usage.processes, "approximate": usage.approximate,
        })
    });
    let outputs: Vec<Value> = attempt
        .outputs
        .iter()
        .map(|output| json!({ "path": path(&output.path), "bytes": length(output), "sha256": hex(&output.digest) }))
        .collect();
    let skipped: Vec<Value> = attempt
        .skipped_outputs
        .iter()
        .map(|skipped| json!({ "path": path(&skipped.path), "reason": skipped.reason }))
        .collect();
    json!({
        "attempt": format!("{}.{}.{}", JobId(id.job), id.task, id.number), "number": id.number,
        "node": attempt.node_name, "node_id": attempt.node, "state": attempt.state,
        "placement_reason": attempt.placement_reason, "placed_at": time_value(Some(attempt.placed_ms)),
        "started_at": time_value(attempt.started_ms), "ended_at": time_value(attempt.ended_ms),
        "end": end_value(attempt.end.as_ref()), "presumed": attempt.presumed, "usage": usage,
        "fences": attempt.fences, "outputs": outputs, "skipped_outputs": skipped,
        "output_truncated": attempt.output_truncated, "start_us": attempt.start_us,
        "start_phases": attempt.start_phases.as_ref().map(phases), "wall_ms": attempt.wall_ms,
    })
}

fn phases(phases: &v1::StartPhases) -> Value {
    json!({
        "prepared": phases.prepared, "cgroup_us": phases.cgroup_us, "clone_us": phases.clone_us,
        "assemble_us": phases.assemble_us, "handover_us": phases.handover_us, "inputs_us": phases.inputs_us,
        "exec_us": phases.exec_us,
    })
}

/// How long a start took, in milliseconds: "start 0.31 ms: prepared, hand-over 0.05, inputs 0, exec 0.11".
pub fn start_text(attempt: &Attempt) -> String {
    let ms = |us: u64| match us {
        0 => String::from("0"),
        us => format!("{}.{:02}", us / 1_000, us % 1_000 / 10),
    };
    let total = format!("start {} ms", ms(attempt.start_us));
    let Some(phases) = &attempt.start_phases else { return total };
    let named = [
        ("cgroup", phases.cgroup_us),
        ("clone", phases.clone_us),
        ("assemble", phases.assemble_us),
        ("hand-over", phases.handover_us),
        ("inputs", phases.inputs_us),
        ("exec", phases.exec_us),
    ];
    // What was done ahead took nothing of this start.
    let ahead = if phases.prepared { 3 } else { 0 };
    let parts = named[ahead..].iter().map(|(name, us)| format!("{name} {}", ms(u64::from(*us))));
    let parts: Vec<String> = phases.prepared.then(|| String::from("prepared")).into_iter().chain(parts).collect();
    format!("{total}: {}", parts.join(", "))
}

/// The size of a returned file.
pub fn length(output: &v1::OutputFile) -> u64 {
    match output.content.as_ref().and_then(|content| content.source.as_ref()) {
        Some(v1::file_content::Source::Inline(bytes)) => bytes.len() as u64,
        Some(v1::file_content::Source::Blob(blob)) => blob.length,
        None => 0,
    }
}

/// A task with its attempts.
pub fn task(job: u64, task: &Task) -> Value {
    json!({
        "task": format!("{}.{}", JobId(job), task.index), "index": task.index, "state": task.state,
        "reason": task.reason, "attempts": task.attempts.iter().map(attempt).collect::<Vec<_>>(),
    })
}

/// A node.
pub fn node(node: &Node) -> Value {
    let drain = node.drain.as_ref().map(|drain| {
        json!({
            "revision": drain.revision, "deadline": time_value(drain.deadline_ms), "then": drain.then,
            "reason": drain.reason, "actor": drain.actor, "requested_at": time_value(Some(drain.requested_ms)),
            "proved_at": time_value(drain.proved_ms),
        })
    });
    let metrics = node.metrics.as_ref().map(|metrics| {
        json!({
            "cpu_core_milli": metrics.cpu_core_milli, "cpu_used_milli": metrics.cpu_used_milli,
            "load1_milli": metrics.load1_milli, "cpu_pressure": metrics.cpu_pressure,
            "memory_pressure": metrics.memory_pressure, "io_pressure": metrics.io_pressure,
            "memory_total_bytes": metrics.memory_total_bytes, "memory_used_bytes": metrics.memory_used_bytes,
            "memory_available_bytes": metrics.memory_available_bytes, "disk_total_bytes": metrics.disk_total_bytes,
            "disk_available_bytes": metrics.disk_available_bytes,
        })
    });
    json!({
        "node": node.name, "id": node.node, "pool": node.pool, "state": node.state, "liveness": node.liveness,
        "duty": node.duty, "hold": node.hold, "capacity": resources(node.capacity.as_ref()),
        "allocated": resources(node.allocated.as_ref()), "running": node.running, "queued": node.queued,
        "joined_at": time_value(Some(node.joined_ms)), "reason": node.reason, "actor": node.actor,
        "duty_since": time_value(node.duty_since_ms), "agent_version": node.agent_version, "metrics": metrics,
        "metrics_at": time_value(node.metrics_ms), "drain": drain, "labels": node.labels, "fences": node.fences,
        "attempts_total": node.attempts_total, "incarnation": node.incarnation, "boot_id": node.boot_id,
        "kernel": node.kernel, "rolling": node.rolling.map(|id| format!("r{id}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_named_as_in_the_closed_table() {
        assert_eq!(end_name(&end::Reason::Exited(3)), "exited(3)");
        let failed = v1::StartFailed { step: "exec".into(), errno: libc::ENOENT };
        assert_eq!(end_name(&end::Reason::StartFailed(failed)), "start_failed(exec: no such file or directory)");
    }

    #[test]
    fn a_start_is_shown_with_the_parts_that_were_measured() {
        let mut attempt = Attempt { start_us: 312, ..Default::default() };
        assert_eq!(start_text(&attempt), "start 0.31 ms");
        let measured = v1::StartPhases { prepared: true, handover_us: 50, exec_us: 110, ..Default::default() };
        attempt.start_phases = Some(measured);
        assert_eq!(start_text(&attempt), "start 0.31 ms: prepared, hand-over 0.05, inputs 0, exec 0.11");
        attempt.start_phases = Some(v1::StartPhases { prepared: false, cgroup_us: 1_234, ..measured });
        let fresh = "start 0.31 ms: cgroup 1.23, clone 0, assemble 0, hand-over 0.05, inputs 0, exec 0.11";
        assert_eq!(start_text(&attempt), fresh);
    }

    #[test]
    fn a_path_that_is_not_text_is_exact_in_json() {
        assert_eq!(path(b"a b"), json!("a b"));
        assert_eq!(path(b"a\xff"), json!({ "shown": "a\\xff", "hex": "61ff" }));
    }
}
