//! What goes to a node's stream or a provider, from the core's effects.

use std::collections::BTreeMap;

use muster_core::{
    effect::{DrainNotice, Effect, StopOrder},
    ids::{AttemptId, Epoch, HostRequestId, NodeId, PoolName, SessionId},
    limits,
    policy::HostTemplate,
    timeline::Seen,
};
use muster_proto::{
    convert,
    v1::{self, coordinator_message::Message},
};

use crate::seal::Seal;

/// What goes to a node's stream.
#[derive(Clone, Debug)]
pub enum Order {
    /// As it is.
    Message(Message),
    /// Attempts to start: the stream's own task adds what they run.
    Start(Vec<(AttemptId, Epoch)>),
    /// Break the stream, with a sentence for the other side.
    Close(String),
}

/// What goes to a pool's provider.
#[derive(Clone, Debug)]
pub enum HostOrder {
    /// Make a host.
    Create {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
        /// What to make.
        template: HostTemplate,
    },
    /// Wake a host that sleeps.
    Wake {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
        /// Its node.
        node: NodeId,
        /// That one's name.
        name: String,
        /// That one's labels.
        labels: BTreeMap<String, String>,
    },
    /// Ask whether a host may be deleted.
    Describe {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
    },
    /// End a host.
    Delete {
        /// The pool.
        pool: PoolName,
        /// The stored request.
        host: HostRequestId,
        /// Its node, if it joined.
        node: Option<NodeId>,
    },
}

/// The order that an effect is, and the stream that it goes to. `told` is what is committed now, by whom.
#[must_use]
pub fn order_of(effect: Effect, told: Seen, seal: &Seal) -> Option<(SessionId, Order)> {
    let ids = |attempts: Vec<AttemptId>| attempts.into_iter().map(v1::AttemptId::from).collect();
    Some(match effect {
        Effect::Start { session, attempts, .. } => (session, Order::Start(attempts)),
        Effect::CloseSession { session, reason, .. } => (session, Order::Close(reason)),
        Effect::Welcome { node, session, incarnation, unknown, drain } => {
            let welcome = v1::Welcome {
                node: node.0,
                incarnation: incarnation.0,
                term: told.term.0,
                heartbeat_interval_ms: milliseconds(limits::HEARTBEAT_INTERVAL.0),
                unknown: ids(unknown),
                // At most a quarter of a lease, so that all are back before any lease runs out.
                reconnect_spread_ms: milliseconds(limits::LEASE_MIN.percent(25).0),
                drain: drain.map(notice_to_wire),
            };
            (session, Order::Message(Message::Welcome(welcome)))
        }
        Effect::GrantLease { session, sequence, duration, unknown, .. } => {
            let lease = v1::Lease {
                sequence,
                duration_ms: milliseconds(duration.0),
                unknown: ids(unknown),
                term: told.term.0,
                commit: told.commit,
                seal: seal.of(told).to_vec().into(),
            };
            (session, Order::Message(Message::Lease(lease)))
        }
        Effect::Stop { session, attempts, .. } => {
            let stop = v1::StopAttempts { attempts: attempts.into_iter().map(stop_to_wire).collect() };
            (session, Order::Message(Message::Stop(stop)))
        }
        Effect::Acknowledge { session, attempts, .. } => {
            (session, Order::Message(Message::Stored(v1::ReportsStored { attempts: ids(attempts) })))
        }
        Effect::Recall { session, count, .. } => (session, Order::Message(Message::Recall(v1::Recall { count }))),
        Effect::NoticeDrain { session, notice, .. } => {
            (session, Order::Message(Message::DrainNotice(notice_to_wire(notice))))
        }
        Effect::AskDrained { session, revision, refusable, .. } => {
            (session, Order::Message(Message::AskDrained(v1::AskDrained { revision: revision.0, refusable })))
        }
        Effect::Release { session, revision, then, .. } => {
            let release = v1::Release { revision: revision.0, then: convert::then_to_wire(then).into() };
            (session, Order::Message(Message::Release(release)))
        }
        Effect::Reopen { session, revision, .. } => {
            (session, Order::Message(Message::Reopen(v1::Reopen { revision: revision.0 })))
        }
        Effect::Reply { .. }
        | Effect::CreateHost { .. }
        | Effect::WakeHost { .. }
        | Effect::AskHost { .. }
        | Effect::DeleteHost { .. } => return None,
    })
}

fn milliseconds(span: u64) -> u32 {
    u32::try_from(span).unwrap_or(u32::MAX)
}

fn stop_to_wire(order: StopOrder) -> v1::StopAttempt {
    v1::StopAttempt {
        attempt: Some(order.attempt.into()),
        epoch: Some(order.epoch.into()),
        reason: convert::stop_to_wire(order.reason).into(),
        grace_ms: order.grace.0,
        first_signal: order.first.unwrap_or(0).into(),
    }
}

fn notice_to_wire(notice: DrainNotice) -> v1::DrainNotice {
    v1::DrainNotice { within_ms: notice.within.map(|within| within.0) }
}
