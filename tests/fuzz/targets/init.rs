//! What passes between the spawner and the init of a job.

use std::os::fd::{AsFd as _, AsRawFd as _};

use muster_agent::{
    sandbox::{
        order::{self, Order, Strings},
        status::{self, Failure, Received, Remains, Status, Step},
    },
    spawner::{protocol::Start, socket},
};
use nix::errno::Errno;

use super::spawner;
use crate::target::{Shape, Signs, Target};

pub(super) const ORDER: Target = Target {
    name: "init_order",
    shape: Shape::Binary,
    words: &["PATH=", "\0", "/bin/sh"],
    inputs_in_ci: 20_000,
    take: take_order,
    seeds: orders,
};

pub(super) const STATUS: Target = Target {
    name: "init_status",
    shape: Shape::Binary,
    words: &[],
    inputs_in_ci: 20_000,
    take: take_status,
    seeds: statuses,
};

/// Every pointer that execve(2) is given must point at a string that ends within the packet.
fn take_order(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Some(order) = Order::decode(input) else {
        signs.note("order", "refused");
        return Ok(());
    };
    signs.accepted = true;
    signs.count("inputs", order.inputs.len());
    for strings in [order.arguments, order.environment] {
        let pointers = order::pointers(strings);
        let ends = strings.iter().filter(|byte| **byte == 0).count();
        if pointers.len() != ends + 1 || pointers.last().is_none_or(|last| !last.is_null()) {
            return Err(format!("{} strings end, and there are {} pointers", ends, pointers.len() - 1));
        }
        signs.count("strings", ends);
    }
    if order::first(order.arguments).is_none() {
        return Err("there is no program to run".into());
    }
    if order.working_folder.is_empty() == order::first(order.working_folder).is_some() {
        return Err("the working folder does not end".into());
    }
    signs.note("path", if order::variable(order.environment, b"PATH").is_some() { "some" } else { "none" });
    Ok(())
}

fn take_status(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let (one, other) = socket::pair().map_err(|error| error.to_string())?;
    let sent = nix::unistd::write(&one, input).map_err(|error| error.to_string())?;
    match status::receive(other.as_fd()) {
        Received::Status(status, beside) => {
            signs.accepted = true;
            signs.variant("status", &status);
            if let Status::Failed(failure) = status {
                signs.note("failure", failure.step.name());
                // Any number is an errno to this type: its sentence must not fail.
                let _sentence = failure.to_string();
            }
            if !beside.is_empty() {
                return Err(format!("{} descriptors came from nowhere to {}", beside.len(), other.as_raw_fd()));
            }
            // What was read can be sent on: it fits in what a status may have.
            status::send(one.as_fd(), &status, &[]).map_err(|error| format!("cannot be sent again: {error}"))?;
            match status::receive(other.as_fd()) {
                Received::Status(again, _) if again == status => Ok(()),
                Received::Status(..) | Received::Nothing | Received::Closed => Err("it reads differently again".into()),
            }
        }
        Received::Closed => {
            signs.note("status", "refused");
            Ok(())
        }
        Received::Nothing if sent == 0 => Ok(()),
        Received::Nothing => Err("a packet that was sent did not arrive".into()),
    }
}

fn orders() -> Vec<(&'static str, Vec<u8>)> {
    let bytes = |start: &Start| postcard::to_stdvec(&Strings::of(start).order(start)).unwrap_or_default();
    let small = Start {
        environment: Vec::new(),
        working_folder: Vec::new(),
        stdin: None,
        inputs: Vec::new(),
        ..spawner::start()
    };
    vec![("order", bytes(&spawner::start())), ("order_small", bytes(&small))]
}

fn statuses() -> Vec<(&'static str, Vec<u8>)> {
    let statuses = [
        ("failed", Status::Failed(Failure::new(Step::Exec, Errno::ENOENT))),
        ("parked", Status::Parked { network_joined: true, assemble_us: 1_800 }),
        ("started", Status::Started { received_us: 1_000_000, inputs_us: 1_000_100, started_us: 1_000_900 }),
        (
            "ended",
            Status::Ended {
                raw_status: 7 << 8,
                told: false,
                boottime_us: 2_000_000,
                remains: Remains::Nothing,
                cpu_us: 5_000,
                memory_peak_bytes: 1 << 20,
            },
        ),
        ("lease_ended", Status::LeaseEnded { boottime_us: 3_000_000 }),
        ("time_limit_ended", Status::TimeLimitEnded { boottime_us: 3_000_000 }),
    ];
    statuses.into_iter().map(|(name, status)| (name, postcard::to_stdvec(&status).unwrap_or_default())).collect()
}
