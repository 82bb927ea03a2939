//! The `muster` executable: by its name or its first word it is the
//! coordinator, the agent or the spawner; otherwise the operator's commands.

mod args;
mod blobs;
mod client;
mod commands;
mod demo;
mod doctor;
mod escape;
mod exit;
mod fences;
pub mod hostlist;
mod inputs;
mod local;
mod output;
mod progress;
mod role;
pub mod template;
mod units;

use std::{ffi::OsString, io::Write, process::ExitCode};

use clap::Parser;
use role::Role;

/// The executable, from its command line to its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match Role::of(args) {
        (Role::Coordinator, args) => muster_coordinator::main(args),
        (Role::Agent, args) => muster_agent::main(args),
        (Role::Spawner, args) => muster_agent::spawner::main(args),
        (Role::Operator, args) => operator(args),
    }
}

/// The operator's commands: parse, run on one thread, tell the error once.
fn operator(args: Vec<OsString>) -> ExitCode {
    let cli = match args::Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout and are no error.
            drop(error.print());
            return if error.use_stderr() { exit::Exit::Usage.into() } else { exit::Exit::Ok.into() };
        }
    };
    let verbose = cli.global.verbose;
    match commands::run(cli) {
        Ok(code) => code,
        Err(failure) => {
            if failure.exit != exit::Exit::Ok {
                tell(&failure, verbose);
            }
            failure.exit.into()
        }
    }
}

fn tell(failure: &exit::Failure, verbose: bool) {
    let mut text = format!("muster: {failure}\n");
    if verbose && let Some(cause) = &failure.cause {
        for cause in cause.chain() {
            text.push_str(&format!("  because: {}\n", escape::text(&cause.to_string())));
        }
    }
    drop(std::io::stderr().write_all(text.as_bytes()));
}
