//! What end-to-end tests share: real processes that never outlive their test,
//! a typed client, and waiting for a condition with a deadline. Nothing here
//! knows what a test asserts.

pub mod client;
pub mod crowd;
pub mod fleet;
pub mod ha;
pub mod host;
pub mod network;
pub mod part;
pub mod postgres;
pub mod preload;
pub mod wait;

pub use client::{Client, Finished};
pub use crowd::Crowd;
pub use fleet::{Fleet, NodeOptions};
pub use ha::HighlyAvailable;
pub use network::{Cut, Network};
pub use preload::Preload;
pub use wait::{WAIT, eventually, eventually_blocking, until};

/// Ends the test early and loudly: the runner counts it as skipped, and fails
/// unless `tests/skips.toml` excuses it by a feature that this host lacks.
#[macro_export]
macro_rules! skip {
    ($reason:expr) => {{
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        println!("SKIP {name}: {}", $reason);
        return;
    }};
}
