//! One packet a message on a Unix SEQPACKET socket, with descriptors beside it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use super::protocol::{DESCRIPTORS_MAX, PACKET_BYTES_MAX};

/// SCM_MAX_FD: the kernel takes no more with one packet. With room for all of them none is ever cut off,
/// and so none is left open here without an owner.
const KERNEL_DESCRIPTORS_MAX: usize = 253;

/// What one receive brought.
#[derive(Debug)]
pub enum Received<T> {
    /// A message and its descriptors.
    Message(T, Vec<OwnedFd>),
    /// Nothing is there now.
    Nothing,
    /// The other side is gone.
    Closed,
    /// A packet that is no message: the sentence.
    Malformed(String),
}

/// A connected pair for a parent and its child; both ends close on exec.
///
/// # Errors
/// As socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// The message as it travels.
///
/// # Errors
/// It is larger than a packet.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if bytes.len() > PACKET_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is larger than a packet"));
    }
    Ok(bytes)
}

/// Sends one packet. Never raises SIGPIPE.
///
/// # Errors
/// As sendmsg(2); `WouldBlock` on a non-blocking socket that is full.
pub fn send(socket: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let iov = [io::IoSlice::new(packet)];
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one packet and decodes it.
///
/// # Errors
/// As recvmsg(2).
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received<T>> {
    let mut control = cmsg_space!([RawFd; KERNEL_DESCRIPTORS_MAX]);
    let mut iov = [io::IoSliceMut::new(buffer)];
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(Received::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Received::Closed),
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut descriptors = Vec::new();
    for item in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = item {
            // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let truncated = message.flags.contains(MsgFlags::MSG_TRUNC) || descriptors.len() > DESCRIPTORS_MAX;
    let length = message.bytes;
    if length == 0 && descriptors.is_empty() {
        return Ok(Received::Closed);
    }
    if truncated {
        return Ok(Received::Malformed("the packet is larger than the protocol allows".into()));
    }
    if !descriptors.iter().all(is_file_or_pipe) {
        return Ok(Received::Malformed("a descriptor beside it is neither a file nor a pipe".into()));
    }
    match postcard::from_bytes(&buffer[..length]) {
        Ok(message) => Ok(Received::Message(message, descriptors)),
        Err(error) => Ok(Received::Malformed(format!("not a message of this protocol: {error}"))),
    }
}

/// Nothing else crosses: with a folder on its stdin a job would reach all of the host's files past its
/// own root, over a socket it could be sent one, and a device does whatever its driver does.
fn is_file_or_pipe(descriptor: &OwnedFd) -> bool {
    // SAFETY: zeroes are a valid statx.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // Without a word to a server: a mount that hangs must not hold up the caller.
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: an open descriptor, an empty C string, and a structure of our own.
    let told = unsafe { libc::statx(descriptor.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &raw mut status) };
    let kind = libc::mode_t::from(status.stx_mode) & libc::S_IFMT;
    told == 0 && [libc::S_IFREG, libc::S_IFIFO].contains(&kind)
}
