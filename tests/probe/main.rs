//! A hostile job. Each sub-command is one case of the hostile suite: it tries
//! what a job must not be able to do and prints a line of JSON for each try,
//! whether it worked or not. `a+b` is one after the other. It judges nothing;
//! that is the suite's part.
//!
//! The same program runs in the sandbox and, as the control, outside of it. It
//! is linked statically, so that it needs nothing of the host that it runs on.

mod files;
mod kernel;
mod life;
mod network;
mod privilege;
mod processes;
mod resources;
mod sys;
mod tell;

use std::{collections::BTreeMap, process::ExitCode};

/// What the suite tells a case beside its name: `name=value` words.
pub struct Facts(BTreeMap<String, String>);

impl Facts {
    /// A fact's text; empty if it was not told.
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// A fact that is a number; `otherwise` if it was not told.
    pub fn number(&self, name: &str, otherwise: u64) -> u64 {
        self.text(name).parse().unwrap_or(otherwise)
    }

    /// All facts whose name begins so: the rest of the name, and the text.
    pub fn all<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(name, text)| Some((name.strip_prefix(prefix)?, text.as_str())))
    }
}

type Command = fn(&Facts);

const COMMANDS: [(&str, Command); 43] = [
    ("fork-bomb", resources::fork_bomb),
    ("thread-bomb", resources::thread_bomb),
    ("memory", resources::memory),
    ("greedy-children", resources::greedy_children),
    ("fill-folder", resources::fill_folder),
    ("many-files", resources::many_files),
    ("open-files", resources::open_files),
    ("burn", resources::burn),
    ("write-disk", resources::write_disk),
    ("priority", resources::priority),
    ("large-file", resources::large_file),
    ("crash", resources::crash),
    ("zombies", resources::zombies),
    ("limits", resources::limits),
    ("descriptors", processes::descriptors),
    ("other-processes", processes::others),
    ("attack-processes", processes::attack),
    ("attack-init", processes::attack_init),
    ("kill-all", processes::kill_all),
    ("namespaces", processes::namespaces),
    ("abstract-sockets", network::abstract_sockets),
    ("path-sockets", network::path_sockets),
    ("addresses", network::addresses),
    ("socket-families", network::families),
    ("ipc", network::ipc),
    ("identity", privilege::identity),
    ("setuid", privilege::setuid),
    ("mounts", privilege::mounts),
    ("new-namespaces", privilege::new_namespaces),
    ("join-namespaces", privilege::join_namespaces),
    ("devices", files::devices),
    ("settings", files::settings),
    ("cgroups", files::cgroups),
    ("write-host", files::write_host),
    ("landlock", files::landlock),
    ("administration", kernel::administration),
    ("clock", kernel::clock),
    ("surface", kernel::surface),
    ("keys", kernel::keys),
    ("terminal", kernel::terminal),
    ("deaf", life::deaf),
    ("stopped", life::stopped),
    ("daemon", life::daemon),
];

/// What the suite uses of this program beside the cases.
const HELPERS: [(&str, Command); 6] = [
    ("victim", life::victim),
    ("canary", life::canary),
    ("end", life::end),
    ("outputs", files::outputs),
    ("extreme-outputs", files::extreme_outputs),
    ("note-core", life::note_core),
];

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let name = words.next().unwrap_or_default();
    let facts = Facts(
        words.filter_map(|word| word.split_once('=').map(|(name, text)| (name.to_owned(), text.to_owned()))).collect(),
    );
    for name in name.split('+') {
        match COMMANDS.iter().chain(&HELPERS).find(|(command, _)| *command == name) {
            Some((_, command)) => command(&facts),
            None => {
                eprintln!("muster-probe: no case is called {name:?}");
                return ExitCode::from(2);
            }
        }
    }
    ExitCode::SUCCESS
}
