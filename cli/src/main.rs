//! The `muster` executable.

fn main() {}
