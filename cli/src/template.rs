//! A job as it was asked, from a TOML file and the command line, made into the
//! template that is sent. Unknown keys are refused with their line.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    time::Duration,
};

use muster_core::limits;
use muster_proto::v1;
use serde::Deserialize;

use crate::{
    args::JobOptions,
    escape,
    exit::{Failure, Result},
    inputs, units,
};

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident => $wire:ident { $($(#[$variant_doc:meta])* $variant:ident => $to:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// As it is named on the wire.
            pub const fn to_wire(self) -> i32 {
                match self { $(Self::$variant => v1::$wire::$to as i32),* }
            }
        }
    };
}

choice! {
    /// A job's network.
    Network => Network {
        /// Only a loopback of its own.
        None => None,
        /// The host's.
        Host => Host,
    }
}
choice! {
    /// What isolation a job asks.
    Profile => Profile {
        /// All fences.
        Strict => Strict,
        /// The host's file system and network, a uid of its own.
        Shared => Shared,
        /// A plain process.
        None => None,
    }
}
choice! {
    /// How often a task may start.
    Delivery => Delivery {
        /// Again after a lost node; the first result counts.
        #[serde(alias = "at-least-once")]
        AtLeastOnce => AtLeastOnce,
        /// Never again once a start may have happened.
        #[serde(alias = "at-most-once")]
        AtMostOnce => AtMostOnce,
        /// Again only after the old lease has provably ended.
        Exclusive => Exclusive,
    }
}
choice! {
    /// What a drain does to a running task.
    OnDrain => OnDrain {
        /// It may finish.
        Finish => Finish,
        /// It is ended and placed elsewhere.
        Requeue => Requeue,
        /// It is asked to save by its checkpoint signal, then ended and placed elsewhere.
        Checkpoint => Checkpoint,
    }
}

/// A job file. Names are those of the options of `muster job submit`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobFile {
    name: Option<String>,
    command: Option<Vec<String>>,
    array: Option<String>,
    each_line: Option<PathBuf>,
    cpu: Option<Amount>,
    memory: Option<Amount>,
    disk: Option<Amount>,
    pids: Option<u32>,
    time_limit: Option<String>,
    grace: Option<String>,
    output_limit: Option<Amount>,
    #[serde(default)]
    retries: RetriesTable,
    priority: Option<i32>,
    #[serde(default)]
    constraints: BTreeMap<String, String>,
    pool: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    stdin: Option<PathBuf>,
    #[serde(default)]
    inputs: Vec<InputEntry>,
    #[serde(default)]
    outputs: Vec<String>,
    working_folder: Option<String>,
    network: Option<Network>,
    profile: Option<Profile>,
    #[serde(default)]
    without: Vec<String>,
    #[serde(default)]
    best_effort: bool,
    delivery: Option<Delivery>,
    on_drain: Option<OnDrain>,
    checkpoint_signal: Option<String>,
    key: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RetriesTable {
    failed: Option<u32>,
    lost: Option<u32>,
    drained: Option<u32>,
}

/// `"500m"`, `2` or `0.5`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Amount {
    Text(String),
    Whole(u64),
    Part(f64),
}

impl Amount {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Whole(number) => number.to_string(),
            Self::Part(number) => number.to_string(),
        }
    }
}

/// `"path"`, or `{ path = "...", name = "..." }`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum InputEntry {
    Path(PathBuf),
    Named(NamedInput),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedInput {
    path: PathBuf,
    name: Option<String>,
}

/// A job as it was asked, before its files are read.
#[derive(Debug, Default)]
pub struct Draft {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// First and last index.
    pub array: Option<(u32, u32)>,
    /// A task for each line.
    pub each_line: Option<PathBuf>,
    /// What to send, and under which name.
    pub inputs: Vec<(PathBuf, Option<Vec<u8>>)>,
    /// Everything else.
    pub options: JobOptions,
}

impl Draft {
    /// From a job file.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::file("read the job file", path, error))?;
        Self::from_toml(&text).map_err(|why| Failure::usage(format!("the job file {}: {why}", escape::path(path))))
    }

    /// From a job file's text.
    ///
    /// # Errors
    /// What is wrong with it, in one sentence with its line.
    pub fn from_toml(text: &str) -> std::result::Result<Self, String> {
        let file: JobFile = toml::from_str(text).map_err(|error| toml_sentence(text, &error))?;
        // Its values come with the sentence, and may hold what a terminal obeys.
        Self::of(file).map_err(|why| escape::text(&why))
    }

    fn of(file: JobFile) -> std::result::Result<Self, String> {
        let duration = |text: &Option<String>| text.as_deref().map(units::duration).transpose();
        let size = |amount: &Option<Amount>| amount.as_ref().map(|amount| units::size(&amount.text())).transpose();
        let inputs = file.inputs.into_iter().map(|entry| match entry {
            InputEntry::Path(path) => (path, None),
            InputEntry::Named(NamedInput { path, name }) => (path, name.map(String::into_bytes)),
        });
        Ok(Self {
            command: file.command.unwrap_or_default().into_iter().map(OsString::from).collect(),
            array: file.array.as_deref().map(units::array).transpose()?,
            each_line: file.each_line,
            inputs: inputs.collect(),
            options: JobOptions {
                name: file.name,
                cpu: file.cpu.as_ref().map(|amount| units::cpu(&amount.text())).transpose()?,
                memory: size(&file.memory)?,
                disk: size(&file.disk)?,
                pids: file.pids,
                time_limit: duration(&file.time_limit)?,
                grace: duration(&file.grace)?,
                output_limit: size(&file.output_limit)?,
                retries: file.retries.failed,
                retries_lost: file.retries.lost,
                retries_drained: file.retries.drained,
                priority: file.priority,
                constraint: file.constraints.into_iter().collect(),
                pool: file.pool,
                env: file.env.into_iter().map(|(name, value)| OsString::from(format!("{name}={value}"))).collect(),
                stdin: file.stdin,
                input: Vec::new(),
                outputs: file.outputs.into_iter().map(OsString::from).collect(),
                working_folder: file.working_folder.map(OsString::from),
                network: file.network,
                profile: file.profile,
                without: file.without,
                best_effort: file.best_effort,
                delivery: file.delivery,
                on_drain: file.on_drain,
                checkpoint_signal: file.checkpoint_signal.as_deref().map(units::signal).transpose()?,
                key: file.key,
            },
        })
    }

    /// Puts the command line over the file: single values replace, lists are added to.
    pub fn apply(&mut self, command: Vec<OsString>, options: JobOptions) {
        if !command.is_empty() {
            self.command = command;
        }
        self.inputs.extend(options.input.iter().map(inputs::split_name));
        let old = std::mem::take(&mut self.options);
        let joined = |mut first: Vec<OsString>, second: Vec<OsString>| {
            first.extend(second);
            first
        };
        self.options = JobOptions {
            name: options.name.or(old.name),
            cpu: options.cpu.or(old.cpu),
            memory: options.memory.or(old.memory),
            disk: options.disk.or(old.disk),
            pids: options.pids.or(old.pids),
            time_limit: options.time_limit.or(old.time_limit),
            grace: options.grace.or(old.grace),
            output_limit: options.output_limit.or(old.output_limit),
            retries: options.retries.or(old.retries),
            retries_lost: options.retries_lost.or(old.retries_lost),
            retries_drained: options.retries_drained.or(old.retries_drained),
            priority: options.priority.or(old.priority),
            constraint: old.constraint.into_iter().chain(options.constraint).collect(),
            pool: options.pool.or(old.pool),
            env: joined(old.env, options.env),
            stdin: options.stdin.or(old.stdin),
            input: Vec::new(),
            outputs: joined(old.outputs, options.outputs),
            working_folder: options.working_folder.or(old.working_folder),
            network: options.network.or(old.network),
            profile: options.profile.or(old.profile),
            without: old.without.into_iter().chain(options.without).collect(),
            best_effort: old.best_effort || options.best_effort,
            delivery: options.delivery.or(old.delivery),
            on_drain: options.on_drain.or(old.on_drain),
            checkpoint_signal: options.checkpoint_signal.or(old.checkpoint_signal),
            key: options.key.or(old.key),
        };
    }

    /// The profile that it asks.
    pub fn profile(&self) -> Profile {
        self.options.profile.unwrap_or(Profile::Strict)
    }

    /// The template but for its files.
    pub fn template(&self) -> Result<v1::JobTemplate> {
        self.check_command()?;
        let options = &self.options;
        let (first, last) = self.array.unwrap_or((0, 0));
        let tasks = last - first + 1;
        let body = v1::JobBody {
            job: 0,
            owner: String::new(),
            arguments: self.command.iter().map(|argument| argument.as_bytes().to_vec().into()).collect(),
            environment: environment(&options.env)?,
            working_folder: options.working_folder.as_ref().map(|p| p.as_bytes().to_vec()).unwrap_or_default().into(),
            stdin: None,
            inputs: Vec::new(),
            outputs: self.output_paths()?,
            request: Some(v1::Resources {
                cpu_milli: options.cpu.unwrap_or(limits::CPU_REQUEST_MILLI),
                memory_bytes: options.memory.unwrap_or(limits::MEMORY_REQUEST_BYTES),
                disk_bytes: options.disk.unwrap_or(limits::DISK_REQUEST_BYTES),
            }),
            network: options.network.unwrap_or(Network::None).to_wire(),
            profile: self.profile().to_wire(),
            without: options.without.clone(),
            delivery: options.delivery.unwrap_or(Delivery::AtLeastOnce).to_wire(),
            on_drain: options.on_drain.unwrap_or(OnDrain::Finish).to_wire(),
            time_limit_ms: time_limit_ms(options.time_limit)?,
            grace_ms: options.grace.map_or(limits::GRACE.0, as_ms),
            output_limit_bytes: options.output_limit.unwrap_or(limits::OUTPUT_LIMIT),
            pids_limit: options.pids.unwrap_or(limits::PIDS_LIMIT),
            tasks,
            // The coordinator's to set, from the template.
            first_index: 0,
            checkpoint_signal: options.checkpoint_signal.unwrap_or(0).into(),
        };
        Ok(v1::JobTemplate {
            name: options.name.clone().unwrap_or_else(|| self.default_name()),
            body: Some(body),
            tasks,
            first_index: first,
            task_table: None,
            priority: options.priority.unwrap_or(0),
            retries: Some(v1::RetryPolicy {
                failed: options.retries,
                lost: options.retries_lost,
                drained: options.retries_drained,
            }),
            constraints: options.constraint.iter().cloned().collect(),
            pool: options.pool.clone().unwrap_or_default(),
        })
    }

    fn check_command(&self) -> Result<()> {
        match self.command.first() {
            None => {
                Err(Failure::usage("there is no command to run; write it after `--`, or as `command` in the job file"))
            }
            Some(program) if program.is_empty() => Err(Failure::usage("the command is empty")),
            Some(_) if self.command.iter().any(|argument| argument.as_bytes().contains(&0)) => {
                Err(Failure::usage("an argument of the command holds a NUL byte"))
            }
            Some(_) => Ok(()),
        }
    }

    fn default_name(&self) -> String {
        let program = self.command.first().map(PathBuf::from).unwrap_or_default();
        let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.chars().filter(|letter| !letter.is_control()).take(limits::NAME_LEN_MAX / 4).collect()
    }

    fn output_paths(&self) -> Result<Vec<bytes::Bytes>> {
        self.options
            .outputs
            .iter()
            .map(|path| {
                inputs::check_name(path.as_bytes())?;
                Ok(path.as_bytes().to_vec().into())
            })
            .collect()
    }
}

fn time_limit_ms(limit: Option<Duration>) -> Result<u64> {
    match limit.map(as_ms) {
        Some(0) => Err(Failure::usage("a time limit of 0 would end the job at once; leave it out for none")),
        Some(ms) => Ok(ms),
        None => Ok(0),
    }
}

fn as_ms(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// `KEY=VALUE`, or `KEY` for the value that it has here. A later one replaces an earlier one.
fn environment(entries: &[OsString]) -> Result<Vec<v1::EnvironmentVariable>> {
    let mut variables: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    for entry in entries {
        let bytes = entry.as_bytes();
        let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
            Some(at) => (bytes[..at].to_vec(), bytes[at + 1..].to_vec()),
            None => {
                let value = std::env::var_os(entry).ok_or_else(|| {
                    Failure::usage(format!("the variable {} is not set here; write KEY=VALUE", escape::bytes(bytes)))
                })?;
                (bytes.to_vec(), value.into_vec())
            }
        };
        if name.is_empty() || name.contains(&0) || value.contains(&0) {
            return Err(Failure::usage(format!("`{}` is no environment variable", escape::bytes(bytes))));
        }
        variables.insert(name, value);
    }
    Ok(variables
        .into_iter()
        .map(|(name, value)| v1::EnvironmentVariable { name: name.into(), value: value.into() })
        .collect())
}

/// One line of `--each-line` is one task; the last need not end.
pub fn lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    if lines.last().is_some_and(|last| last.is_empty()) {
        lines.pop();
    }
    lines
}

/// An error of a TOML file as one sentence with its line.
pub fn toml_sentence(text: &str, error: &toml::de::Error) -> String {
    let why = error.message().trim().replace('\n', "; ");
    match error.span() {
        Some(span) if !text.is_empty() => {
            let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
            format!("line {line}: {}", escape::text(&why))
        }
        _ => escape::text(&why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_file_is_read_and_the_command_line_goes_before_it() {
        let mut draft = Draft::from_toml(
            r#"
            name = "sums"
            command = ["sh", "-c", "true"]
            array = "1-3"
            cpu = "500m"
            memory = "64M"
            time_limit = "10m"
            inputs = ["a", { path = "b", name = "c" }]
            outputs = ["out.gz"]
            without = ["limits"]
            delivery = "exclusive"
            [retries]
            failed = 2
            [env]
            A = "1"
            [constraints]
            zone = "north"
            "#,
        )
        .unwrap();
        let options = JobOptions { cpu: Some(250), env: vec!["A=2".into()], ..JobOptions::default() };
        draft.apply(Vec::new(), options);
        let template = draft.template().unwrap();
        let body = template.body.unwrap();
        assert_eq!((template.tasks, template.first_index, body.tasks), (3, 1, 3));
        assert_eq!(
            body.request.unwrap(),
            v1::Resources { cpu_milli: 250, memory_bytes: 64 << 20, disk_bytes: 256 << 20 }
        );
        assert_eq!(body.environment[0].value, "2");
        assert_eq!(body.time_limit_ms, 600_000);
        assert_eq!(template.retries.unwrap().failed, Some(2));
        assert_eq!(draft.inputs, [(PathBuf::from("a"), None), (PathBuf::from("b"), Some(b"c".to_vec()))]);
    }

    #[test]
    fn a_wrong_job_file_is_told_in_one_sentence_with_its_line() {
        for (text, part) in [
            ("cpus = 1", "line 1: unknown field `cpus`"),
            ("name = \"x\"\nmemory = \"lots\"", "`lots` is no size"),
            ("name = ", "line 1"),
            ("[retries]\nfailed = -1", "line 2"),
            ("inputs = [{ path = \"a\", nam = \"b\" }]", "line 1"),
        ] {
            let why = Draft::from_toml(text).unwrap_err();
            assert!(why.contains(part) && !why.contains('\n'), "{why}");
        }
    }

    #[test]
    fn an_empty_command_and_odd_arguments_are_refused() {
        assert!(Draft::default().template().is_err());
        for command in [vec![""], vec!["a", "b\0c"]] {
            let command = command.into_iter().map(OsString::from).collect();
            assert!(Draft { command, ..Draft::default() }.template().is_err());
        }
    }

    #[test]
    fn lines_are_tasks_whether_or_not_the_last_one_ends() {
        assert_eq!(lines(b"a\nb\n"), [b"a", b"b"]);
        assert_eq!(lines(b"a\n\nb"), [&b"a"[..], b"", b"b"]);
        assert!(lines(b"").is_empty());
    }
}
