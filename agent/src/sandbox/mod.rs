//! What a job sees, and what it is kept from.

pub mod cgroup;
mod descendants;
pub mod fences;
pub mod files;
pub mod init;
pub mod landlock;
pub mod lease;
pub mod mounts;
pub mod order;
pub mod seccomp;
pub mod status;
pub mod sys;
pub mod traces;
pub mod watch;
