//! Before the scaler drains a host, its provider is asked whether it may be
//! deleted: work would be moved away for a host that then stays and is paid.
//!
//! ```text
//! not asked --a victim--> asked --may go--> cleared (for a while): it is drained
//!     ^                     |
//!     |                     +--is kept, or cannot be told--> no victim (for a while)
//!     +---------------------- after a while -----------------+
//! ```

use alloc::{format, string::String, vec::Vec};

use super::{Fleet, Output, Timer, record};
use crate::{
    effect::{Effect, Subject},
    ids::{HostRequestId, NodeId, PoolName},
    limits,
    mutation::{self, Mutation},
    policy::ProviderKind,
    pool::{Host, Pool, Preflight},
    time::Timestamp,
};

impl Pool {
    /// Why its provider keeps this host; none: it does not, or was not asked lately.
    pub(super) fn kept(&self, host: Option<HostRequestId>, now: Timestamp) -> Option<&str> {
        match self.preflights.get(&host?)? {
            Preflight::Kept { since, reason } if now.since(*since) < limits::PREFLIGHT_KEPT => Some(reason),
            Preflight::Kept { .. } | Preflight::Asked(_) | Preflight::Cleared(_) => None,
        }
    }
}

impl Fleet {
    /// Of these victims, those that may be drained now. The provider is asked for the others.
    pub(super) fn cleared(
        &mut self,
        name: &PoolName,
        victims: &[NodeId],
        now: Timestamp,
        out: &mut Output,
    ) -> Vec<NodeId> {
        let Some(pool) = self.pools.get_mut(name) else { return Vec::new() };
        // A program's hosts have an account of their own, with locks that nobody tells us of.
        if pool.record.policy.provider != ProviderKind::Exec || mutation::is_on(Mutation::ProviderUnasked) {
            return victims.to_vec();
        }
        pool.preflights.retain(|host, _| pool.record.hosts.contains_key(host));
        let (mut cleared, mut again) = (Vec::new(), None);
        for node in victims {
            let host = self.nodes.get(node).and_then(|node| node.record.host);
            // One that joined by itself has nobody who deletes it, and the drain is refused for that.
            let Some(host) = host.filter(|host| matches!(pool.record.hosts.get(host), Some(Host::Joined(_)))) else {
                continue;
            };
            let asked = match pool.preflights.get(&host) {
                Some(Preflight::Cleared(at)) if now.since(*at) < limits::PREFLIGHT_CLEARED => {
                    cleared.push(*node);
                    continue;
                }
                Some(Preflight::Asked(at)) if now.since(*at) < limits::PROVIDER_LOOK_TIME => *at,
                Some(Preflight::Asked(_) | Preflight::Cleared(_) | Preflight::Kept { .. }) | None => {
                    pool.preflights.insert(host, Preflight::Asked(now));
                    out.effects.push(Effect::AskHost { pool: name.clone(), host });
                    now
                }
            };
            // An answer that is lost is asked for again.
            again = Some(asked + limits::PROVIDER_LOOK_TIME);
        }
        if let Some(again) = again {
            self.wake_at(again, Timer::Pool(name.clone()));
        }
        cleared
    }

    /// The provider says whether a host may be deleted; none: it may.
    pub(super) fn host_described(
        &mut self,
        name: &PoolName,
        host: HostRequestId,
        kept: Option<String>,
        now: Timestamp,
        out: &mut Output,
    ) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        let Some(Host::Joined(node)) = pool.record.hosts.get(&host).copied() else { return };
        let answer = match kept {
            None => Preflight::Cleared(now),
            Some(reason) => {
                let sentence = format!("its provider does not delete it: {reason}; another host goes in its place");
                record(out, now, Subject::Node(node), "kept", sentence, None);
                self.timers.set(now + limits::PREFLIGHT_KEPT, Timer::Pool(name.clone()));
                Preflight::Kept { since: now, reason }
            }
        };
        pool.preflights.insert(host, answer);
        pool.next_look = now;
        self.wake_at(now, Timer::Pool(name.clone()));
    }
}
