//! A host whose disk is nearly full gets nothing new: it could start nothing, and keep no output. It says so with each
//! heartbeat, and gets work again by itself when there is room.

use alloc::format;

use super::{Fleet, Output, record};
use crate::{
    effect::{Effect, Subject},
    event::HostSample,
    ids::NodeId,
    limits,
    mutation::{self, Mutation},
    resources::Bytes,
    time::Timestamp,
};

impl Fleet {
    /// By its last figures; without any it stays as it was (FL-12).
    pub(super) fn look_at_disk(&mut self, id: NodeId, now: Timestamp, out: &mut Output) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some((available, floor)) = room(&node.sample) else { return };
        let subject = Subject::Node(id);
        match node.record.disk_full {
            None if available < floor && !mutation::is_on(Mutation::DiskFullIgnored) => {
                node.record.disk_full = Some(now);
                let (left, again) = (Bytes(available), Bytes(floor * 2));
                let sentence = format!("{left} are left on its disk: nothing new is placed there until {again} are");
                record(out, now, subject, "disk_full", sentence, None);
                // What was sent ahead could not start.
                if let Some(session) = node.session.filter(|_| !node.prefilled.is_empty()) {
                    out.effects.push(Effect::Recall { node: id, session, count: u32::MAX });
                }
            }
            Some(since) if available >= floor * 2 => {
                node.record.disk_full = None;
                let sentence = format!("{} are free on its disk, after {}", Bytes(available), now.since(since));
                record(out, now, subject, "disk_freed", sentence, None);
                self.freed.insert(id);
            }
            None | Some(_) => return,
        }
        out.touched.nodes.insert(id);
        self.reindex(id);
    }
}

/// What is free, and what must be.
fn room(sample: &HostSample) -> Option<(u64, u64)> {
    let total = sample.disk_total_bytes.filter(|total| *total > 0)?;
    let floor = limits::HOST_DISK_FLOOR_BYTES.min(total / limits::HOST_DISK_FLOOR_PART);
    Some((sample.disk_available_bytes?, floor))
}
