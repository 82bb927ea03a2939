//! What is fuzzed.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

/// How the bytes of a target's input are made, so that changes of them often read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Of protobuf's fields.
    Protobuf,
    /// Of postcard's or plain numbers.
    Binary,
    /// Of letters.
    Text,
}

/// One decoder or parser with all that is behind it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// On the command line, and of its folder.
    pub name: &'static str,
    /// How its input is made.
    pub shape: Shape,
    /// Words of its language.
    pub words: &'static [&'static str],
    /// Inputs that the short run of CI tries.
    pub inputs_in_ci: u64,
    /// Takes one input and notes what it came to; an error is a broken promise. A panic is one, too.
    pub take: fn(&[u8], &mut Signs) -> Result<(), String>,
    /// Real encodings to begin with, by name.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// What an input came to. One that shows a new sign is worth changing further: that is what guides the
/// search where the compiler gives no coverage.
#[derive(Clone, Debug, Default)]
pub struct Signs {
    seen: BTreeSet<u64>,
    /// The target took it, or a part of it.
    pub accepted: bool,
}

impl Signs {
    /// A sentence or a name. Numbers and quoted words in it do not count: else each input would be new.
    pub fn note(&mut self, place: &str, text: &str) {
        let mut hasher = DefaultHasher::new();
        place.hash(&mut hasher);
        let is_quote = |letter: char| matches!(letter, '`' | '"');
        // What is quoted may hold quotes itself.
        let (begin, end) = match (text.find(is_quote), text.rfind(is_quote)) {
            (Some(first), Some(last)) => (&text[..first], &text[last..]),
            (_, _) => (text, ""),
        };
        for letter in begin.chars().chain(end.chars()).filter(|letter| !letter.is_ascii_digit()) {
            letter.hash(&mut hasher);
        }
        self.seen.insert(hasher.finish());
    }

    /// A result: its kind of value, or the sentence of its error.
    pub fn result<T, E: ToString>(&mut self, place: &str, result: &Result<T, E>) {
        match result {
            Ok(_) => {
                self.accepted = true;
                self.note(place, "ok");
            }
            Err(error) => self.note(place, &error.to_string()),
        }
    }

    /// The beginning of a value's debug form: its variant.
    pub fn variant(&mut self, place: &str, value: &impl Debug) {
        let text = format!("{value:?}");
        self.note(place, text.split(['{', '(', ' ']).next().unwrap_or_default());
    }

    /// A count, by its order of magnitude.
    pub fn count(&mut self, place: &str, count: usize) {
        self.note(place, &"x".repeat((usize::BITS - count.leading_zeros()) as usize));
    }

    pub(crate) fn into_seen(self) -> BTreeSet<u64> {
        self.seen
    }
}
