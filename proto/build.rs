//! Compiles the protos without a system `protoc`.

use std::{env, path::PathBuf};

use prost::Message as _;

const PROTOS: [&str; 3] = ["muster/v1/types.proto", "muster/v1/agent.proto", "muster/v1/operator.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in PROTOS {
        println!("cargo:rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    std::fs::write(out.join("muster.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
