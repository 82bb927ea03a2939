//! A trace replayed against a pool's policy: the real core decides and places, in virtual time, and what it came to
//! is measured beside rules that are known, and beside what foresight would have paid.
//!
//! ```text
//! trace text ── reader ──► Workload ── World (Fleet, simple hosts) ──► Figures ──► report, plots
//!                             └──────── demand, oracle ────────────────────┘
//! ```

mod hosts;
mod measure;
mod models;
mod oracle;
mod plot;
mod reading;
mod report;
mod rules;
mod scaler;
mod synthetic;
mod workload;
mod world;

pub use measure::{Figures, Point, Waits};
pub use oracle::{Level, Plan, demand, peak, plan};
pub use plot::{html, svg};
pub use reading::{Assumptions, Files, Format, Source, Trace, TraceError, read};
pub use report::{Bounds, RIVALS, Report, Row, compare};
pub use rules::{Concurrency, Rule};
pub use synthetic::{Shape, synthetic};
pub use workload::{Arrival, Workload};
pub use world::{Conditions, Outcome, WHOLE, play};
