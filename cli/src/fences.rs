//! Which fences a profile asks, and which of them a fleet lacks: for
//! `--best-effort` and the demo, which name exactly those and say so.

use std::collections::BTreeSet;

use muster_core::fence;
use muster_proto::v1::Node;

use crate::template::Profile;

/// Fences that a profile asks of a host.
pub const fn of_profile(profile: Profile) -> &'static [&'static str] {
    match profile {
        Profile::Strict => &fence::STRICT,
        Profile::Shared => &fence::SHARED,
        Profile::None => &[],
    }
}

/// What the profile asks and none of these nodes has.
pub fn lacking<'a>(profile: Profile, nodes: impl Iterator<Item = &'a Node>) -> Vec<String> {
    let have: BTreeSet<&str> = nodes.flat_map(|node| node.fences.iter().map(String::as_str)).collect();
    of_profile(profile).iter().filter(|fence| !have.contains(**fence)).map(|fence| (*fence).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_node_has_is_done_without() {
        let node =
            |fences: &[&str]| Node { fences: fences.iter().map(|f| (*f).to_owned()).collect(), ..Node::default() };
        let unlimited: Vec<&str> = fence::STRICT.into_iter().filter(|name| !name.starts_with("limits.")).collect();
        let nodes = [node(&unlimited), node(&["limits.disk"])];
        assert_eq!(lacking(Profile::Strict, nodes.iter()), ["limits.cpu", "limits.memory", "limits.pids"]);
        assert!(lacking(Profile::None, [].iter()).is_empty());
    }
}
