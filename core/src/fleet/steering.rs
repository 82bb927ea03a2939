//! What operators do to a pool besides setting its policy: stop its scaling,
//! give it a size of their own, take both back, and delete it when it is empty.

use alloc::{format, string::String};

use super::{Fleet, Output, Timer, record};
use crate::{
    denied::Denied,
    effect::{Reply, Subject},
    event::PoolOrder,
    ids::{Actor, PoolName},
    node::{Liveness, Mark},
    pool::Pin,
    time::Timestamp,
};

impl Fleet {
    pub(super) fn steer_pool(
        &mut self,
        name: PoolName,
        order: PoolOrder,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        if order == PoolOrder::Delete {
            return self.delete_pool(name, actor, reason, now, out);
        }
        let pool = self.pools.get_mut(&name).ok_or_else(|| Denied::UnknownPool(name.clone()))?;
        let max = pool.record.policy.max;
        let (kind, sentence) = match order {
            PoolOrder::Pause => {
                pool.record.stopped = Some(Mark { actor: actor.clone(), reason: reason.clone(), at: now });
                ("scaling_paused", reason)
            }
            PoolOrder::Resume => {
                pool.record.stopped = None;
                pool.record.paused = None;
                pool.record.paused_until = None;
                pool.record.failures = 0;
                pool.record.pin = None;
                ("scaling_resumed", reason)
            }
            PoolOrder::Scale { size, .. } if size > max => {
                return Err(Denied::PoolState {
                    pool: name,
                    asked: "scale",
                    state: format!("of max {max}, and {size} are asked"),
                    advice: "`muster pool set` changes its maximum",
                });
            }
            PoolOrder::Scale { size, until } => {
                let mark = Mark { actor: actor.clone(), reason: reason.clone(), at: now };
                pool.record.pin = Some(Pin { size, until, mark });
                let span = until.map_or_else(|| String::from("until resumed"), |at| format!("for {}", at.since(now)));
                ("size_set", format!("{size} hosts, {span}: {reason}"))
            }
            PoolOrder::Delete => return Ok(Reply::PoolSet),
        };
        pool.forget_breaches();
        let subject = Subject::Pool { name: name.clone(), sizes: None };
        record(out, now, subject, kind, sentence, Some(&actor));
        out.touched.pools.insert(name.clone());
        self.wake_at(now, Timer::Pool(name));
        Ok(Reply::PoolSet)
    }

    /// Only an empty pool that no job waits for: what is forgotten here can neither cost nor be missed.
    fn delete_pool(
        &mut self,
        name: PoolName,
        actor: Actor,
        reason: String,
        now: Timestamp,
        out: &mut Output,
    ) -> Result<Reply, Denied> {
        let pool = self.pools.get(&name).ok_or_else(|| Denied::UnknownPool(name.clone()))?;
        let here = self.nodes.values().filter(|node| node.record.pool == name);
        let nodes = here.filter(|node| !matches!(node.record.liveness, Liveness::Gone(_))).count();
        let jobs = self.jobs.values().filter(|job| job.finished.is_none() && job.spec.pool.as_ref() == Some(&name));
        let (hosts, jobs) = (pool.record.hosts.len().max(nodes), jobs.count());
        let denied =
            |state: String, advice| Err(Denied::PoolState { pool: name.clone(), asked: "delete", state, advice });
        if hosts > 0 {
            return denied(format!("of {hosts} hosts"), "`muster pool scale POOL 0` empties it first");
        }
        if jobs > 0 {
            return denied(format!("asked for by {jobs} jobs that are not finished"), "wait for them, or cancel them");
        }
        self.pools.remove(&name);
        self.indexes.remove(&name);
        record(out, now, Subject::Pool { name: name.clone(), sizes: None }, "deleted", reason, Some(&actor));
        out.touched.pools.insert(name);
        Ok(Reply::PoolSet)
    }
}
