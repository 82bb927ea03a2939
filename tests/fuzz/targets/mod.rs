//! All targets.

mod fleet;
mod fleet_seeds;
mod host_list;
mod init;
mod job_file;
mod join_token;
mod kernel_text;
mod pool_policy;
mod seen_mark;
mod spawner;

use crate::target::Target;

/// In the order in which the short run takes them.
pub const ALL: &[Target] = &[
    fleet::TARGET,
    spawner::REQUEST,
    spawner::EVENT,
    init::ORDER,
    init::STATUS,
    kernel_text::TARGET,
    job_file::TARGET,
    pool_policy::TARGET,
    host_list::TARGET,
    join_token::TARGET,
    seen_mark::TARGET,
];
