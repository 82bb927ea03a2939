//! How many descriptors a process of ours may hold.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one: each held attempt keeps some descriptors, and each output file that is being
/// collected one.
pub fn raise_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _kept_as_it_is = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
