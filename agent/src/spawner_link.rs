//! The agent's end of the socket to the spawner: packets with descriptors,
//! never blocking. What the socket does not take at once waits in order.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
            recvmsg, sendmsg, socket,
        },
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::spawner::protocol::{
    DESCRIPTORS_MAX, Event, PACKET_BYTES_MAX, PROTOCOL_VERSION, Phase, Request, START_BYTES_MAX, Start,
};

/// The spawner cannot be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens.
    #[error("no spawner answers on {}; is muster-spawner running?", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the spawner broke")]
    Broken(#[source] io::Error),
    /// It closed the connection.
    #[error("the spawner closed the connection")]
    Closed,
    /// It said nothing for too long.
    #[error("the spawner does not answer")]
    Silent,
    /// It speaks another version.
    #[error("the spawner speaks version {theirs} of the protocol, and this agent {PROTOCOL_VERSION}; upgrade both")]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// It said no.
    #[error("the spawner refused the connection: {0}")]
    Denied(String),
    /// A packet makes no sense.
    #[error("the spawner sent a packet that cannot be read")]
    Unreadable(#[source] postcard::Error),
    /// A packet came out of order.
    #[error("the spawner sent {0} out of order")]
    OutOfOrder(&'static str),
    /// A start does not fit.
    #[error("the order has {bytes} bytes and {descriptors} files, more than {START_BYTES_MAX} or {DESCRIPTORS_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// Its descriptors.
        descriptors: usize,
    },
}

/// A connection to a spawner that has answered hello.
pub struct SpawnerLink {
    socket: AsyncFd<OwnedFd>,
    unsent: VecDeque<Packet>,
    /// The socket again, watched for room while something is unsent: watched all the
    /// time, it would wake us at each packet that the spawner takes.
    room: Option<AsyncFd<OwnedFd>>,
    buffer: Vec<u8>,
    control: Vec<u8>,
}

/// What the spawner said in answer to hello.
#[derive(Debug)]
pub struct Greeting {
    /// Its boot id.
    pub boot_id: String,
    /// Random per life of the spawner.
    pub spawner_id: [u8; 16],
    /// Fences that it can raise.
    pub fences: Vec<String>,
    /// Fences that it cannot, each with why.
    pub missing: Vec<(String, String)>,
    /// All that it holds.
    pub held: Vec<HeldBySpawner>,
}

/// An attempt that the spawner holds.
#[derive(Debug)]
pub struct HeldBySpawner {
    /// The attempt.
    pub attempt: crate::spawner::protocol::AttemptKey,
    /// The note that came with its start.
    pub note: Vec<u8>,
    /// How far it is.
    pub phase: Phase,
}

struct Packet {
    bytes: Vec<u8>,
    descriptors: Vec<Rc<OwnedFd>>,
}

impl SpawnerLink {
    /// Connects, says hello and takes in the list of what is held.
    ///
    /// # Errors
    /// Nobody answers there, or not as a spawner.
    pub async fn open(path: &Path) -> Result<(Self, Greeting), LinkError> {
        let mut link =
            Self::connect(path).map_err(|source| LinkError::Unreachable { path: path.to_owned(), source })?;
        link.send(&Request::Hello { version: PROTOCOL_VERSION }, Vec::new())?;
        let greeting = timeout(GREETING_TIMEOUT, link.greeting()).await.map_err(|_| LinkError::Silent)??;
        Ok((link, greeting))
    }

    fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        // SAFETY: the descriptor is owned by the value that is registered.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        let control = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        Ok(Self { socket, unsent: VecDeque::new(), room: None, buffer: vec![0; PACKET_BYTES_MAX], control })
    }

    async fn greeting(&mut self) -> Result<Greeting, LinkError> {
        let mut greeting = match self.next().await?.0 {
            Event::Welcome { version, .. } if version != PROTOCOL_VERSION => {
                return Err(LinkError::Version { theirs: version });
            }
            Event::Welcome { version: _, boot_id, spawner_id, fences, missing, poweroff: _ } => {
                Greeting { boot_id, spawner_id, fences, missing, held: Vec::new() }
            }
            Event::Denied { reason, .. } => return Err(LinkError::Denied(reason)),
            other => return Err(LinkError::OutOfOrder(name_of(&other))),
        };
        loop {
            match self.next().await?.0 {
                Event::Held { attempt, note, phase } => greeting.held.push(HeldBySpawner { attempt, note, phase }),
                Event::HeldAll => return Ok(greeting),
                other => return Err(LinkError::OutOfOrder(name_of(&other))),
            }
        }
    }

    /// Hands one request over, or keeps it until the socket takes it.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, request: &Request, descriptors: Vec<Rc<OwnedFd>>) -> Result<(), LinkError> {
        let bytes = postcard::to_stdvec(request).expect("requests are plain data");
        self.enqueue(Packet { bytes, descriptors })
    }

    /// Hands a start over, in a sealed memfd if it is large.
    ///
    /// # Errors
    /// The connection broke, or the start is too large.
    pub fn send_start(&mut self, start: Box<Start>, mut descriptors: Vec<Rc<OwnedFd>>) -> Result<(), LinkError> {
        let request = Request::Start(start);
        let bytes = postcard::to_stdvec(&request).expect("requests are plain data");
        if bytes.len() <= PACKET_BYTES_MAX && descriptors.len() <= DESCRIPTORS_MAX {
            return self.enqueue(Packet { bytes, descriptors });
        }
        let Request::Start(start) = &request else { unreachable!("it was made above") };
        let bytes = postcard::to_stdvec(start).expect("requests are plain data");
        if bytes.len() > START_BYTES_MAX || descriptors.len() >= DESCRIPTORS_MAX {
            return Err(LinkError::TooLarge { bytes: bytes.len(), descriptors: descriptors.len() });
        }
        descriptors.insert(0, Rc::new(sealed_memfd(&bytes).map_err(LinkError::Broken)?));
        self.send(&Request::StartInMemory, descriptors)
    }

    fn enqueue(&mut self, packet: Packet) -> Result<(), LinkError> {
        self.unsent.push_back(packet);
        self.send_what_fits()
    }

    fn send_what_fits(&mut self) -> Result<(), LinkError> {
        while let Some(packet) = self.unsent.front() {
            let raw: Vec<RawFd> = packet.descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
            let rights = [ControlMessage::ScmRights(&raw)];
            let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let io = [IoSlice::new(&packet.bytes)];
            match sendmsg::<UnixAddr>(self.socket.get_ref().as_raw_fd(), &io, control, flags, None) {
                Ok(_) => drop(self.unsent.pop_front()),
                Err(Errno::EAGAIN) => return self.wait_for_room().map_err(LinkError::Broken),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(LinkError::Broken(errno.into())),
            }
        }
        self.room = None;
        Ok(())
    }

    fn wait_for_room(&mut self) -> io::Result<()> {
        if self.room.is_none() {
            let again = self.socket.get_ref().try_clone()?;
            // SAFETY: as for the first one.
            self.room = Some(unsafe { AsyncFd::register_with_interest(again, Interest::WRITABLE) }?);
        }
        Ok(())
    }

    /// The next event, with its descriptors; meanwhile hands over what waits
    /// for the socket. Safe to cancel.
    ///
    /// # Errors
    /// The connection broke or the packet makes no sense.
    pub async fn next(&mut self) -> Result<(Event, Vec<OwnedFd>), LinkError> {
        loop {
            if let Some(event) = self.try_next()? {
                return Ok(event);
            }
            // `try_next` clears the mark when there is nothing more.
            let Some(room) = &self.room else {
                let _readable = self.socket.readable().await.map_err(LinkError::Broken)?;
                continue;
            };
            tokio::select! {
                readable = self.socket.readable() => drop(readable.map_err(LinkError::Broken)?),
                writable = room.writable() => {
                    writable.map_err(LinkError::Broken)?.clear_ready();
                    self.send_what_fits()?;
                }
            }
        }
    }

    /// The next event if one is there already. Asks the kernel only if the reactor saw something come.
    ///
    /// # Errors
    /// The connection broke or the packet makes no sense.
    pub fn try_next(&mut self) -> Result<Option<(Event, Vec<OwnedFd>)>, LinkError> {
        let (buffer, control) = (&mut self.buffer, &mut self.control);
        let mut io = [IoSliceMut::new(buffer)];
        let received = self.socket.try_io(Interest::READABLE, |socket| {
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let message = recvmsg::<()>(socket.as_raw_fd(), &mut io, Some(control), flags)?;
            let mut descriptors = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                    descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
                }
            }
            Ok((message.bytes, descriptors))
        });
        let (length, descriptors) = match received {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(error) => return Err(LinkError::Broken(error)),
        };
        if length == 0 {
            return Err(LinkError::Closed);
        }
        let event = postcard::from_bytes(&self.buffer[..length]).map_err(LinkError::Unreadable)?;
        Ok(Some((event, descriptors)))
    }
}

/// A spawner that is alive answers hello at once; many held attempts take a little.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// An anonymous file with this content that nobody can change.
///
/// # Errors
/// The kernel has no memory for it.
pub fn sealed_memfd(content: &[u8]) -> io::Result<OwnedFd> {
    let memfd = memfd_create("muster", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = std::fs::File::from(memfd);
    file.write_all(content)?;
    let seals = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

const fn name_of(event: &Event) -> &'static str {
    match event {
        Event::Welcome { .. } => "Welcome",
        Event::Held { .. } => "Held",
        Event::HeldAll => "HeldAll",
        Event::Started { .. } => "Started",
        Event::Attached { .. } => "Attached",
        Event::Ended { .. } => "Ended",
        Event::Outputs { .. } => "Outputs",
        Event::Stuck { .. } => "Stuck",
        Event::Denied { .. } => "Denied",
        Event::Leaving { .. } => "Leaving",
    }
}
