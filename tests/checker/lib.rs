//! Judges a history: what a client asked and heard, what the jobs' own processes
//! wrote, and what the fleet said in the end. It knows the promises and nothing
//! of how they are kept.

mod history;
mod rules;
#[cfg(test)]
mod tests;

pub use history::{Attempt, Delivery, History, Malformed, Observation, Process, Record};
pub use rules::{Rule, Violation, judge};
