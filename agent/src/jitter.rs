//! Random spreads, so that a fleet does not act in step.

/// Uniform below `bound`; 0 if the bound is 0.
#[must_use]
pub fn below(bound: u64) -> u64 {
    if bound == 0 {
        return 0;
    }
    let mut random = [0; 8];
    getrandom::fill(&mut random).expect("the kernel has random numbers once it has booted");
    // The bias of a plain remainder is far below what a spread could show.
    u64::from_le_bytes(random) % bound
}
