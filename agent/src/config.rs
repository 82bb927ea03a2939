//! Typed settings: flags over a TOML file over defaults. Unknown keys are refused.

use std::{collections::BTreeMap, ffi::OsString, fs, io, os::fd::RawFd, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use muster_core::{limits, resources::Resources};
use serde::Deserialize;

use crate::{
    identity::{Certificate, token_coordinators},
    interruption,
};

/// The agent's command line.
#[derive(Debug, Parser)]
#[command(name = "muster-agent", version, about = "Runs jobs on this host for a Muster coordinator")]
pub struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join if needed, then take work until told to leave.
    Run(Box<RunArgs>),
    /// Only join: make the key and fetch the certificate.
    Join(Box<RunArgs>),
}

/// Flags of `run` and `join`.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// The agent's folder: key, certificate, output that is not yet stored.
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// The coordinators' addresses, HOST:PORT, the preferred one first; default: what the token or the certificate names.
    #[arg(long, value_delimiter = ',')]
    pub coordinator: Vec<String>,
    /// The spawner's socket.
    #[arg(long)]
    pub spawner: Option<PathBuf>,
    /// A join token, used if the folder has no certificate.
    #[arg(long, env = "MUSTER_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    pub token: Option<String>,
    /// A file with the join token.
    #[arg(long)]
    pub token_file: Option<PathBuf>,
    /// The node's name; default: the host's.
    #[arg(long)]
    pub name: Option<String>,
    /// CPU for jobs: `1500m` or `2`; default: all cores.
    #[arg(long)]
    pub cpu: Option<String>,
    /// Memory for jobs: `4G` (binary units); default: all.
    #[arg(long)]
    pub memory: Option<String>,
    /// Disk for working folders: `10G`; default: what is free at the start.
    #[arg(long)]
    pub disk: Option<String>,
    /// Labels, KEY=VALUE.
    #[arg(long = "label")]
    pub labels: Vec<String>,
    /// This node is a slice of the machine: report only the sum of its attempts, against its declared capacity.
    #[arg(long)]
    pub slice: bool,
    /// A program that knows when this host goes: a spot notice, a shutdown. It prints {"within_seconds": N}.
    #[arg(long)]
    pub notice_program: Option<PathBuf>,
    /// It is run again so long after it has ended. Default 5.
    #[arg(long, value_name = "N")]
    pub notice_every_seconds: Option<u64>,
    /// It is killed after so long; 0: it watches, and ends when it likes. Default 10.
    #[arg(long, value_name = "N")]
    pub notice_time_seconds: Option<u64>,
    /// Of the host's last time this is for the jobs' grace and for telling how they ended. Default 15.
    #[arg(long, value_name = "N")]
    pub notice_reserve_seconds: Option<u64>,
    /// Settings in TOML; flags win.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Take up work again although this host was released.
    #[arg(long)]
    pub rejoin: bool,
    /// Leave when this pipe's other end closes.
    #[arg(long)]
    pub parent_fd: Option<RawFd>,
    /// With --parent-fd: remove the folder when the parent ends.
    #[arg(long, requires = "parent_fd")]
    pub ephemeral: bool,
}

/// The settings file. Each key is the flag of the same name.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    state: Option<PathBuf>,
    #[serde(default)]
    coordinator: Vec<String>,
    spawner: Option<PathBuf>,
    token_file: Option<PathBuf>,
    name: Option<String>,
    cpu: Option<String>,
    memory: Option<String>,
    disk: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    slice: bool,
    notice_program: Option<PathBuf>,
    notice_every_seconds: Option<u64>,
    notice_time_seconds: Option<u64>,
    notice_reserve_seconds: Option<u64>,
    /// Bytes kept of fetched blobs.
    cache_size: Option<String>,
}

/// All settings, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The agent's folder.
    pub state: PathBuf,
    /// HOST:PORT, the preferred one first; not empty.
    pub coordinators: Vec<String>,
    /// The spawner's socket.
    pub spawner: PathBuf,
    /// The join token, if one was given.
    pub token: Option<String>,
    /// The node's name.
    pub name: String,
    /// What jobs may take together.
    pub capacity: Resources,
    /// Shown to placement.
    pub labels: BTreeMap<String, String>,
    /// Report only the sum of this node's attempts.
    pub slice: bool,
    /// Who knows when this host goes.
    pub notice: Option<interruption::Settings>,
    /// Bytes kept of fetched blobs.
    pub cache_bytes_max: u64,
    /// The file that a reload reads again.
    pub file: Option<PathBuf>,
    /// Labels of the command line: they win over the file's on a reload too.
    flag_labels: BTreeMap<String, String>,
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The settings file does not parse.
    #[error("the settings in {path} are wrong")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A setting is needed and absent.
    #[error("`--{0}` is missing")]
    Missing(&'static str),
    /// An amount is no amount.
    #[error("`{text}` is no amount for `--{flag}`; examples: {examples}")]
    BadAmount {
        /// The flag.
        flag: &'static str,
        /// What was given.
        text: String,
        /// What would do.
        examples: &'static str,
    },
    /// A label is not KEY=VALUE.
    #[error("`{0}` is no label; write KEY=VALUE")]
    BadLabel(String),
    /// More labels than the fleet takes.
    #[error("{0} labels are more than the {max} that a node may carry", max = limits::LABELS_MAX)]
    TooManyLabels(usize),
}

impl Config {
    /// Checks all settings.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn resolve(args: &RunArgs) -> Result<Self, ConfigError> {
        let file = args.config.as_ref().map(read_file).transpose()?.unwrap_or_default();
        let flag_labels = parse_labels(&args.labels)?;
        let notice = notice_of(args, &file);
        let state = args.state.clone().or(file.state).ok_or(ConfigError::Missing("state"))?;
        // The shipped unit always has the flag: empty, for a host that its token tells.
        let flagged: Vec<String> = args.coordinator.iter().filter(|address| !address.is_empty()).cloned().collect();
        let coordinators = if flagged.is_empty() { file.coordinator } else { flagged };
        let token = match (&args.token, args.token_file.as_ref().or(file.token_file.as_ref())) {
            (Some(token), _) => Some(token.trim().to_owned()),
            (None, Some(path)) => read_token(path)?,
            (None, None) => None,
        };
        // Named here, or in the token, or told when the certificate was fetched.
        let named = || token.as_deref().map(token_coordinators).filter(|named| !named.is_empty());
        let told = || Certificate::read(&state).ok().flatten().map(|certificate| certificate.coordinators);
        let coordinators = match coordinators.is_empty() {
            true => named().or_else(told).unwrap_or_default(),
            false => coordinators,
        };
        if coordinators.is_empty() {
            return Err(ConfigError::Missing("coordinator"));
        }
        Ok(Self {
            coordinators,
            notice,
            spawner: args.spawner.clone().or(file.spawner).ok_or(ConfigError::Missing("spawner"))?,
            token,
            name: args.name.clone().or(file.name).unwrap_or_else(host_name),
            capacity: Resources {
                cpu_milli: args.cpu.as_ref().or(file.cpu.as_ref()).map_or_else(|| Ok(all_cpu()), |text| cpu(text))?,
                memory_bytes: args
                    .memory
                    .as_ref()
                    .or(file.memory.as_ref())
                    .map_or_else(|| Ok(all_memory()), |text| bytes("memory", text))?,
                disk_bytes: args
                    .disk
                    .as_ref()
                    .or(file.disk.as_ref())
                    .map_or_else(|| Ok(free_disk(&state)), |text| bytes("disk", text))?,
            },
            labels: merge_labels(file.labels, &flag_labels)?,
            slice: args.slice || file.slice,
            cache_bytes_max: file.cache_size.as_ref().map_or(Ok(CACHE_BYTES_MAX), |text| bytes("cache_size", text))?,
            file: args.config.clone(),
            flag_labels,
            state,
        })
    }

    /// Reads the settings file again and takes over its labels.
    ///
    /// # Errors
    /// The file cannot be used; nothing changed.
    pub fn reload(&mut self) -> Result<(), ConfigError> {
        if let Some(path) = &self.file {
            self.labels = merge_labels(read_file(path)?.labels, &self.flag_labels)?;
        }
        Ok(())
    }
}

/// The program's settings, if there is one.
fn notice_of(args: &RunArgs, file: &File) -> Option<interruption::Settings> {
    let program = args.notice_program.clone().or_else(|| file.notice_program.clone())?;
    let seconds = |flag: Option<u64>, key: Option<u64>, usual| Duration::from_secs(flag.or(key).unwrap_or(usual));
    let every = seconds(args.notice_every_seconds, file.notice_every_seconds, NOTICE_EVERY_SECONDS);
    let limit = seconds(args.notice_time_seconds, file.notice_time_seconds, NOTICE_TIME_SECONDS);
    Some(interruption::Settings {
        program,
        // One that fails at once is not to keep a core busy.
        every: every.max(Duration::from_secs(1)),
        time_limit: (!limit.is_zero()).then_some(limit),
        reserve: seconds(args.notice_reserve_seconds, file.notice_reserve_seconds, NOTICE_RESERVE_SECONDS),
    })
}

/// Between two runs of the program that knows when this host goes.
const NOTICE_EVERY_SECONDS: u64 = 5;
/// What it may take.
const NOTICE_TIME_SECONDS: u64 = 10;
/// The usual grace of a job, and some seconds to tell how it ended.
const NOTICE_RESERVE_SECONDS: u64 = 15;

/// Default of bytes kept of fetched blobs.
const CACHE_BYTES_MAX: u64 = 4 << 30;

fn read_file(path: &PathBuf) -> Result<File, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.clone(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Wrong { path: path.clone(), source: Box::new(source) })
}

/// A token file that is gone is no error: the token is needed only once.
fn read_token(path: &PathBuf) -> Result<Option<String>, ConfigError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Unreadable { path: path.clone(), source }),
    }
}

fn parse_labels(labels: &[String]) -> Result<BTreeMap<String, String>, ConfigError> {
    labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            Some(_) | None => Err(ConfigError::BadLabel(label.clone())),
        })
        .collect()
}

fn merge_labels(
    mut labels: BTreeMap<String, String>,
    flags: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, ConfigError> {
    labels.extend(flags.clone());
    if labels.len() > limits::LABELS_MAX {
        return Err(ConfigError::TooManyLabels(labels.len()));
    }
    Ok(labels)
}

fn cpu(text: &str) -> Result<u64, ConfigError> {
    let bad = || ConfigError::BadAmount { flag: "cpu", text: text.to_owned(), examples: "1500m, 2, 0.5" };
    let milli = match text.strip_suffix('m') {
        Some(milli) => milli.parse().map_err(|_| bad())?,
        None => decimal_milli(text).ok_or_else(bad)?,
    };
    if milli == 0 { Err(bad()) } else { Ok(milli) }
}

/// `1.5` as 1500, exactly.
fn decimal_milli(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let part: u64 = format!("{part:0<3}").parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1_000)?.checked_add(part)
}

fn bytes(flag: &'static str, text: &str) -> Result<u64, ConfigError> {
    let bad = || ConfigError::BadAmount { flag, text: text.to_owned(), examples: "512M, 4G, 1.5GiB" };
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kib" | "kb" => 10,
        "m" | "mi" | "mib" | "mb" => 20,
        "g" | "gi" | "gib" | "gb" => 30,
        "t" | "ti" | "tib" | "tb" => 40,
        _ => return Err(bad()),
    };
    let milli = decimal_milli(digits).ok_or_else(bad)?;
    u64::try_from((u128::from(milli) << shift) / 1_000).map_err(|_| bad())
}

fn all_cpu() -> u64 {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64 * 1_000
}

fn all_memory() -> u64 {
    crate::usage::memory_total("/proc".as_ref()).unwrap_or(0)
}

fn free_disk(state: &std::path::Path) -> u64 {
    // The folder may not be there yet: its nearest parent lies on the same disk.
    state.ancestors().find_map(|folder| nix::sys::statvfs::statvfs(folder).ok()).map_or(0, |disk| {
        let (blocks, size): (u64, u64) = (disk.blocks_available(), disk.fragment_size());
        blocks.saturating_mul(size)
    })
}

/// The host's own name.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname().unwrap_or_else(|_| OsString::from("unknown")).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(flags: &[&str]) -> RunArgs {
        let mut line = vec!["muster-agent", "run", "--state", "/s", "--coordinator", "a:1,b:2", "--spawner", "/p"];
        line.extend(flags);
        match CommandLine::try_parse_from(line).unwrap().command {
            Command::Run(args) | Command::Join(args) => *args,
        }
    }

    #[test]
    fn amounts_are_read_as_people_write_them() {
        let config = Config::resolve(&args(&["--cpu", "1.5", "--memory", "4G", "--disk", "512MiB"])).unwrap();
        assert_eq!(config.capacity, Resources { cpu_milli: 1_500, memory_bytes: 4 << 30, disk_bytes: 512 << 20 });
        assert_eq!(config.coordinators, ["a:1", "b:2"]);
        assert!(Config::resolve(&args(&["--cpu", "0"])).is_err());
        assert!(Config::resolve(&args(&["--memory", "4Q"])).is_err());
    }

    #[test]
    fn a_token_is_enough_to_find_the_coordinators() {
        let folder = tempfile::tempdir().unwrap();
        let json = format!(r#"{{"id":"00","secret":"11","ca":"{}","coordinators":["x:1","y:1"]}}"#, "ab".repeat(32));
        let token = format!("muster1.{}", crate::hex::encode(json.as_bytes()));
        let run = |token: Option<&str>| {
            let state = folder.path().to_owned();
            let args = RunArgs { token: token.map(str::to_owned), ..RunArgs::default() };
            Config::resolve(&RunArgs { state: Some(state), spawner: Some("/p".into()), ..args })
        };
        assert_eq!(run(Some(&token)).unwrap().coordinators, ["x:1", "y:1"]);
        // As the shipped unit says it when MUSTER_COORDINATOR is not set.
        let mut line = vec!["muster-agent", "run", "--state", "/s", "--coordinator", "", "--spawner", "/p"];
        line.extend(["--token", &token]);
        let Command::Run(args) = CommandLine::try_parse_from(line).unwrap().command else { unreachable!() };
        assert_eq!(Config::resolve(&args).unwrap().coordinators, ["x:1", "y:1"]);
        assert!(matches!(run(None), Err(ConfigError::Missing("coordinator"))));
        // After the join its certificate names them.
        let certificate = Certificate { coordinators: vec!["z:1".into()], ..Certificate::default() };
        let text = serde_json::to_vec(&certificate).unwrap();
        fs::write(folder.path().join(crate::identity::CERTIFICATE_FILE), text).unwrap();
        assert_eq!(run(None).unwrap().coordinators, ["z:1"]);
    }

    #[test]
    fn a_file_with_an_unknown_key_is_refused_and_flags_win() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.toml");
        fs::write(&path, "cpu = \"1\"\nname = \"x\"\n[labels]\na = \"1\"\nb = \"1\"\n").unwrap();
        let flags = ["--config", path.to_str().unwrap(), "--cpu", "2", "--label", "b=2"];
        let mut config = Config::resolve(&args(&flags)).unwrap();
        assert_eq!(config.capacity.cpu_milli, 2_000);
        assert_eq!(config.labels["b"], "2");
        fs::write(&path, "[labels]\nb = \"3\"\nc = \"3\"\n").unwrap();
        config.reload().unwrap();
        assert_eq!(config.labels, BTreeMap::from([("b".into(), "2".into()), ("c".into(), "3".into())]));
        fs::write(&path, "cpus = 1\n").unwrap();
        assert!(config.reload().is_err());
    }
}
