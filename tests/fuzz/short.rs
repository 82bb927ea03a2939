//! The short run of every target: its corpus, and a fixed number of changed inputs.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may panic")]

use std::{io::Write as _, path::Path};

use muster_fuzz::{Ahead, Bounds, Target, targets};

/// One after the other: a limit on memory is the whole process's.
#[test]
fn no_input_breaks_a_promise() {
    for target in targets::ALL {
        let corpus = muster_fuzz::load(target).unwrap();
        assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", target.name));
        let mut ahead = Ahead::begin(&path).unwrap();
        let watch = muster_fuzz::watch(&ahead);
        muster_fuzz::limit_memory().unwrap();
        before_it_may_die(target, &path);
        let figures = muster_fuzz::run(target, &corpus, 1, Bounds::Inputs(target.inputs_in_ci), &mut ahead);
        drop(watch);
        match figures {
            Ok(figures) => {
                println!("{}: {figures:?}", target.name);
                // A target that refuses everything, or all alike, tests nothing behind its first check.
                assert!(figures.accepted * 50 > figures.inputs && figures.signs > 3, "{}: {figures:?}", target.name);
            }
            Err(failure) => {
                let kept = muster_fuzz::keep(target, &failure.input).unwrap();
                panic!("{}: {}, kept as {}", target.name, failure.why, kept.display());
            }
        }
    }
}

/// Past the capture of output, which a process that is ended never shows.
fn before_it_may_die(target: &Target, ahead: &Path) {
    let sentence = format!(
        "fuzz {}: if this process ends now, its input is in {}, after eight bytes of length\n",
        target.name,
        ahead.display()
    );
    std::io::stderr().write_all(sentence.as_bytes()).unwrap();
}

/// The search finds what hides behind a few conditions, and finds it again for the same seed.
#[test]
fn a_planted_failure_is_found_and_made_small() {
    let planted = Target {
        name: "planted",
        shape: muster_fuzz::Shape::Text,
        words: &["width=", "height="],
        inputs_in_ci: 0,
        take: |input, signs| {
            let text = String::from_utf8_lossy(input);
            let width = text.split("width=").nth(1).map(|rest| rest.chars().take_while(char::is_ascii_digit).count());
            signs.count("digits", width.unwrap_or_default());
            assert!(width.is_none_or(|digits| digits < 9), "too wide");
            Ok(())
        },
        seeds: Vec::new,
    };
    let folder = tempfile::tempdir().unwrap();
    let find = || {
        let mut ahead = Ahead::begin(&folder.path().join("ahead")).unwrap();
        let corpus = [b"height=3".to_vec()];
        muster_fuzz::run(&planted, &corpus, 7, Bounds::Inputs(100_000), &mut ahead).unwrap_err()
    };
    let (first, second) = (find(), find());
    assert_eq!((first.after, &first.input), (second.after, &second.input));
    assert!(first.why.contains("too wide") && first.input.len() == 15, "{first:?}");
}
