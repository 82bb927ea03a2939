//! How the rest of the coordinator speaks to the driver.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use muster_core::{
    event::{Event, Hello},
    fleet::Fleet,
    ids::{AttemptId, NodeId, RequestId, SessionId},
    time::Timestamp,
    timeline::Seen,
};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{AcceptedJob, Answer, Change, Input, Stopped};
use crate::{clock::Clock, orders::Order};

/// The driver's front: cheap to clone, hides the channel.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) inputs: mpsc::Sender<Input>,
    pub(super) changes: broadcast::Sender<Arc<Change>>,
    pub(super) next: Arc<AtomicU64>,
    pub(super) clock: Clock,
}

impl Handle {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    async fn send(&self, input: Input) -> Result<(), Stopped> {
        self.inputs.send(input).await.map_err(|_| Stopped)
    }

    /// Tells an event that gets no answer.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn event(&self, event: Event) -> Result<(), Stopped> {
        self.events(vec![event]).await
    }

    /// Tells several events that get no answer, in order and at once.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn events(&self, events: Vec<Event>) -> Result<(), Stopped> {
        self.send(Input::Events(events)).await
    }

    /// Asks for a change and waits until it is durable.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn ask(&self, event: impl FnOnce(RequestId) -> Event + Send) -> Result<Answer, Stopped> {
        self.request(event, None).await
    }

    /// As [`Self::ask`], with the job's body.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn submit(
        &self,
        job: AcceptedJob,
        event: impl FnOnce(RequestId) -> Event + Send,
    ) -> Result<Answer, Stopped> {
        self.request(event, Some(job)).await
    }

    async fn request(
        &self,
        event: impl FnOnce(RequestId) -> Event + Send,
        job: Option<AcceptedJob>,
    ) -> Result<Answer, Stopped> {
        let request = RequestId(self.number());
        let (reply, answer) = oneshot::channel();
        self.send(Input::Request { request, event: event(request), job, reply }).await?;
        answer.await.map_err(|_| Stopped)
    }

    /// Opens a node's stream; its orders come out of `outbox`.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn connect(
        &self,
        node: NodeId,
        key: [u8; 32],
        hello: Hello,
        seen: Seen,
        outbox: mpsc::Sender<Order>,
    ) -> Result<SessionId, Stopped> {
        let session = SessionId(self.number());
        self.send(Input::Connect { node, key, session, hello, seen, outbox }).await.map(|()| session)
    }

    /// Reads committed state.
    ///
    /// # Errors
    /// The driver has stopped.
    pub async fn query<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Fleet, Timestamp) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        let read = move |fleet: &Fleet, now: Timestamp| {
            // A caller that went away wants no answer.
            let _ = reply.send(read(fleet, now));
        };
        self.send(Input::Query(Box::new(read))).await?;
        answer.await.map_err(|_| Stopped)
    }

    /// Committed changes from now on.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Arc<Change>> {
        self.changes.subscribe()
    }

    /// Says that output of an attempt came.
    pub fn output_came(&self, attempt: AttemptId) {
        // No follower, nobody to tell.
        let _ = self.changes.send(Arc::new(Change::Output(attempt)));
    }

    /// The driver's clock.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Lets the driver finish what it has and end.
    pub async fn stop(&self) {
        let _ = self.send(Input::Stop).await;
    }
}
