//! The leadership row: who leads, by which term, and for how long.
//!
//! No clock of another machine is read. The leader counts its lease on its own
//! boot-time clock from the *sending* of a renewal; a candidate counts on its
//! own from when it first *saw* that renewal, and longer. So the leader's end
//! comes first, as with a node's lease. A takeover names the row that it saw:
//! a renewal in between refuses it.

use std::{thread, time::Duration};

use muster_core::{ids::Term, limits, time::Millis};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    column,
    session::{Session, Target},
};
use crate::{
    clock::boot_time,
    leadership::{Leadership, Role},
    store::Error,
};

/// How the sessions that write are named: those of a leader whose lease is over are ended.
pub(super) const WRITER: &str = "muster writer";
/// Between two tries of a renewal that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// For a standby's question, on a connection that stands.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A coordinator's part in who leads.
#[derive(Debug)]
pub struct Campaign {
    /// What it is now.
    pub role: watch::Receiver<Role>,
    /// Its right to act.
    pub leadership: Leadership,
    resign: mpsc::Sender<()>,
    ended: Option<thread::JoinHandle<()>>,
}

impl Campaign {
    /// Gives the leadership up at once: nothing of ours is under way any more. Blocks.
    pub fn resign(mut self) {
        // A campaign that was lost has no receiver any more.
        let _ = self.resign.try_send(());
        if let Some(ended) = self.ended.take() {
            let _ = ended.join();
        }
    }
}

/// Who stands, and where agents and operators dial it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Random per process: a restart is another holder.
    pub holder: String,
    /// Told to those who ask a standby.
    pub address: String,
}

/// Begins to stand for the leadership, on a thread of its own.
#[must_use]
pub fn campaign(target: Target, candidate: Candidate) -> Campaign {
    let leadership = Leadership::none();
    let (told, role) = watch::channel(Role::Standby { leader: None });
    let (resign, resigned) = mpsc::channel(1);
    let standing = Standing {
        session: Session::new(target, "muster leadership"),
        candidate,
        leadership: leadership.clone(),
        told,
        resigned,
        reached: true,
    };
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a thread can always have a runtime of its own").block_on(standing.run());
    };
    let ended = thread::Builder::new()
        .name("leadership".into())
        .spawn(run)
        .expect("a process that just started can have one more thread");
    Campaign { role, leadership, resign, ended: Some(ended) }
}

/// The row as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    term: i64,
    beat: i64,
    holder: Option<String>,
    address: Option<String>,
}

struct Standing {
    session: Session,
    candidate: Candidate,
    leadership: Leadership,
    told: watch::Sender<Role>,
    resigned: mpsc::Receiver<()>,
    /// The data base answered the last time.
    reached: bool,
}

impl Standing {
    async fn run(mut self) {
        let Some(term) = self.stand().await else { return };
        let reason = self.lead(term).await;
        self.leadership.end();
        if let Some(reason) = reason {
            self.tell(Role::Lost { reason });
        }
    }

    fn tell(&self, role: Role) {
        self.told.send_if_modified(|told| {
            let changed = *told != role;
            *told = role;
            changed
        });
    }

    /// Until this coordinator leads; none: it is to stop.
    async fn stand(&mut self) -> Option<i64> {
        let mut last: Option<(Seen, Duration)> = None;
        loop {
            match self.look_in_time().await {
                Ok(seen) => {
                    let now = boot_time();
                    let since = match &last {
                        Some((same, since)) if same.term == seen.term && same.beat == seen.beat => *since,
                        Some(_) | None => now,
                    };
                    last = Some((seen.clone(), since));
                    let still = Millis(u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX));
                    let vacant = seen.holder.is_none();
                    if (vacant || still >= limits::LEADER_TAKEOVER)
                        && let Some(term) = self.take(&seen).await
                    {
                        return Some(term);
                    }
                    // One that has missed a beat may be gone: who asks waits for what comes of it.
                    let leader = seen.address.filter(|_| !vacant && still < limits::LEADER_DOUBT);
                    self.tell(Role::Standby { leader });
                }
                Err(error) => self.unreached(&error),
            }
            let pause = Duration::from_millis(limits::LEADER_POLL.0);
            if timeout(pause, self.resigned.recv()).await.is_ok() {
                return None;
            }
        }
    }

    fn unreached(&mut self, error: &Error) {
        if self.reached {
            tracing::warn!("{}", crate::chain(error));
        }
        self.reached = false;
        self.session.drop_connection();
        self.tell(Role::Standby { leader: None });
    }

    /// A data base that hangs without its connection breaking is left, so that the next of its addresses is tried.
    async fn look_in_time(&mut self) -> Result<Seen, Error> {
        self.session.client().await?;
        match timeout(ANSWER_TIMEOUT, self.look()).await {
            Ok(looked) => looked,
            Err(_late) => Err(self.session.unreachable("it does not answer")),
        }
    }

    async fn look(&mut self) -> Result<Seen, Error> {
        let ask = "SELECT term, beat, holder, address FROM muster.leadership";
        let (client, [statement]) = self.session.prepared([ask]).await?;
        let row =
            client.query_one(&statement, &[]).await.map_err(|error| self.session.failed("see who leads", error))?;
        self.reached = true;
        Ok(Seen { term: column(&row, 0)?, beat: column(&row, 1)?, holder: column(&row, 2)?, address: column(&row, 3)? })
    }

    /// Takes the leadership from the row as it was seen; none: somebody was quicker, or the leader lives.
    async fn take(&mut self, seen: &Seen) -> Option<i64> {
        let sent = boot_time();
        let taken = match timeout(ANSWER_TIMEOUT, self.try_take(seen)).await {
            Ok(taken) => taken,
            // Taken or not: nobody acts on it, and whoever stands next sees it.
            Err(_late) => Err(self.session.unreachable("it does not answer")),
        };
        match taken {
            Ok(Some(term)) => {
                self.leadership.extend(sent);
                self.tell(Role::Leading { term: Term(term.unsigned_abs()) });
                Some(term)
            }
            Ok(None) => None,
            Err(error) => {
                self.unreached(&error);
                None
            }
        }
    }

    /// The term is at least the time in milliseconds, so that a data base which lost its last writes, or was
    /// restored, never gives a term again that hosts have seen.
    async fn try_take(&mut self, seen: &Seen) -> Result<Option<i64>, Error> {
        let end_writers = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND usename = current_user AND application_name = $1";
        let take = "UPDATE muster.leadership
            SET term = greatest(term + 1, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint),
                holder = $1, address = $2, beat = 0
            WHERE term = $3 AND beat = $4 RETURNING term";
        let (client, [end_writers, take]) = self.session.prepared([end_writers, take]).await?;
        // Their leader's lease is over; one that was stopped amid a transaction would keep its lock on the row.
        let ended = client.execute(&end_writers, &[&WRITER]).await;
        let taken = match ended {
            Ok(_) => {
                let candidate = &self.candidate;
                client.query_opt(&take, &[&candidate.holder, &candidate.address, &seen.term, &seen.beat]).await
            }
            Err(error) => Err(error),
        };
        let row = taken.map_err(|error| self.session.failed("take the leadership", error))?;
        row.map(|row| column(&row, 0)).transpose()
    }

    /// Renews until that fails; none: given up in order.
    async fn lead(&mut self, term: i64) -> Option<String> {
        let every = Duration::from_millis(limits::LEADER_RENEW.0);
        let mut pause = every;
        loop {
            if timeout(pause, self.resigned.recv()).await.is_ok() {
                self.leadership.end();
                self.vacate(term).await;
                return None;
            }
            let sent = boot_time();
            let left = self.leadership.left();
            if left.is_zero() {
                return Some("its leadership was not renewed in time; another coordinator may lead now".to_owned());
            }
            pause = match timeout(left, self.renew(term)).await {
                Ok(Ok(true)) => {
                    self.leadership.extend(sent);
                    every.saturating_sub(boot_time().saturating_sub(sent))
                }
                Ok(Ok(false)) => return Some("another coordinator has taken the leadership over".to_owned()),
                Ok(Err(error)) => {
                    self.unrenewed(&error);
                    RETRY_PAUSE
                }
                Err(_late) => Duration::ZERO,
            };
        }
    }

    fn unrenewed(&mut self, error: &Error) {
        if self.reached {
            tracing::warn!("the leadership is not renewed: {}", crate::chain(error));
        }
        self.reached = false;
        self.session.drop_connection();
    }

    async fn renew(&mut self, term: i64) -> Result<bool, Error> {
        let renew = "UPDATE muster.leadership SET beat = beat + 1 WHERE term = $1";
        let (client, [renew]) = self.session.prepared([renew]).await?;
        let rows = client.execute(&renew, &[&term]).await;
        let rows = rows.map_err(|error| self.session.failed("renew the leadership", error))?;
        self.reached = true;
        Ok(rows == 1)
    }

    /// So that a standby need not wait. If it fails, it waits.
    async fn vacate(&mut self, term: i64) {
        let vacate = "UPDATE muster.leadership SET holder = NULL, address = NULL WHERE term = $1";
        let done = async {
            let (client, [vacate]) = self.session.prepared([vacate]).await?;
            client.execute(&vacate, &[&term]).await.map_err(|error| self.session.failed("resign", error))
        };
        if let Ok(Err(error)) = timeout(Duration::from_secs(1), done).await {
            tracing::warn!("the leadership runs out by itself: {}", crate::chain(&error));
        }
    }
}
