//! An agent's stream and its uploads. The node is the one of the certificate.
//!
//! Two tasks a stream: one translates what comes and hands it to the driver,
//! the other adds to the driver's orders what attempts run. Each waits for the
//! other side alone, so a slow agent slows nobody else.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use muster_core::{
    event::Event,
    ids::{AttemptId, NodeId, SessionId, Term},
    limits,
    time::Millis,
    timeline::Seen,
};
use muster_proto::{
    convert,
    v1::{self, agent_message::Message, attempt_report::Change, coordinator_message},
};
use prost::Message as _;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Context, blobs, blocking, caller, enrollment, shown::Detail, status};
use crate::{
    chain,
    identity::{Caller, NodeKeyRequest},
    logs::Chunk,
    orders::Order,
    starts,
};

/// Messages that wait for HTTP/2's flow control; the real queue is the outbox.
const OUT_MAX: usize = 16;
/// Log chunks that are written and synced together.
const LOG_BATCH_MAX: usize = 64;

/// The service.
#[derive(Debug)]
pub struct Agent(pub Arc<Context>);

fn node<T>(request: &Request<T>) -> Result<(NodeId, [u8; 32]), Status> {
    match caller(request).as_ref() {
        Caller::Node { node, key } => Ok((*node, *key)),
        Caller::Nobody | Caller::Stranger { .. } | Caller::Person { .. } | Caller::Unclear => {
            Err(Status::permission_denied("only a node may call this"))
        }
    }
}

#[tonic::async_trait]
impl v1::agent_server::Agent for Agent {
    type SessionStream = Answers<v1::CoordinatorMessage>;
    type UploadLogsStream = Answers<v1::LogAck>;
    type FetchBlobStream = Answers<v1::BlobChunk>;

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (node, key) = node(&request)?;
        let (out, answers) = mpsc::channel(OUT_MAX);
        let stream = Session { context: self.0.clone(), node, key, messages: request.into_inner(), out };
        tokio::spawn(stream.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let (node, known) = node(&request)?;
        let key = NodeKeyRequest::read(&request.into_inner().csr).map_err(status::identity)?;
        if key.digest != known {
            return Err(Status::permission_denied("a certificate is renewed for the key that it has"));
        }
        enrollment::certificate(&self.0, &key, node).await
    }

    async fn upload_logs(
        &self,
        request: Request<Streaming<v1::LogChunk>>,
    ) -> Result<Response<Self::UploadLogsStream>, Status> {
        let (node, _) = node(&request)?;
        let (out, answers) = mpsc::channel(OUT_MAX);
        let upload = Upload { context: self.0.clone(), node, chunks: request.into_inner(), known: HashMap::new() };
        tokio::spawn(upload.run(out));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn fetch_blob(&self, request: Request<v1::BlobRef>) -> Result<Response<Self::FetchBlobStream>, Status> {
        blobs::fetch(&self.0, request.into_inner()).await
    }

    async fn store_blob(&self, request: Request<Streaming<v1::BlobChunk>>) -> Result<Response<v1::BlobRef>, Status> {
        blobs::store(&self.0, request.into_inner()).await
    }
}

type Out = mpsc::Sender<Result<v1::CoordinatorMessage, Status>>;

/// One stream, before its hello.
struct Session {
    context: Arc<Context>,
    node: NodeId,
    key: [u8; 32],
    messages: Streaming<v1::AgentMessage>,
    out: Out,
}

impl Session {
    async fn run(mut self) {
        let (session, sender) = match self.open().await {
            Ok(opened) => opened,
            Err(status) => {
                // The agent may be gone already.
                let _ = self.out.send(Err(status)).await;
                return;
            }
        };
        let ended = tokio::select! {
            ended = self.receive(session) => ended,
            // Cut by the driver, or the agent went away: nothing more can be sent.
            _ = sender => Ok(()),
        };
        if let Err(refusal) = ended {
            tracing::warn!(node = %self.node, "the node's stream is cut: {}", refusal.message());
            let _ = self.out.send(Err(refusal)).await;
        }
        // The driver is stopping, or is told that the stream is over.
        let _ = self.context.handle.event(Event::NodeDisconnected { node: self.node, session }).await;
    }

    /// The first message is Hello, in time.
    async fn open(&mut self) -> Result<(SessionId, JoinHandle<()>), Status> {
        let patience = Duration::from_millis(limits::HANDSHAKE_TIMEOUT.0);
        let first = tokio::time::timeout(patience, self.messages.message());
        let first = first.await.map_err(|_| Status::deadline_exceeded("no hello in time"))??;
        let Some(Message::Hello(wire)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("the first message of a session is Hello"));
        };
        let hello = convert::hello(&wire).map_err(status::rejected)?;
        let seen = Seen { term: Term(wire.seen_term), commit: wire.seen_commit };
        let seen = self.context.authority.seal().checked(seen, &wire.seen_seal);
        let held: HashSet<AttemptId> = hello.held.iter().map(|held| held.attempt).collect();
        let (outbox, orders) = mpsc::channel(limits::SESSION_QUEUE_MAX);
        let connected = self.context.handle.connect(self.node, self.key, hello, seen, outbox);
        let session = connected.await.map_err(status::stopped)?;
        self.context.vitals.update(self.node, |vitals| {
            vitals.agent_version = wire.agent_version;
            vitals.kernel = wire.kernel;
            // What it has lost meanwhile has no end to come.
            vitals.starts.retain(|attempt, _| held.contains(attempt));
        });
        let sender = tokio::spawn(send_orders(self.context.clone(), self.node, session, orders, self.out.clone()));
        Ok((session, sender))
    }

    async fn receive(&mut self, session: SessionId) -> Result<(), Status> {
        loop {
            let message = match self.messages.message().await {
                Ok(Some(message)) => message.message,
                // A broken stream says nothing about the node; only its lease does.
                Ok(None) | Err(_) => return Ok(()),
            };
            match message {
                Some(message) => self.translate(session, message).await?,
                // A message of a later version: nothing that we know is in it.
                None => continue,
            }
        }
    }

    async fn translate(&self, session: SessionId, message: Message) -> Result<(), Status> {
        let node = self.node;
        let event = match message {
            Message::Hello(_) => {
                return Err(Status::invalid_argument("Hello is the first message, and only the first"));
            }
            Message::Heartbeat(beat) => self.heartbeat(session, beat)?,
            Message::Reports(reports) => {
                let events = reports.reports.into_iter().map(|report| self.report(session, report));
                let events = events.collect::<Result<_, _>>()?;
                return self.context.handle.events(events).await.map_err(status::stopped);
            }
            Message::DrainProof(proof) => {
                Event::DrainProved { node, session, revision: muster_core::ids::Revision(proof.revision) }
            }
            Message::StopNotice(notice) => Event::StopNotice {
                node,
                session,
                reason: convert::reason(&notice.reason).map_err(status::rejected)?,
                within: notice.within_ms.map(Millis),
            },
            Message::Stuck(stuck) => Event::AttemptStuck {
                node,
                session,
                attempt: convert::attempt_id(stuck.attempt.as_ref()).map_err(status::rejected)?,
            },
            Message::GivenBack(given) => {
                let attempts = given.attempts.iter().map(|id| convert::attempt_id(Some(id))).collect::<Result<_, _>>();
                Event::GivenBack { node, session, attempts: attempts.map_err(status::rejected)? }
            }
            Message::DrainRefused(refused) => Event::DrainRefused {
                node,
                session,
                revision: muster_core::ids::Revision(refused.revision),
                reason: convert::reason(&refused.reason).map_err(status::rejected)?,
            },
        };
        self.tell(event).await
    }

    async fn tell(&self, event: Event) -> Result<(), Status> {
        self.context.handle.event(event).await.map_err(status::stopped)
    }

    fn heartbeat(&self, session: SessionId, beat: v1::Heartbeat) -> Result<Event, Status> {
        let held = convert::held(&beat.held).map_err(status::rejected)?;
        let sample = convert::sample(beat.metrics.as_ref());
        let now = self.context.handle.now();
        let usage = beat.usage.into_iter();
        let usage = usage.filter_map(|one| Some((convert::attempt_id(one.attempt.as_ref()).ok()?, one.usage?)));
        self.context.vitals.update(self.node, |vitals| {
            vitals.metrics = beat.metrics;
            vitals.at = now;
            vitals.usage = usage.collect();
        });
        Ok(Event::Heartbeat { node: self.node, session, sequence: beat.sequence, sample, held })
    }

    fn report(&self, session: SessionId, report: v1::AttemptReport) -> Result<Event, Status> {
        let attempt = convert::attempt_id(report.attempt.as_ref()).map_err(status::rejected)?;
        let epoch = convert::epoch(report.epoch.as_ref()).map_err(status::rejected)?;
        let node = self.node;
        match report.change {
            Some(Change::Started(started)) => {
                self.context.vitals.update(node, |vitals| drop(vitals.starts.insert(attempt, started)));
                Ok(Event::AttemptStarted { node, session, attempt, epoch })
            }
            Some(Change::Ended(ended)) => {
                let end = convert::end(ended.end.as_ref()).map_err(status::rejected)?;
                // Its size is checked; what is kept has the start's figures beside it.
                convert::detail(&ended).map_err(status::rejected)?;
                let wall = Some(Millis(ended.wall_ms));
                let started = self.context.vitals.update(node, |vitals| vitals.starts.remove(&attempt));
                let detail = Detail { ended: Some(ended), started }.encode_to_vec();
                Ok(Event::AttemptEnded { node, session, attempt, epoch, end, wall, detail })
            }
            None => Err(Status::invalid_argument("a report says that its attempt started or ended")),
        }
    }
}

/// Adds to the driver's orders what attempts run, and sends them in order.
async fn send_orders(
    context: Arc<Context>,
    node: NodeId,
    session: SessionId,
    mut orders: mpsc::Receiver<Order>,
    out: Out,
) {
    loop {
        let order = tokio::select! {
            order = orders.recv() => order,
            () = out.closed() => return,
        };
        let Some(order) = order else { return };
        let messages = match order {
            Order::Message(message) => vec![Ok(message)],
            Order::Start(attempts) => start_messages(&context, node, session, attempts).await,
            Order::Close(reason) => vec![Err(Status::aborted(reason))],
        };
        for message in messages {
            let last = message.is_err();
            let message = message.map(|message| v1::CoordinatorMessage { message: Some(message) });
            if out.send(message).await.is_err() || last {
                return;
            }
        }
    }
}

/// The orders for attempts that are placed on the node. Those that cannot be made end their attempts here: the stream
/// is for all jobs of the node, and the next node would be told no better.
async fn start_messages(
    context: &Arc<Context>,
    node: NodeId,
    session: SessionId,
    attempts: Vec<(AttemptId, muster_core::ids::Epoch)>,
) -> Vec<Result<coordinator_message::Message, Status>> {
    let orders = if context.bodies.are_at_hand(&attempts) {
        context.bodies.orders(&attempts).map_err(status::start)
    } else {
        let bodies = context.bodies.clone();
        blocking(move || bodies.orders(&attempts).map_err(status::start)).await
    };
    let orders = match orders {
        Ok(orders) => orders,
        Err(status) => return vec![Err(status)],
    };
    let ended = orders.unreadable.into_iter().map(|unreadable| {
        let starts::Unreadable { attempt, epoch, error } = &unreadable;
        tracing::error!(%attempt, "the attempt ends before it is ordered: {}", chain(error));
        let end = unreadable.end();
        let wire = v1::AttemptEnded { end: Some(convert::end_to_wire(&end)), ..Default::default() };
        let detail = Detail { ended: Some(wire), started: None }.encode_to_vec();
        Event::AttemptEnded { node, session, attempt: *attempt, epoch: *epoch, end, wall: None, detail }
    });
    let ended: Vec<_> = ended.collect();
    if !ended.is_empty()
        && let Err(stopped) = context.handle.events(ended).await
    {
        return vec![Err(status::stopped(stopped))];
    }
    orders.messages.into_iter().map(|order| Ok(coordinator_message::Message::Start(order))).collect()
}

/// One stream of output.
struct Upload {
    context: Arc<Context>,
    node: NodeId,
    chunks: Streaming<v1::LogChunk>,
    /// Attempts that are this node's, and under which leader each was placed. Looked up again when it has been emptied.
    known: HashMap<AttemptId, Term>,
}

/// So many of them are remembered: a node may end a million a day on one stream.
const KNOWN_MAX: usize = 4_096;

/// What came at once.
#[derive(Default)]
struct Batch {
    chunks: Vec<Chunk>,
    /// Of attempts that are not this node's.
    strange: Vec<v1::LogAck>,
}

impl Batch {
    const fn len(&self) -> usize {
        self.chunks.len() + self.strange.len()
    }
}

impl Upload {
    async fn run(mut self, out: mpsc::Sender<Result<v1::LogAck, Status>>) {
        loop {
            let answers = match self.next_batch().await {
                Ok(batch) if batch.len() == 0 => return,
                Ok(batch) => self.keep(batch).await,
                Err(status) => Err(status),
            };
            match answers {
                Ok(answers) => {
                    for answer in answers {
                        if out.send(Ok(answer)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(status) => {
                    let _ = out.send(Err(status)).await;
                    return;
                }
            }
        }
    }

    /// Waits for one chunk and takes what is there with it: one sync for all.
    async fn next_batch(&mut self) -> Result<Batch, Status> {
        let mut batch = Batch::default();
        let Some(first) = self.chunks.message().await? else { return Ok(batch) };
        self.sort(first, &mut batch).await?;
        while batch.len() < LOG_BATCH_MAX {
            let Some(next) = self.chunks.message().now_or_never() else { break };
            let Some(next) = next? else { break };
            self.sort(next, &mut batch).await?;
        }
        Ok(batch)
    }

    /// Output of an attempt that is not this node's, of which a restored store may know nothing, has no reader: it
    /// counts as taken and is dropped. Refused, it would come again for ever and hold up all other output of its host.
    async fn sort(&mut self, wire: v1::LogChunk, batch: &mut Batch) -> Result<(), Status> {
        let attempt = convert::attempt_id(wire.attempt.as_ref()).map_err(status::rejected)?;
        let stream = convert::stream(wire.stream).map_err(status::rejected)?;
        let known = match self.known.get(&attempt) {
            Some(term) => Some(*term),
            None => term_of(&self.context, attempt, self.node).await?,
        };
        let Some(term) = known else {
            tracing::warn!(node = %self.node, %attempt, "output of an attempt that is not this node's is dropped");
            let offset = wire.offset.saturating_add(wire.data.len() as u64);
            batch.strange.push(v1::LogAck { attempt: wire.attempt, stream: wire.stream, offset });
            return Ok(());
        };
        if self.known.len() >= KNOWN_MAX {
            self.known.clear();
        }
        self.known.insert(attempt, term);
        batch.chunks.push(Chunk { attempt, term, stream, offset: wire.offset, data: wire.data });
        Ok(())
    }

    async fn keep(&self, Batch { chunks, strange }: Batch) -> Result<Vec<v1::LogAck>, Status> {
        if chunks.is_empty() {
            return Ok(strange);
        }
        // Hosts keep output until it is stored.
        self.context.room.check().await.map_err(status::no_room)?;
        let logs = self.context.logs.clone();
        let kept = blocking(move || logs.append(&chunks).map_err(status::log)).await?;
        let answers = kept.into_iter().map(|(attempt, stream, offset)| {
            self.context.handle.output_came(attempt);
            v1::LogAck { attempt: Some(attempt.into()), stream: stream.into(), offset }
        });
        Ok(answers.chain(strange).collect())
    }
}

/// The term of an attempt that is this node's. Live ones are in the fleet; the output of one that ended may still come.
async fn term_of(context: &Arc<Context>, attempt: AttemptId, node: NodeId) -> Result<Option<Term>, Status> {
    let live = context.handle.query(move |fleet, _| fleet.attempt(attempt).map(|record| (record.node, record.term)));
    if let Some((holder, term)) = live.await.map_err(status::stopped)? {
        return Ok((holder == node).then_some(term));
    }
    let reader = context.reader.clone();
    let stored = blocking(move || {
        reader.attempts(attempt.job, attempt.task..attempt.task.saturating_add(1)).map_err(status::store)
    });
    let mut stored = stored.await?.into_iter();
    Ok(stored.find(|stored| stored.id == attempt && stored.record.node == node).map(|stored| stored.record.term))
}
