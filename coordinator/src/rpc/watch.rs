//! Watch: every change of state by its revision, as it is committed, from any
//! revision on. A reader that lost its stream asks for what comes after the last
//! revision that it has seen; nothing comes twice, and nothing is left out.
//!
//! What is told is read from the store, a page at a time, and only as fast as the
//! reader takes it: a slow reader costs a page, however far it is behind. One that
//! takes nothing for a while is let go, and told where to go on.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use muster_core::limits;
use muster_proto::v1;
use tokio::sync::{broadcast::error::RecvError, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Answers, Context, blocking, shown, status};
use crate::{driver::Change, store::HistoryQuery};

const PAGE: u32 = 1_000;
/// Events on their way to one reader.
const AHEAD_MAX: usize = 64;
const PATIENCE: Duration = Duration::from_millis(limits::WATCH_PATIENCE.0);

/// Opens a stream of what happened to `subject` (empty: to all) after revision `after`, at most the newest `limit`
/// of them (0: all), and with `follow` of what happens from now on.
pub(super) fn open(
    context: Arc<Context>,
    subject: String,
    after: u64,
    limit: u32,
    follow: bool,
) -> Answers<v1::FleetEvent> {
    let (out, answers) = mpsc::channel(AHEAD_MAX);
    let (end, ended) = oneshot::channel();
    let watch = Watch { context, subject, out };
    tokio::spawn(watch.run(after, limit, follow, end));
    // Beside the events, because a reader that is told to hurry has not taken those yet.
    let last = stream::once(ended).filter_map(|end| std::future::ready(end.ok().map(Err)));
    Box::pin(ReceiverStream::new(answers).map(Ok).chain(last))
}

/// One reader of the history.
struct Watch {
    context: Arc<Context>,
    subject: String,
    out: mpsc::Sender<v1::FleetEvent>,
}

/// Why a stream ends before its reader wants it to.
enum Ended {
    /// The reader is gone.
    Gone,
    /// It gets this as the last word.
    Told(Status),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Told(status)
    }
}

impl Watch {
    async fn run(self, after: u64, limit: u32, follow: bool, end: oneshot::Sender<Status>) {
        match self.tell_all(after, limit, follow).await {
            Ok(()) | Err(Ended::Gone) => {}
            // The reader may be gone by now.
            Err(Ended::Told(status)) => drop(end.send(status)),
        }
    }

    async fn tell_all(&self, mut after: u64, limit: u32, follow: bool) -> Result<(), Ended> {
        // Listening begins before the first look, so that nothing falls in between.
        let mut changes = self.context.handle.changes();
        self.check_known(after).await?;
        if limit > 0 {
            after = after.max(self.start_of_last(after, limit).await?);
        }
        loop {
            loop {
                let page = self.page(HistoryQuery { after, limit: PAGE, ..Default::default() }).await?;
                if page.is_empty() {
                    break;
                }
                for entry in page {
                    let revision = entry.revision;
                    tell(&self.out, shown::event(&self.context, entry), after, PATIENCE).await?;
                    after = revision;
                }
            }
            if !follow {
                return Ok(());
            }
            loop {
                tokio::select! {
                    change = changes.recv() => match change.as_deref() {
                        Ok(Change::Committed { revision, .. }) if *revision > after => break,
                        Ok(Change::Committed { .. } | Change::Output(_)) => {}
                        Err(RecvError::Lagged(_)) => break,
                        Err(RecvError::Closed) => return Err(status::stopped(crate::driver::Stopped).into()),
                    },
                    () = self.out.closed() => return Err(Ended::Gone),
                }
            }
        }
    }

    /// A reader that has seen more than there is would wait for ever, or miss what takes the place of what it saw.
    async fn check_known(&self, after: u64) -> Result<(), Status> {
        let last = HistoryQuery { limit: 1, newest: true, ..Default::default() };
        let reader = self.context.reader.clone();
        let entries = blocking(move || reader.history(&last).map_err(status::store)).await?;
        let newest = entries.last().map_or(0, |entry| entry.revision);
        if after > newest {
            return Err(Status::out_of_range(format!(
                "there is no revision {after} yet, the last is {newest}: if {after} was seen, the store has lost what \
                 came after {newest}; read the state anew and watch after revision {newest}"
            )));
        }
        Ok(())
    }

    async fn page(&self, query: HistoryQuery) -> Result<Vec<crate::store::Entry>, Status> {
        let (reader, query) = (self.context.reader.clone(), HistoryQuery { subject: self.subject.clone(), ..query });
        blocking(move || reader.history(&query).map_err(status::store)).await
    }

    /// The revision before the first of the newest `limit` ones.
    async fn start_of_last(&self, after: u64, limit: u32) -> Result<u64, Status> {
        let newest = self.page(HistoryQuery { after, limit, newest: true, ..Default::default() }).await?;
        Ok(newest.first().map_or(after, |first| first.revision - 1))
    }
}

/// `after` is the last revision that was told before this one.
async fn tell(
    out: &mpsc::Sender<v1::FleetEvent>,
    event: v1::FleetEvent,
    after: u64,
    patience: Duration,
) -> Result<(), Ended> {
    match tokio::time::timeout(patience, out.send(event)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Ended::Gone),
        Err(_elapsed) => Err(Ended::Told(Status::aborted(format!(
            "this reader took nothing for {} s; watch again after revision {after}",
            patience.as_secs()
        )))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_told_where_to_go_on() {
        let (out, answers) = mpsc::channel(1);
        assert!(tell(&out, v1::FleetEvent::default(), 6, PATIENCE).await.is_ok());
        let Err(Ended::Told(status)) = tell(&out, v1::FleetEvent::default(), 7, Duration::from_millis(1)).await else {
            panic!("it waits for a reader that stands still")
        };
        assert!(status.message().ends_with("watch again after revision 7"), "{status}");
        drop(answers);
        assert!(matches!(tell(&out, v1::FleetEvent::default(), 8, PATIENCE).await, Err(Ended::Gone)));
    }
}
