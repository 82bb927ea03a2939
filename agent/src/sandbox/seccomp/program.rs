//! Turns the list into a program: which instructions, and in which order.
//!
//! Installing is what costs. The kernel checks and translates the program,
//! which takes time for each instruction; then it plays the program for every
//! number of both of its interfaces, to remember which are allowed whatever
//! their arguments, which takes time for each step of each path. A call that it
//! remembers never runs the filter again. It plays only loads of the number
//! and the architecture, comparisons, `and` and `return`
//! (`seccomp_is_const_allow`), so a table of bits, which takes a shift, would
//! make every later call run the filter. What is left is a search tree over
//! the runs of numbers with one outcome, and [`Search`] finds the cheapest.
//!
//! Jumps only go forward, so the program is written from its end: a target
//! always exists before what jumps to it.

use std::mem::offset_of;

use libc::{seccomp_data, sock_filter};

use super::table::{self, Check, Rule};

/// The kernel's name of the only interface that a job may use (linux/audit.h).
#[cfg(target_arch = "x86_64")]
pub const NATIVE: u32 = 0xc000_003e;
/// The kernel's name of the only interface that a job may use (linux/audit.h).
#[cfg(target_arch = "aarch64")]
pub const NATIVE: u32 = 0xc000_00b7;

/// Numbers from here on are those of another interface, x32 on x86-64; no
/// architecture has own ones there.
pub const FOREIGN_FROM: u32 = 0x4000_0000;

/// -1: what a tracer leaves behind of a call that it swallowed, and what programs use for "no call".
pub const NO_CALL: u32 = u32::MAX;

/// What the search weighs against each other, in some 2.5 ns: translating one more instruction at every
/// install, and playing one more for one number.
const INSTRUCTION_COST: usize = 60;
const STEP_COST: usize = 1;

/// The kernel plays the numbers that it has, some 470; later ones weigh nothing.
const NUMBERS_PLAYED: u32 = 471;

/// Flags of clone(2) that make a namespace (linux/sched.h).
const NAMESPACE_FLAGS: u32 = 0x7e02_0000 | libc::CLONE_NEWTIME as u32;

const FAMILIES: [i32; 3] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];

/// TIOCSTI and TIOCLINUX type into a terminal; TIOCSETD loads one of the kernel's line drivers.
const COMMANDS: [u32; 3] = [libc::TIOCSTI as u32, libc::TIOCLINUX as u32, libc::TIOCSETD as u32];

/// The usual one, "which is it?", and fixed addresses, which weaken only the asker.
const PERSONALITIES: [u32; 3] = [0, u32::MAX, libc::ADDR_NO_RANDOMIZE as u32];

/// Where an instruction stands, counted from the end.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place(usize);

/// Writes backwards.
#[derive(Default)]
struct Writer {
    reversed: Vec<sock_filter>,
}

impl Writer {
    fn push(&mut self, code: u32, k: u32, jt: u8, jf: u8) -> Place {
        self.reversed.push(sock_filter { code: code as u16, jt, jf, k });
        Place(self.reversed.len() - 1)
    }

    fn answer(&mut self, action: u32) -> Place {
        self.push(libc::BPF_RET | libc::BPF_K, action, 0, 0)
    }

    /// Goes on with what was written last.
    fn load(&mut self, offset: usize) -> Place {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset as u32, 0, 0)
    }

    fn mask(&mut self, bits: u32) -> Place {
        self.push(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, bits, 0, 0)
    }

    fn branch(&mut self, test: u32, k: u32, yes: Place, no: Place) -> Place {
        let distance = |to: Place| {
            u8::try_from(self.reversed.len() - 1 - to.0).expect("the whole program is shorter than the longest jump")
        };
        let (jt, jf) = (distance(yes), distance(no));
        self.push(libc::BPF_JMP | test | libc::BPF_K, k, jt, jf)
    }

    /// Is the loaded word one of these?
    fn one_of(&mut self, words: impl IntoIterator<Item = u32>, yes: Place, no: Place) -> Place {
        words.into_iter().fold(no, |next, word| self.branch(libc::BPF_JEQ, word, yes, next))
    }

    /// Loads the half of an argument that the kernel reads where it takes 32 bits.
    fn load_argument(&mut self, index: u32) -> Place {
        let low_half = if cfg!(target_endian = "big") { size_of::<u32>() } else { 0 };
        self.load(offset_of!(seccomp_data, args) + index as usize * size_of::<u64>() + low_half)
    }

    fn finish(mut self) -> Box<[sock_filter]> {
        self.reversed.reverse();
        self.reversed.into()
    }
}

/// Where each outcome is answered.
struct Answers {
    allow: Place,
    refuse: Place,
    absent: Place,
    no_family: Place,
    kill: Place,
}

impl Answers {
    fn write(writer: &mut Writer) -> Self {
        let errno = |errno: i32| libc::SECCOMP_RET_ERRNO | errno as u32;
        Self {
            allow: writer.answer(libc::SECCOMP_RET_ALLOW),
            refuse: writer.answer(errno(libc::EPERM)),
            absent: writer.answer(errno(libc::ENOSYS)),
            no_family: writer.answer(errno(libc::EAFNOSUPPORT)),
            kill: writer.answer(libc::SECCOMP_RET_KILL_PROCESS),
        }
    }

    /// The first instruction of what looks at an argument.
    fn check(&self, writer: &mut Writer, check: Check) -> Place {
        match check {
            Check::CloneFlags => {
                writer.branch(libc::BPF_JSET, NAMESPACE_FLAGS, self.refuse, self.allow);
                writer.load_argument(0)
            }
            Check::Family => {
                writer.one_of(FAMILIES.map(|family| family as u32), self.allow, self.no_family);
                writer.load_argument(0)
            }
            Check::Command => {
                writer.one_of(COMMANDS, self.refuse, self.allow);
                writer.load_argument(1)
            }
            Check::Mode(index) => {
                writer.one_of([libc::S_IFCHR, libc::S_IFBLK], self.refuse, self.allow);
                writer.mask(libc::S_IFMT);
                writer.load_argument(index)
            }
            Check::Personality => {
                writer.one_of(PERSONALITIES, self.allow, self.refuse);
                writer.load_argument(0)
            }
        }
    }
}

/// Numbers with one outcome: from this one to the next run's first.
struct Run {
    first: u32,
    to: Place,
}

/// The program for the list.
pub fn write() -> Box<[sock_filter]> {
    let mut writer = Writer::default();
    let answers = Answers::write(&mut writer);
    let runs = runs(&mut writer, &answers);
    Search::plan(&runs).write(&mut writer, 0, runs.len() - 1);
    writer.load(offset_of!(seccomp_data, nr));
    let native = Place(writer.reversed.len() - 1);
    writer.branch(libc::BPF_JEQ, NATIVE, native, answers.kill);
    writer.load(offset_of!(seccomp_data, arch));
    writer.finish()
}

fn runs(writer: &mut Writer, answers: &Answers) -> Vec<Run> {
    let mut calls: Vec<(u32, Rule)> =
        table::groups().flat_map(|group| group.calls.iter().map(|(_, number)| (*number as u32, group.rule))).collect();
    calls.sort_by_key(|(number, _)| *number);
    let mut runs: Vec<Run> = Vec::new();
    let mut add = |first: u32, to: Place| {
        if runs.last().is_none_or(|last| last.to != to) {
            runs.push(Run { first, to });
        }
    };
    let mut checks: Vec<(Check, Place)> = Vec::new();
    let mut next = 0;
    for (number, rule) in calls {
        if number > next {
            add(next, answers.absent);
        }
        let to = match rule {
            Rule::Allow => answers.allow,
            Rule::Refuse => answers.refuse,
            Rule::Absent => answers.absent,
            Rule::Check(check) => match checks.iter().find(|(done, _)| *done == check) {
                Some((_, place)) => *place,
                None => {
                    let place = answers.check(writer, check);
                    checks.push((check, place));
                    place
                }
            },
        };
        add(number, to);
        next = number + 1;
    }
    add(next, answers.absent);
    add(FOREIGN_FROM, answers.kill);
    add(NO_CALL, answers.absent);
    runs
}

/// How to find the run of the loaded number among neighbouring runs.
#[derive(Clone, Copy)]
enum Step {
    /// There is only one.
    Found,
    /// Is it in this run or a later one?
    Split(usize),
    /// Is it this number, or this, or this? All others have one outcome.
    Singles,
}

/// The cheapest way through each stretch of runs, by its first and last: what it costs, and its first step.
struct Search<'a> {
    runs: &'a [Run],
    best: Vec<Vec<(usize, Step)>>,
}

impl<'a> Search<'a> {
    fn plan(runs: &'a [Run]) -> Self {
        let mut search = Self { runs, best: vec![vec![(0, Step::Found); runs.len()]; runs.len()] };
        for further in 1..runs.len() {
            for low in 0..runs.len() - further {
                search.best[low][low + further] = search.cheapest(low, low + further);
            }
        }
        search
    }

    fn cheapest(&self, low: usize, high: usize) -> (usize, Step) {
        let one = INSTRUCTION_COST + self.played(low, high) * STEP_COST;
        let split = |at: usize| (one + self.best[low][at - 1].0 + self.best[at][high].0, Step::Split(at));
        let splits = (low + 1..=high).map(split);
        let (_, others) = self.others(low, high);
        let singles = others.iter().all(|at| self.is_single(*at)).then_some((one * others.len(), Step::Singles));
        splits.chain(singles).min_by_key(|(cost, _)| *cost).expect("a stretch of two runs can be split")
    }

    /// Numbers of the stretch that the kernel plays.
    fn played(&self, low: usize, high: usize) -> usize {
        let first = |at: usize| self.runs.get(at).map_or(u32::MAX, |run| run.first).min(NUMBERS_PLAYED);
        (first(high + 1) - first(low)) as usize
    }

    fn is_single(&self, at: usize) -> bool {
        self.runs.get(at + 1).map_or(u32::MAX, |next| next.first - 1) == self.runs[at].first
    }

    /// The outcome of the stretch's first run of several numbers, and the runs with another.
    fn others(&self, low: usize, high: usize) -> (Place, Vec<usize>) {
        let usual = self.runs[(low..=high).find(|at| !self.is_single(*at)).unwrap_or(low)].to;
        (usual, (low..=high).filter(|at| self.runs[*at].to != usual).collect())
    }

    fn write(&self, writer: &mut Writer, low: usize, high: usize) -> Place {
        match self.best[low][high].1 {
            Step::Found => self.runs[low].to,
            Step::Split(at) => {
                let yes = self.write(writer, at, high);
                let no = self.write(writer, low, at - 1);
                writer.branch(libc::BPF_JGE, self.runs[at].first, yes, no)
            }
            Step::Singles => {
                let (usual, others) = self.others(low, high);
                others
                    .into_iter()
                    .fold(usual, |next, at| writer.branch(libc::BPF_JEQ, self.runs[at].first, self.runs[at].to, next))
            }
        }
    }
}
