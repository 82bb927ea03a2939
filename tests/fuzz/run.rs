//! The loop: choose, change, try, keep what is new; and one that fails, made small.

use std::{
    any::Any,
    collections::BTreeSet,
    panic::{self, AssertUnwindSafe},
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use crate::{
    ahead::Ahead,
    dice::Dice,
    mutation::mutate,
    protobuf,
    target::{Signs, Target},
};

/// Inputs with new signs that are kept beside the corpus, at most.
const KEPT_MAX: usize = 4_096;
/// Tries to make a failing input smaller, at most.
const SHRINKS_MAX: usize = 2_000;

/// When a run is over; the corpus itself is always played first.
#[derive(Clone, Copy, Debug)]
pub enum Bounds {
    /// So many changed inputs.
    Inputs(u64),
    /// So long.
    Time(Duration),
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Inputs tried, those of the corpus included.
    pub inputs: u64,
    /// Those that the target took, or a part of them.
    pub accepted: u64,
    /// Different signs.
    pub signs: usize,
    /// Inputs with new signs, beside the corpus.
    pub kept: usize,
    /// The longest that one took.
    pub slowest: Duration,
}

/// An input that breaks a promise.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The input.
    pub input: Vec<u8>,
    /// The panic's message, or the promise.
    pub why: String,
    /// It was the so many-th.
    pub after: u64,
}

/// Changes the corpus until the bounds are reached.
///
/// # Errors
/// The first input that fails.
pub fn run(
    target: &Target,
    corpus: &[Vec<u8>],
    seed: u64,
    bounds: Bounds,
    ahead: &mut Ahead,
) -> Result<Figures, Failure> {
    let quiet = Quiet::begin();
    let mut run =
        Run { target, pool: Vec::new(), taken: Vec::new(), known: BTreeSet::new(), figures: Figures::default(), ahead };
    for input in corpus {
        run.attempt(input.clone(), &quiet, true)?;
    }
    if run.pool.is_empty() {
        run.pool.push(Vec::new());
    }
    let members = run.pool.len();
    let mut dice = Dice::new(seed);
    let (begun, mut tried) = (Instant::now(), 0);
    while match bounds {
        Bounds::Inputs(inputs) => tried < inputs,
        // The clock costs more than some targets do.
        Bounds::Time(time) => tried % 64 != 0 || begun.elapsed() < time,
    } {
        tried += 1;
        // What was taken leads on more often than what was refused.
        let refused_too = run.taken.is_empty() || dice.once_in(4);
        let one = if refused_too { dice.below(run.pool.len()) } else { dice.of(&run.taken) };
        let other = dice.below(run.pool.len());
        let input = mutate(target, &run.pool[one], &run.pool[other], &mut dice);
        run.attempt(input, &quiet, false)?;
    }
    Ok(Figures { signs: run.known.len(), kept: run.pool.len() - members, ..run.figures })
}

/// Takes one input.
///
/// # Errors
/// Why it fails.
pub fn play(target: &Target, input: &[u8]) -> Result<Signs, String> {
    attempt(target, input, &Quiet::begin())
}

struct Run<'a> {
    target: &'a Target,
    pool: Vec<Vec<u8>>,
    /// Which of the pool the target took.
    taken: Vec<usize>,
    known: BTreeSet<u64>,
    figures: Figures,
    ahead: &'a mut Ahead,
}

impl Run<'_> {
    /// Those of the corpus stay, new or not.
    fn attempt(&mut self, input: Vec<u8>, quiet: &Quiet, stays: bool) -> Result<(), Failure> {
        self.ahead.note(&input);
        self.figures.inputs += 1;
        let begun = Instant::now();
        let signs = match attempt(self.target, &input, quiet) {
            Ok(signs) => signs,
            Err(why) => {
                let input = self.shrink(input, &why, quiet);
                return Err(Failure { input, why, after: self.figures.inputs });
            }
        };
        self.figures.slowest = self.figures.slowest.max(begun.elapsed());
        self.figures.accepted += u64::from(signs.accepted);
        let (known, is_taken) = (self.known.len(), signs.accepted);
        self.known.extend(signs.into_seen());
        if stays || self.known.len() > known && self.pool.len() < KEPT_MAX {
            if is_taken {
                self.taken.push(self.pool.len());
            }
            self.pool.push(input);
        }
        Ok(())
    }

    /// Leaves out what the same failure does not need.
    fn shrink(&mut self, input: Vec<u8>, why: &str, quiet: &Quiet) -> Vec<u8> {
        let mut fails = |less: &[u8]| {
            self.ahead.note(less);
            attempt(self.target, less, quiet).is_err_and(|other| other == why)
        };
        let mut input = input;
        // Whole messages first, where there are some.
        let mut fields = protobuf::read(&input).unwrap_or_default();
        for at in (0..fields.len()).rev() {
            let left_out = fields.remove(at);
            let less = protobuf::write(&fields);
            if fails(&less) {
                input = less;
            } else {
                fields.insert(at, left_out);
            }
        }
        let (mut tries, mut length) = (0, input.len().div_ceil(2));
        while length > 0 {
            let mut at = 0;
            while at < input.len() && tries < SHRINKS_MAX {
                tries += 1;
                let mut less = input.clone();
                less.drain(at..(at + length).min(input.len()));
                if fails(&less) {
                    input = less;
                } else {
                    at += length;
                }
            }
            length /= 2;
        }
        input
    }
}

fn attempt(target: &Target, input: &[u8], quiet: &Quiet) -> Result<Signs, String> {
    let mut signs = Signs::default();
    let take = AssertUnwindSafe(|| (target.take)(input, &mut signs));
    match panic::catch_unwind(take) {
        Ok(Ok(())) => Ok(signs),
        Ok(Err(why)) => Err(why),
        Err(payload) => Err(quiet.last().unwrap_or_else(|| message(&*payload))),
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

type Hook = Box<dyn Fn(&panic::PanicHookInfo<'_>) + Send + Sync>;

/// The last panic with its place, instead of a page on stderr for each try of making an input smaller.
struct Quiet {
    before: Option<Hook>,
    _alone: MutexGuard<'static, ()>,
}

/// The hook is the whole process's: one run at a time.
static ALONE: Mutex<()> = Mutex::new(());
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

impl Quiet {
    fn begin() -> Self {
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = Some(panic::take_hook());
        panic::set_hook(Box::new(|info| {
            *LAST_PANIC.lock().expect("nothing panics while it is held") = Some(info.to_string());
        }));
        Self { before, _alone: alone }
    }

    #[expect(clippy::unused_self, reason = "there is a last one while this is the hook")]
    fn last(&self) -> Option<String> {
        LAST_PANIC.lock().expect("nothing panics while it is held").take()
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = self.before.take().filter(|_| !std::thread::panicking()) {
            panic::set_hook(before);
        }
    }
}
