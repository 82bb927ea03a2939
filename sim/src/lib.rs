//! A seeded, simulated fleet round the real core.
