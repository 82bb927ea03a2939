//! The whole state, and the one way to change it.

/// Placeholder until the modules below it land.
#[derive(Debug, Default)]
pub struct Fleet {}
