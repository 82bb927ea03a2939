//! A case as a value: what the job does, where its control runs, and what must
//! come of it. Nothing here starts anything.

use muster_agent::spawner::protocol::{Start, Verdict};
use serde_json::Value;

use crate::{fleet::FleetStage, stage::Stage};

/// One try as the probe told it.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub name: String,
    /// What was seen, or the errno's name.
    pub outcome: Result<String, String>,
}

impl Attempt {
    /// A try that the suite itself made.
    pub fn of(name: impl Into<String>, outcome: Result<String, String>) -> Self {
        Self { name: name.into(), outcome }
    }

    /// What was found beside what was due: the value `exact`, or the difference.
    pub fn compare<T: PartialEq + std::fmt::Debug>(name: impl Into<String>, found: &T, due: &T) -> Self {
        let text = if found == due { "exact".to_owned() } else { format!("{found:?} instead of {due:?}") };
        Self::of(name, Ok(text))
    }

    /// The value `exact` if it holds, else what was seen instead.
    pub fn holds(name: impl Into<String>, holds: bool, seen: impl std::fmt::Debug) -> Self {
        Self::of(name, Ok(if holds { "exact".to_owned() } else { format!("{seen:?}") }))
    }

    fn text(&self) -> String {
        match &self.outcome {
            Ok(value) if value.is_empty() => format!("{} worked", self.name),
            Ok(value) => format!("{} = {}", self.name, value.chars().take(120).collect::<String>()),
            Err(errno) => format!("{}: {errno}", self.name),
        }
    }
}

/// The lines of a probe's output that are tries; others are for the invariants.
pub fn attempts(output: &[u8]) -> Vec<Attempt> {
    let text = String::from_utf8_lossy(output);
    let parsed = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    parsed
        .filter_map(|line| {
            let word = |name: &str| line.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            let outcome = if line.get("ok")?.as_bool()? { Ok(word("value")) } else { Err(word("errno")) };
            Some(Attempt { name: word("try"), outcome })
        })
        .collect()
}

/// What a rule wants of its tries.
pub enum Wants {
    /// Refused, with one of exactly these errnos.
    Refused(&'static [&'static str]),
    /// Allowed: a job needs it.
    Works,
    /// A value that this accepts; the words say which.
    Value(&'static str, fn(&str, &Stage) -> bool),
    /// Either of both: refused like this, or a value that this accepts.
    RefusedOr(&'static [&'static str], &'static str, fn(&str, &Stage) -> bool),
    /// Never reached.
    Never,
}

/// What must come of the tries with these names: `a|b*|c`.
pub struct Rule {
    pub tries: &'static str,
    pub wants: Wants,
}

/// Refused, with one of exactly these errnos.
pub const fn refused(tries: &'static str, errnos: &'static [&'static str]) -> Rule {
    Rule { tries, wants: Wants::Refused(errnos) }
}

/// Must work.
pub const fn works(tries: &'static str) -> Rule {
    Rule { tries, wants: Wants::Works }
}

/// Must have such a value.
pub const fn value(tries: &'static str, words: &'static str, accepts: fn(&str, &Stage) -> bool) -> Rule {
    Rule { tries, wants: Wants::Value(words, accepts) }
}

/// The suite compared it itself.
pub const fn exact(tries: &'static str) -> Rule {
    Rule { tries, wants: Wants::Value("as it is due", |text, _| text == "exact") }
}

impl Rule {
    pub fn is_about(&self, name: &str) -> bool {
        self.tries.split('|').any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == pattern,
        })
    }

    pub fn is_refusal(&self) -> bool {
        matches!(self.wants, Wants::Refused(_) | Wants::RefusedOr(..))
    }

    /// Why this try breaks the rule; none: it holds.
    pub fn broken_by(&self, attempt: &Attempt, stage: &Stage) -> Option<String> {
        let (holds, wanted) = match (&self.wants, &attempt.outcome) {
            (Wants::Refused(errnos), outcome) => {
                (outcome.as_ref().is_err_and(|errno| errnos.contains(&errno.as_str())), errnos.join(" or "))
            }
            (Wants::Works, outcome) => (outcome.is_ok(), "that it works".to_owned()),
            (Wants::Value(words, accepts), outcome) => {
                (outcome.as_ref().is_ok_and(|value| accepts(value, stage)), (*words).to_owned())
            }
            (Wants::RefusedOr(errnos, words, accepts), outcome) => {
                let holds = match outcome {
                    Ok(value) => accepts(value, stage),
                    Err(errno) => errnos.contains(&errno.as_str()),
                };
                (holds, format!("{} or {words}", errnos.join(" or ")))
            }
            (Wants::Never, _) => (false, "that it is never reached".to_owned()),
        };
        (!holds).then(|| format!("{}, wanted {wanted}", attempt.text()))
    }
}

/// Where the program is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Inside,
    Outside,
}

/// What runs.
pub enum Body {
    /// The probe with this command and these facts, as a job whose start was shaped by this.
    Probe { command: &'static str, facts: fn(&Stage, Place) -> Vec<String>, shape: fn(&mut Start) },
    /// The suite plays the agent itself.
    Acts(fn(&mut Stage) -> Result<Vec<Attempt>, String>),
    /// Through a coordinator and an agent.
    Fleet(fn(&mut FleetStage) -> Result<Vec<Attempt>, String>),
}

/// How the same program is run outside, where it must succeed.
pub enum Control {
    /// As it is: it changes nothing that stays. The words are the namespaces of the pen it runs in: "mount", "uts".
    Runs(&'static [&'static str]),
    /// Nowhere, and why.
    None(&'static str),
}

/// One case of the table.
pub struct Case {
    /// `P01` to `P47`.
    pub id: &'static str,
    pub title: &'static str,
    /// It exhausts or ends what it can reach, or its control does: only where all may be thrown away.
    pub destructive: bool,
    /// Fences without which it would prove nothing, or would hurt the host; or [`crate::differences::ROOT`].
    pub needs: &'static [&'static str],
    pub body: Body,
    pub control: Control,
    /// The verdicts that are right, as [`verdict_text`] spells them.
    pub ends: &'static [&'static str],
    pub rules: &'static [Rule],
}

/// For [`Body::Probe`].
pub fn no_facts(_: &Stage, _: Place) -> Vec<String> {
    Vec::new()
}

/// For [`Body::Probe`].
pub fn as_it_is(_: &mut Start) {}

/// A verdict in one word.
pub fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Exited(code) => format!("exited({code})"),
        Verdict::Signaled(signal) => format!("signaled({signal})"),
        Verdict::OutOfMemory { .. } => "oom".to_owned(),
        Verdict::TimedOut => "timeout".to_owned(),
        Verdict::Stopped => "cancelled".to_owned(),
        Verdict::LeaseEnded => "lease_ended".to_owned(),
        Verdict::Refused { fence, .. } => format!("refused({fence})"),
        Verdict::StartFailed { step, errno } => format!("start_failed({step}, {errno})"),
    }
}
