//! The wire: package `muster.v1` as generated code, and [`convert`], the one
//! place that distrusts it.

pub mod convert;

/// In the refusal of a coordinator that does not lead: where the one that does is dialled, HOST:PORT.
pub const LEADER_METADATA: &str = "muster-leader";

/// Messages and services of `muster.v1`, generated from `proto/muster/v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("muster.v1");

    /// The compiled descriptors, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/muster.v1.bin"));
}
