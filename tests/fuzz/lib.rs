//! Mutated input for everything that reads what others wrote: the wire and the
//! rules behind it, the spawner's and the init's packets, the kernel's texts,
//! people's files. No input may panic, hang, allocate without bound or break a
//! promise of the fleet's state.
//!
//! A [`Target`] is a function over bytes, and the corpus of its real encodings
//! is a folder of `tests/fuzz/corpus`. [`run`] mutates members of the corpus and
//! keeps those results that show something new. Equal seeds give equal runs.
//!
//! What a panic cannot show (an overflown stack, memory past [`DATA_BYTES_MAX`],
//! a loop that does not end) ends the process: the input is then in the file
//! that each run writes ahead, see [`Ahead`].

mod ahead;
mod corpus;
mod dice;
mod mutation;
mod protobuf;
mod run;
mod target;
pub mod targets;

pub use ahead::{Ahead, DATA_BYTES_MAX, HANG, limit_memory, watch};
pub use corpus::{folder, keep, load, write_seeds};
pub use run::{Bounds, Failure, Figures, play, run};
pub use target::{Shape, Signs, Target};

/// The largest input that is tried.
pub const INPUT_BYTES_MAX: usize = 16 << 10;
