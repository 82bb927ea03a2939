//! What a parked init is told to run: laid out by the spawner, so that the init
//! copies nothing and only points into the packet.
//!
//! A packet begins with one byte that says what it is; an order that is larger
//! than a packet travels in a memfd beside it.

use std::{
    ffi::CStr,
    os::fd::{FromRawFd as _, OwnedFd},
};

use serde::{Deserialize, Serialize};

use crate::spawner::protocol::{self, Input, Start};

/// The uid map is written: go on (as an ordinary user only, where it must be there before anything else).
pub const GO: u8 = b'G';
/// SIGTERM to the job's process group.
pub const TERMINATE: u8 = b'T';
/// The signal whose number follows in this packet, to the job's process group.
pub const SIGNAL: u8 = b'S';
/// SIGKILL to all that the job has made, for an init whose own end would leave them.
pub const KILL: u8 = b'K';
/// An order follows in this packet.
pub const RUN: u8 = b'O';
/// An order is in the memfd that is the first descriptor beside this packet.
pub const RUN_IN_MEMORY: u8 = b'M';
/// What a packet to an init holds at most; the kernel's default buffer of such a socket is 208 KiB.
pub const PACKET_BYTES_MAX: usize = 128 << 10;
/// The first descriptors beside an order, after the memory it may be in: the write ends of the job's stdout and stderr.
pub const PIPES: usize = 2;
/// Descriptors beside an order at most (the kernel's SCM_MAX_FD): the memory, the pipes, and the request's own.
pub const DESCRIPTORS_MAX: usize = 1 + PIPES + protocol::DESCRIPTORS_MAX;

/// One job, ready for exec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order<'a> {
    /// Each ends in NUL.
    #[serde(borrow)]
    pub arguments: &'a [u8],
    /// `NAME=value`, each ends in NUL.
    #[serde(borrow)]
    pub environment: &'a [u8],
    /// Below the working folder, ends in NUL; empty: the working folder itself.
    #[serde(borrow)]
    pub working_folder: &'a [u8],
    /// Which descriptor after the pipes is stdin; none: /dev/null.
    pub stdin: Option<u8>,
    /// Files to copy in; they count descriptors after the pipes.
    pub inputs: Vec<Input>,
    /// Ends with the node's lease.
    pub exclusive: bool,
    /// Processes of its uid, where it has one of its own.
    pub processes_max: u64,
    /// Bytes of one file; 0: no limit.
    pub file_bytes_max: u64,
    /// Milliseconds after the start when the init ends it, if the spawner has not by then; 0: never.
    pub time_limit_ms: u64,
    /// Between SIGTERM and the kill then.
    pub grace_ms: u64,
}

/// The strings of a start, each ended by NUL.
pub struct Strings {
    arguments: Vec<u8>,
    environment: Vec<u8>,
    working_folder: Vec<u8>,
}

impl Strings {
    /// Lays them out.
    #[must_use]
    pub fn of(start: &Start) -> Self {
        let mut arguments = Vec::with_capacity(start.arguments.iter().map(|text| text.len() + 1).sum());
        for text in &start.arguments {
            arguments.extend_from_slice(text);
            arguments.push(0);
        }
        let length = start.environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        let mut environment = Vec::with_capacity(length);
        for (name, value) in &start.environment {
            environment.extend_from_slice(name);
            environment.push(b'=');
            environment.extend_from_slice(value);
            environment.push(0);
        }
        let mut working_folder = start.working_folder.clone();
        if !working_folder.is_empty() {
            working_folder.push(0);
        }
        Self { arguments, environment, working_folder }
    }

    /// The order for a start with these strings.
    #[must_use]
    pub fn order(&self, start: &Start) -> Order<'_> {
        Order {
            arguments: &self.arguments,
            environment: &self.environment,
            working_folder: &self.working_folder,
            stdin: start.stdin,
            inputs: start.inputs.clone(),
            exclusive: start.exclusive,
            processes_max: start.limits.pids.into(),
            file_bytes_max: start.limits.disk_bytes,
            time_limit_ms: start.time_limit_ms,
            grace_ms: start.grace_ms,
        }
    }
}

impl<'a> Order<'a> {
    /// From the bytes after a packet's first; none: it is no order, or a string of it would be read past its end.
    #[must_use]
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        let order: Self = postcard::from_bytes(bytes).ok()?;
        let ends = |strings: &[u8]| strings.last().is_none_or(|last| *last == 0);
        let whole = [order.arguments, order.environment, order.working_folder].into_iter().all(ends);
        (whole && !order.arguments.is_empty()).then_some(order)
    }

    /// The packet, and what travels in memory beside it if it is too large for one.
    #[must_use]
    pub fn encode(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        let bytes = postcard::to_extend(self, vec![RUN]).expect("an order is plain data");
        if bytes.len() <= PACKET_BYTES_MAX { (bytes, None) } else { (vec![RUN_IN_MEMORY], Some(bytes[1..].to_vec())) }
    }
}

/// Strings that end in NUL each, as execve(2) wants them.
pub fn pointers(strings: &[u8]) -> Vec<*const libc::c_char> {
    let starts = strings.split_inclusive(|byte| *byte == 0).map(|text| text.as_ptr().cast());
    starts.chain([std::ptr::null()]).collect()
}

/// The value of a variable in `environment`, as getenv(3).
#[must_use]
pub fn variable<'a>(environment: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    environment.split(|byte| *byte == 0).find_map(|text| text.strip_prefix(name)?.strip_prefix(b"="))
}

/// The first of strings that end in NUL each.
#[must_use]
pub fn first(strings: &[u8]) -> Option<&CStr> {
    CStr::from_bytes_until_nul(strings).ok()
}

/// Takes over descriptors that the kernel made for a message.
///
/// # Safety
/// They are new and known to nobody else.
pub unsafe fn own(raw: Vec<std::os::fd::RawFd>) -> impl Iterator<Item = OwnedFd> {
    // SAFETY: as promised by the caller.
    raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawner::protocol::{AttemptKey, Limits, Network, Profile};

    fn start() -> Start {
        Start {
            attempt: AttemptKey { job: 1, task: 0, number: 1, term: 1 },
            note: Vec::new(),
            owner: b"ana".to_vec(),
            arguments: vec![b"a".to_vec(), Vec::new(), b"c d".to_vec()],
            environment: vec![(b"PATH".to_vec(), b"/bin".to_vec()), (b"PATHS".to_vec(), Vec::new())],
            working_folder: Vec::new(),
            profile: Profile::Strict,
            without: Vec::new(),
            network: Network::None,
            limits: Limits { cpu_milli: 1, memory_bytes: 2, disk_bytes: 3, pids: 4 },
            time_limit_ms: 0,
            grace_ms: 0,
            exclusive: false,
            stdin: None,
            inputs: Vec::new(),
        }
    }

    #[test]
    fn an_order_reads_back_and_points_at_each_string() {
        let start = start();
        let strings = Strings::of(&start);
        let (packet, memory) = strings.order(&start).encode();
        assert!(packet[0] == RUN && memory.is_none());
        let order: Order<'_> = postcard::from_bytes(&packet[1..]).unwrap();
        assert_eq!(order.arguments, b"a\0\0c d\0");
        assert_eq!(pointers(order.arguments).len(), 4);
        assert_eq!(variable(order.environment, b"PATH"), Some(&b"/bin"[..]));
        assert_eq!(variable(order.environment, b"PATHS"), Some(&b""[..]));
        assert_eq!(first(order.arguments), Some(c"a"));
    }

    #[test]
    fn a_large_order_travels_in_memory() {
        let start = Start { arguments: vec![vec![b'x'; PACKET_BYTES_MAX]], ..start() };
        let strings = Strings::of(&start);
        let (packet, memory) = strings.order(&start).encode();
        assert_eq!(packet, [RUN_IN_MEMORY]);
        let memory = memory.unwrap();
        let order: Order<'_> = postcard::from_bytes(&memory).unwrap();
        assert_eq!(order.arguments.len(), PACKET_BYTES_MAX + 1);
    }
}
