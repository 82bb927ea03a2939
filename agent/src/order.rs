//! From what the coordinator orders to what the spawner and the rules need,
//! and the note that lets a later agent adopt the attempt.

use std::num::NonZeroU32;

use muster_core::{
    effect::{StopOrder, StopReason},
    end::End,
    event::HeldPhase,
    host::{StartOrder, Verdict},
    ids::{AttemptId, Epoch, JobId, Term},
    limits,
    resources::Resources,
    time::Millis,
};
use muster_proto::{
    convert::{self, Checked, Rejected},
    v1,
};
use serde::{Deserialize, Serialize};

use crate::{
    inputs::Inputs,
    spawner::protocol::{self, AttemptKey},
};

/// What a later agent must know of an attempt; kept by the spawner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    request: Resources,
    exclusive: bool,
    /// Of stdout and stderr together.
    pub output_limit: u64,
    /// Paths that come back.
    pub outputs: Vec<Vec<u8>>,
}

impl Note {
    /// Of an order.
    #[must_use]
    pub fn of(body: &v1::JobBody) -> Self {
        Self {
            request: request_of(body),
            exclusive: body.delivery() == v1::Delivery::Exclusive,
            output_limit: output_limit_of(body),
            outputs: body.outputs.iter().map(|path| path.to_vec()).collect(),
        }
    }

    /// As bytes for the spawner.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![NOTE_VERSION];
        bytes.extend(postcard::to_stdvec(self).expect("a note is plain data"));
        bytes
    }

    /// From the spawner. One that cannot be read takes nothing and brings nothing back.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        match bytes.split_first() {
            Some((&NOTE_VERSION, rest)) => postcard::from_bytes(rest).ok(),
            Some(_) | None => None,
        }
        .unwrap_or_else(|| {
            tracing::error!("the spawner holds an attempt with a note that this agent cannot read");
            Self {
                request: Resources::default(),
                exclusive: false,
                output_limit: limits::OUTPUT_LIMIT,
                outputs: vec![],
            }
        })
    }

    /// For the rules, after an adoption.
    ///
    /// # Errors
    /// The key is none that we ever ordered.
    pub fn start_order(&self, key: AttemptKey) -> Checked<StartOrder> {
        let attempt = attempt_of(key)?;
        let epoch = Epoch { term: Term(key.term), attempt: attempt.number };
        Ok(StartOrder { attempt, epoch, request: self.request, exclusive: self.exclusive })
    }
}

/// Raised when an older agent would misread a note.
const NOTE_VERSION: u8 = 1;

/// The rules' part of an order.
///
/// # Errors
/// It makes no sense.
pub fn start_order(body: &v1::JobBody, start: &v1::StartAttempt) -> Checked<StartOrder> {
    Ok(StartOrder {
        attempt: convert::attempt_id(start.attempt.as_ref())?,
        epoch: convert::epoch(start.epoch.as_ref())?,
        request: request_of(body),
        exclusive: body.delivery() == v1::Delivery::Exclusive,
    })
}

/// The rules' part of a stop.
///
/// # Errors
/// It makes no sense.
pub fn stop_order(stop: &v1::StopAttempt) -> Checked<StopOrder> {
    let reason = match stop.reason() {
        v1::StopReason::Unspecified | v1::StopReason::Cancelled => StopReason::Cancelled,
        v1::StopReason::Drained => StopReason::Drained,
        v1::StopReason::Preempted => StopReason::Preempted,
        v1::StopReason::Superseded => StopReason::Superseded,
    };
    Ok(StopOrder {
        attempt: convert::attempt_id(stop.attempt.as_ref())?,
        epoch: convert::epoch(stop.epoch.as_ref())?,
        reason,
        grace: Millis(stop.grace_ms),
        first: u8::try_from(stop.first_signal).ok().filter(|signal| *signal != 0),
    })
}

/// All that the spawner needs.
#[must_use]
pub fn start_of(
    key: AttemptKey,
    body: &v1::JobBody,
    start: &v1::StartAttempt,
    note: Vec<u8>,
    inputs: &mut Inputs,
) -> protocol::Start {
    protocol::Start {
        attempt: key,
        note,
        owner: body.owner.clone().into_bytes(),
        arguments: arguments_of(body, start.item.as_deref()),
        environment: environment_of(key, body),
        working_folder: body.working_folder.to_vec(),
        profile: match body.profile() {
            // Fail closed: what is not said is strict.
            v1::Profile::Unspecified | v1::Profile::Strict => protocol::Profile::Strict,
            v1::Profile::Shared => protocol::Profile::Shared,
            v1::Profile::None => protocol::Profile::None,
        },
        without: body.without.clone(),
        network: match body.network() {
            v1::Network::Unspecified | v1::Network::None => protocol::Network::None,
            v1::Network::Host => protocol::Network::Host,
        },
        limits: limits_of(body),
        time_limit_ms: body.time_limit_ms,
        grace_ms: body.grace_ms,
        exclusive: body.delivery() == v1::Delivery::Exclusive,
        stdin: inputs.stdin,
        inputs: std::mem::take(&mut inputs.files),
    }
}

/// The spawner's name of an attempt.
#[must_use]
pub const fn key_of(order: &StartOrder) -> AttemptKey {
    AttemptKey {
        job: order.attempt.job.0,
        task: order.attempt.task,
        number: order.attempt.number.get(),
        term: order.epoch.term.0,
    }
}

/// Our name of an attempt.
///
/// # Errors
/// It counts from 0.
pub fn attempt_of(key: AttemptKey) -> Checked<AttemptId> {
    let Some(number) = NonZeroU32::new(key.number) else {
        return Err(Rejected { field: "attempt.number".into(), reason: "counts from 1".into() });
    };
    Ok(AttemptId { job: JobId(key.job), task: key.task, number })
}

/// The spawner's word for the rules.
#[must_use]
pub fn verdict_of(verdict: &protocol::Verdict) -> Verdict {
    match verdict.clone() {
        protocol::Verdict::Exited(0) => Verdict::Own(End::Succeeded),
        protocol::Verdict::Exited(code) => Verdict::Own(End::Exited(code)),
        protocol::Verdict::Signaled(signal) => Verdict::Own(End::Signaled(signal)),
        protocol::Verdict::OutOfMemory { limit_bytes, peak_bytes } => {
            Verdict::Own(End::OutOfMemory { limit_bytes, peak_bytes })
        }
        protocol::Verdict::TimedOut => Verdict::Own(End::TimedOut),
        protocol::Verdict::Stopped => Verdict::Stopped,
        protocol::Verdict::LeaseEnded => Verdict::LeaseEnded,
        protocol::Verdict::Refused { fence, reason } => {
            tracing::warn!(fence, reason, "the spawner refused a start");
            Verdict::Own(End::Refused(fence))
        }
        protocol::Verdict::StartFailed { step, errno } => Verdict::Own(End::StartFailed { step, errno }),
    }
}

/// For reports; none: the spawner measured nothing.
#[must_use]
pub fn phases_to_wire(phases: protocol::StartPhases) -> Option<v1::StartPhases> {
    let protocol::StartPhases { prepared, cgroup_us, clone_us, assemble_us, handover_us, inputs_us, exec_us } = phases;
    (phases != protocol::StartPhases::default()).then_some(v1::StartPhases {
        prepared,
        cgroup_us,
        clone_us,
        assemble_us,
        handover_us,
        inputs_us,
        exec_us,
    })
}

/// For Hello and heartbeats.
#[must_use]
pub fn held_to_wire(held: muster_core::event::Held) -> v1::HeldAttempt {
    let phase = match held.phase {
        HeldPhase::Queued => v1::held_attempt::Phase::Queued,
        HeldPhase::Running => v1::held_attempt::Phase::Running,
        HeldPhase::Stopping => v1::held_attempt::Phase::Stopping,
        HeldPhase::Ended => v1::held_attempt::Phase::Ended,
    };
    v1::HeldAttempt { attempt: Some(held.attempt.into()), epoch: Some(held.epoch.into()), phase: phase.into() }
}

fn request_of(body: &v1::JobBody) -> Resources {
    let request = body.request.unwrap_or_default();
    Resources { cpu_milli: request.cpu_milli, memory_bytes: request.memory_bytes, disk_bytes: request.disk_bytes }
}

fn limits_of(body: &v1::JobBody) -> protocol::Limits {
    let request = request_of(body);
    protocol::Limits {
        cpu_milli: request.cpu_milli,
        memory_bytes: request.memory_bytes,
        disk_bytes: request.disk_bytes,
        pids: if body.pids_limit == 0 { limits::PIDS_LIMIT } else { body.pids_limit },
    }
}

const fn output_limit_of(body: &v1::JobBody) -> u64 {
    if body.output_limit_bytes == 0 { limits::OUTPUT_LIMIT } else { body.output_limit_bytes }
}

fn arguments_of(body: &v1::JobBody, item: Option<&[u8]>) -> Vec<Vec<u8>> {
    body.arguments
        .iter()
        .map(|argument| item.map_or_else(|| argument.to_vec(), |item| replace_braces(argument, item)))
        .collect()
}

fn replace_braces(argument: &[u8], item: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(argument.len() + item.len());
    let mut rest = argument;
    while let Some(at) = rest.windows(2).position(|pair| pair == b"{}") {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(item);
        rest = &rest[at + 2..];
    }
    replaced.extend_from_slice(rest);
    replaced
}

fn environment_of(key: AttemptKey, body: &v1::JobBody) -> Vec<(Vec<u8>, Vec<u8>)> {
    let job = JobId(key.job).to_string();
    let limits = limits_of(body);
    let own = |name: &str| body.environment.iter().any(|variable| variable.name == name.as_bytes());
    let defaults = DEFAULT_ENVIRONMENT
        .iter()
        .filter(|(name, _)| !own(name))
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    let told = [
        ("MUSTER_JOB", job.clone()),
        ("MUSTER_TASK", (u64::from(body.first_index) + u64::from(key.task)).to_string()),
        ("MUSTER_TASK_COUNT", body.tasks.to_string()),
        ("MUSTER_ATTEMPT", format!("{job}.{}.{}", key.task, key.number)),
        ("MUSTER_EPOCH", format!("{}.{}", key.term, key.number)),
        // The kernel's files that would say so are hidden: what they say is the host's.
        ("MUSTER_CPUS", limits.cpu_milli.div_ceil(1_000).max(1).to_string()),
        ("MUSTER_MEMORY_BYTES", limits.memory_bytes.to_string()),
        ("MUSTER_DISK_BYTES", limits.disk_bytes.to_string()),
    ];
    let jobs = body
        .environment
        .iter()
        .filter(|variable| !told.iter().any(|(name, _)| variable.name == name.as_bytes()))
        .map(|variable| (variable.name.to_vec(), variable.value.to_vec()));
    let told_bytes = told.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.clone().into_bytes()));
    defaults.chain(told_bytes).chain(jobs).collect()
}

/// Nothing of the agent's own environment reaches a job.
const DEFAULT_ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/work"), ("TMPDIR", "/tmp")];

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: AttemptKey = AttemptKey { job: 1024, task: 2, number: 3, term: 4 };

    #[test]
    fn every_pair_of_braces_is_replaced_and_only_if_there_is_an_item() {
        let body = v1::JobBody { arguments: vec!["a{}b{}".into(), "{}".into(), "{".into()], ..Default::default() };
        assert_eq!(arguments_of(&body, Some(b"{}x")), [&b"a{}xb{}x"[..], b"{}x", b"{"]);
        assert_eq!(arguments_of(&body, None)[0], b"a{}b{}");
    }

    #[test]
    fn a_job_may_change_its_path_but_not_who_it_is() {
        let variable = |name: &str| v1::EnvironmentVariable { name: name.to_owned().into(), value: "own".into() };
        let environment = vec![variable("PATH"), variable("MUSTER_EPOCH"), variable("X")];
        let request = Some(v1::Resources { cpu_milli: 2_001, memory_bytes: 64 << 20, disk_bytes: 0 });
        let body = v1::JobBody { environment, tasks: 9, first_index: 5, request, ..Default::default() };
        let found = environment_of(KEY, &body);
        let value = |name: &str| {
            let values: Vec<_> = found.iter().filter(|(key, _)| key == name.as_bytes()).collect();
            assert_eq!(values.len(), 1, "{name}");
            String::from_utf8(values[0].1.clone()).unwrap()
        };
        assert_eq!((value("PATH"), value("X")), ("own".into(), "own".into()));
        assert_eq!((value("MUSTER_EPOCH"), value("MUSTER_TASK_COUNT")), ("4.3".into(), "9".into()));
        assert_eq!(value("MUSTER_TASK"), "7", "the array's own index");
        assert_eq!((value("MUSTER_CPUS"), value("MUSTER_MEMORY_BYTES")), ("3".into(), "67108864".into()));
        assert_eq!((value("MUSTER_JOB"), value("MUSTER_ATTEMPT")), ("100".into(), "100.2.3".into()));
    }

    #[test]
    fn phases_that_were_not_measured_are_absent() {
        assert_eq!(phases_to_wire(protocol::StartPhases::default()), None);
        let measured = protocol::StartPhases { prepared: true, exec_us: 110, ..Default::default() };
        let told = phases_to_wire(measured).unwrap();
        assert!(told.prepared && told.exec_us == 110 && told.cgroup_us == 0);
    }

    #[test]
    fn a_note_reads_back_and_a_strange_one_takes_nothing() {
        let body = v1::JobBody {
            request: Some(v1::Resources { cpu_milli: 5, memory_bytes: 6, disk_bytes: 7 }),
            delivery: v1::Delivery::Exclusive.into(),
            outputs: vec!["out".into()],
            ..Default::default()
        };
        let note = Note::of(&body);
        assert_eq!(Note::decode(&note.encode()), note);
        assert!(note.start_order(KEY).unwrap().exclusive);
        assert_eq!(Note::decode(&[9, 9]).request, Resources::default());
    }
}
