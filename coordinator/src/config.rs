//! Settings: the command line, and a file for what is set once. Unknown keys
//! are refused, and a bad value before a port is bound.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use clap::{Args, Parser, Subcommand};
use muster_core::policy::PoolPolicy;
use serde::Deserialize;

use crate::person::{PersonName, Role};

/// Where programs that make hosts are looked for.
const PROVIDERS: &str = "/etc/muster/providers";

/// The coordinator: holds the fleet's state, decides, serves gRPC.
#[derive(Debug, Parser)]
#[command(name = "muster-coordinator", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a fleet: its CA, certificates and empty store.
    Init(Init),
    /// Serve the fleet of a data folder.
    Serve(Box<Serve>),
    /// Make a key and a certificate with which a person or program reaches the fleet from elsewhere.
    Admit(Admit),
}

/// Settings of `admit`.
#[derive(Clone, Debug, Args)]
pub struct Admit {
    /// Who: the history names it.
    pub name: PersonName,
    /// What it may do; each role has the rights of those before it.
    #[arg(long, value_enum)]
    pub role: Role,
    /// How long the certificate is good, in days: it cannot be taken back before.
    #[arg(long, default_value_t = 365, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3_650))]
    pub days: u32,
    /// Folder for NAME.pem and NAME.key.
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub to: PathBuf,
    /// Data folder of a coordinator of the fleet; it may run.
    #[arg(long, default_value = "/var/lib/muster", value_name = "DIR")]
    pub data: PathBuf,
}

/// Settings of `init`.
#[derive(Clone, Debug, Args)]
pub struct Init {
    /// Data folder.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Name or address of the coordinator, beside localhost; repeatable.
    #[arg(long, value_name = "NAME|IP")]
    pub san: Vec<String>,
    /// PostgreSQL that several coordinators share; without it the store is a file in the data folder.
    #[arg(long, value_name = "postgres://...", env = "MUSTER_STORE", hide_env_values = true)]
    pub store: Option<String>,
    /// CA that vouches for PostgreSQL's certificate (PEM): the connection then has TLS.
    #[arg(long, value_name = "FILE", requires = "store")]
    pub store_ca: Option<PathBuf>,
    /// Make a further coordinator of the fleet whose data folder (fleet.toml, pki/ca.pem, pki/ca.key) was copied here.
    #[arg(long, value_name = "DIR")]
    pub join_from: Option<PathBuf>,
}

/// Settings of `serve`.
#[derive(Clone, Debug, Args)]
pub struct Serve {
    /// Data folder.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Make the fleet first if the folder has none.
    #[arg(long)]
    pub init: bool,
    /// With --init: as in `init`.
    #[arg(long, value_name = "NAME|IP")]
    pub san: Vec<String>,
    /// PostgreSQL that several coordinators share; without it the store is a file in the data folder.
    #[arg(long, value_name = "postgres://...", env = "MUSTER_STORE", hide_env_values = true)]
    pub store: Option<String>,
    /// CA that vouches for PostgreSQL's certificate (PEM): the connection then has TLS.
    #[arg(long, value_name = "FILE")]
    pub store_ca: Option<PathBuf>,
    /// Folder for blobs and logs that every coordinator of the fleet reaches (a network file system); needed with --store.
    #[arg(long, value_name = "DIR")]
    pub shared: Option<PathBuf>,
    /// Addresses of all coordinators of the fleet, in tokens and certificates of hosts, with commas between them.
    #[arg(long, value_name = "ADDRESS:PORT,...", value_delimiter = ',')]
    pub coordinators: Vec<String>,
    /// Address that agents and operators dial, if it differs from --listen.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub advertise: Option<String>,
    /// Address for agents and operators; port 0 takes a free one [default: 127.0.0.1:0].
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Unix socket for operators on this machine [default: DIR/operator.sock].
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Write the actual address there when ready.
    #[arg(long, value_name = "PATH")]
    pub port_file: Option<PathBuf>,
    /// Serve health and metrics over plain HTTP there.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub http: Option<SocketAddr>,
    /// Settings file.
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Socket of the program that makes local hosts.
    #[arg(long, value_name = "SOCKET")]
    pub local_provider: Option<PathBuf>,
    /// Folder of the programs that make hosts for pools with the provider `exec` [default: /etc/muster/providers].
    #[arg(long, value_name = "DIR")]
    pub providers: Option<PathBuf>,
    /// Pool policy to put in force at start; repeatable.
    #[arg(long, value_name = "FILE.toml")]
    pub policy: Vec<PathBuf>,
    /// End when this pipe closes: the parent is gone.
    #[arg(long, value_name = "N")]
    pub parent_fd: Option<RawFd>,
    /// With --parent-fd: remove the data folder at the end.
    #[arg(long, requires = "parent_fd")]
    pub ephemeral: bool,
}

/// The settings file. The command line wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Address for agents and operators.
    pub listen: Option<SocketAddr>,
    /// Unix socket for operators on this machine.
    pub socket: Option<PathBuf>,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
    /// Address that hosts are told to dial, if it differs from the one listened on.
    pub advertise: Option<String>,
    /// Every coordinator's address, as hosts are told them.
    #[serde(default)]
    pub coordinators: Vec<String>,
    /// PostgreSQL that several coordinators share.
    pub store: Option<String>,
    /// CA that vouches for its certificate.
    pub store_ca: Option<PathBuf>,
    /// For blobs and logs, reached by every coordinator.
    pub shared: Option<PathBuf>,
    /// Folder of the programs that make hosts.
    pub providers: Option<PathBuf>,
    /// Of stderr.
    #[serde(default)]
    pub log_format: LogFormat,
}

/// How stderr looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line for a person.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// Why the settings are refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {file}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file says something that it may not.
    #[error("{file} is refused")]
    Refused {
        /// The file.
        file: String,
        /// Which key, and why.
        #[source]
        source: toml::de::Error,
    },
}

/// All that `serve` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Data folder.
    pub data: PathBuf,
    /// Make the fleet if there is none.
    pub init: bool,
    /// For a fleet that is made.
    pub sans: Vec<String>,
    /// For agents and operators.
    pub listen: SocketAddr,
    /// For operators on this machine.
    pub socket: PathBuf,
    /// Told the actual address.
    pub port_file: Option<PathBuf>,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
    /// Every coordinator's address, as hosts are told them; empty: they are told otherwise.
    pub coordinators: Vec<String>,
    /// PostgreSQL's address; none: a file in the data folder.
    pub store: Option<String>,
    /// CA that vouches for its certificate.
    pub store_ca: Option<PathBuf>,
    /// For blobs and logs; none: the data folder.
    pub shared: Option<PathBuf>,
    /// What hosts dial; none: the address that is listened on.
    pub advertise: Option<String>,
    /// Makes local hosts.
    pub local_provider: Option<PathBuf>,
    /// Programs that make hosts of pools that name them.
    pub providers: PathBuf,
    /// To be put in force.
    pub policies: Vec<PoolPolicy>,
    /// Of stderr.
    pub log_format: LogFormat,
}

impl Config {
    /// From the command line and the files that it names.
    ///
    /// # Errors
    /// A file is missing or refused.
    pub fn load(serve: &Serve) -> Result<Self, Error> {
        let file: File = serve.config.as_deref().map(read_toml).transpose()?.unwrap_or_default();
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Self {
            data: serve.data.clone(),
            init: serve.init,
            sans: serve.san.clone(),
            listen: serve.listen.or(file.listen).unwrap_or(free),
            socket: serve.socket.clone().or(file.socket).unwrap_or_else(|| serve.data.join("operator.sock")),
            port_file: serve.port_file.clone(),
            http: serve.http.or(file.http),
            coordinators: if serve.coordinators.is_empty() { file.coordinators } else { serve.coordinators.clone() },
            store: serve.store.clone().or(file.store),
            store_ca: serve.store_ca.clone().or(file.store_ca),
            shared: serve.shared.clone().or(file.shared),
            advertise: serve.advertise.clone().or(file.advertise),
            local_provider: serve.local_provider.clone(),
            providers: serve.providers.clone().or(file.providers).unwrap_or_else(|| PROVIDERS.into()),
            policies: serve.policy.iter().map(|file| read_toml(file)).collect::<Result<_, _>>()?,
            log_format: file.log_format,
        })
    }
}

fn read_toml<T: serde::de::DeserializeOwned>(file: &Path) -> Result<T, Error> {
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).map_err(|source| Error::Read { file: name(), source })?;
    toml::from_str(&text).map_err(|source| Error::Refused { file: name(), source })
}

/// Parses the command line.
///
/// # Errors
/// As clap tells it.
pub fn parse(args: Vec<OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pool.toml");
        let policy = "name = 'local'\nprovider = 'local'\nmax = 3\nmaximum = 4\n\
                      [host]\ncpu_milli = 1000\nmemory_bytes = 1000\ndisk_bytes = 0\n";
        fs::write(&file, policy).unwrap();
        let error = read_toml::<PoolPolicy>(&file).unwrap_err();
        let Error::Refused { source, .. } = &error else { panic!("{error}") };
        assert!(source.to_string().contains("maximum"), "{source}");
        fs::write(&file, policy.replace("maximum = 4\n", "")).unwrap();
        assert_eq!(read_toml::<PoolPolicy>(&file).unwrap().max, 3);
    }

    #[test]
    fn the_command_line_is_as_it_is_documented() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
