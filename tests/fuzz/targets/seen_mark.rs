//! Sealed marks: what a host tells of earlier leaders counts with the right seal
//! alone. An input is a term, a commit, and the seal that came with them.

use muster_coordinator::seal::Seal;
use muster_core::{ids::Term, timeline::Seen};

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target =
    Target { name: "seen_mark", shape: Shape::Binary, words: &[], inputs_in_ci: 5_000, take, seeds };

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Some((term, rest)) = input.split_first_chunk() else { return Ok(()) };
    let Some((commit, seal)) = rest.split_first_chunk() else { return Ok(()) };
    let seen = Seen { term: Term(u64::from_be_bytes(*term)), commit: u64::from_be_bytes(*commit) };
    let ours = Seal::new(b"ours");
    let counts = ours.checked(seen, seal);
    signs.accepted = counts == seen;
    signs.count("seal", seal.len());
    signs.note("mark", if signs.accepted { "counts" } else { "does not" });
    match (counts == seen, seal == ours.of(seen)) {
        (true, true) => Ok(()),
        (true, false) if seen == Seen::default() => Ok(()),
        (true, false) => Err("it counts without its seal".into()),
        (false, true) => Err("it does not count with its seal".into()),
        (false, false) if counts == Seen::default() => Ok(()),
        (false, false) => Err("what does not count says something".into()),
    }
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let sealed = |secret: &[u8], term, commit| {
        let seen = Seen { term: Term(term), commit };
        [&term.to_be_bytes()[..], &commit.to_be_bytes(), &Seal::new(secret).of(seen)].concat()
    };
    vec![("ours", sealed(b"ours", 7, 812)), ("none", vec![0; 16]), ("theirs", sealed(b"theirs", 7, 812))]
}
