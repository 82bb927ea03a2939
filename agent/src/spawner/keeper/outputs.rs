//! What an attempt left: opened by a child that has its uid, after nothing of it runs.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::sys::epoll::EpollFlags;

use super::{Collecting, Keeper, set_nonblocking};
use crate::{
    sandbox::{
        files,
        sys::{self, Cloned},
    },
    spawner::{
        attempt::{Attempt, Stage},
        protocol::{AttemptKey, Collected, Event},
        socket::{self, Received},
    },
};

/// Children that open outputs at once: more than any agent asks for, fewer than would hurt a host.
const COLLECTING_MAX: usize = 256;

impl Keeper {
    pub(super) fn collect(&mut self, key: AttemptKey, paths: Vec<Vec<u8>>, bytes_max: u64) {
        let Some(Attempt { stage: Stage::Over { folder, .. }, identity, .. }) = self.attempts.get(&key) else {
            return self.deny(Some(key), "outputs are collected when it is over");
        };
        let Some(folder) = folder else {
            // One at a time: an answer for all may be larger than a packet.
            for path in paths {
                let files = vec![(path, Collected::Skipped { reason: "missing".into() })];
                self.tell(&Event::Outputs { attempt: key, files, last: false }, Vec::new());
            }
            return self.tell(&Event::Outputs { attempt: key, files: Vec::new(), last: true }, Vec::new());
        };
        if self.collecting.len() >= COLLECTING_MAX {
            return self.deny(Some(key), format!("outputs of {COLLECTING_MAX} attempts are being collected already"));
        }
        match collect_in_child(folder.as_fd(), *identity, &paths, bytes_max) {
            Ok((socket, pidfd)) => {
                let token = self.new_token();
                if self.watch(socket.as_fd(), token, EpollFlags::EPOLLIN).is_ok() {
                    self.collecting.insert(token, Collecting { attempt: key, socket, pidfd });
                }
            }
            Err(error) => self.deny(Some(key), format!("outputs: {error}")),
        }
    }

    pub(super) fn hear_collector(&mut self, token: u64) {
        loop {
            let Some(collecting) = self.collecting.get(&token) else { return };
            let attempt = collecting.attempt;
            match socket::receive::<(Vec<u8>, Collected)>(collecting.socket.as_fd(), &mut self.buffer) {
                Ok(Received::Message(file, descriptors)) => {
                    self.tell(
                        &Event::Outputs { attempt, files: vec![file], last: false },
                        descriptors.into_iter().map(Rc::new).collect(),
                    );
                }
                Ok(Received::Nothing) => return,
                Ok(Received::Malformed(_) | Received::Closed) | Err(_) => {
                    if let Some(done) = self.collecting.remove(&token) {
                        self.unwatch(done.socket.as_fd());
                        // It has closed its socket, and may not have ended yet.
                        let _already_over = sys::signal_pidfd(done.pidfd.as_fd(), libc::SIGKILL);
                        self.reap_later(done.pidfd);
                    }
                    self.tell(&Event::Outputs { attempt, files: Vec::new(), last: true }, Vec::new());
                    return;
                }
            }
        }
    }
}

/// A child with the job's uid opens the files and passes them over.
fn collect_in_child(
    folder: BorrowedFd<'_>,
    identity: Option<u32>,
    paths: &[Vec<u8>],
    bytes_max: u64,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socket::pair()?;
    // SAFETY: one thread; the child leaves by exit_now.
    match unsafe { sys::clone_process(0, None) }? {
        Cloned::Child => {
            if let Some(uid) = identity
                && sys::become_identity(uid, uid).is_err()
            {
                sys::exit_now(1);
            }
            for path in paths {
                let (collected, file) = files::open_output(folder, path, bytes_max);
                let borrowed: Vec<BorrowedFd<'_>> = file.iter().map(|fd| fd.as_fd()).collect();
                let sent = socket::encode(&(path, collected))
                    .and_then(|packet| socket::send(theirs.as_fd(), &packet, &borrowed));
                if sent.is_err() {
                    sys::exit_now(1);
                }
            }
            sys::exit_now(0)
        }
        Cloned::Parent { pidfd, .. } => {
            drop(theirs);
            set_nonblocking(&ours)?;
            Ok((ours, pidfd))
        }
    }
}
