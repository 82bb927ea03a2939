//! Which of the four programs in this executable was called.

use std::{ffi::OsString, os::unix::ffi::OsStrExt, path::Path};

/// One of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Holds the fleet's state.
    Coordinator,
    /// The network's side of a host.
    Agent,
    /// The keeper of a host's jobs.
    Spawner,
    /// The operator's commands.
    Operator,
}

impl Role {
    /// By the program's name, else by a first word, which is then taken away.
    pub fn of(mut args: Vec<OsString>) -> (Self, Vec<OsString>) {
        let name = args.first().and_then(|name| Path::new(name).file_name()).map(|name| name.as_bytes().to_vec());
        let by_name = match name.as_deref() {
            Some(b"muster-coordinator") => Some(Self::Coordinator),
            Some(b"muster-agent") => Some(Self::Agent),
            Some(b"muster-spawner") => Some(Self::Spawner),
            _ => None,
        };
        if let Some(role) = by_name {
            return (role, args);
        }
        let by_word = match args.get(1).map(|word| word.as_bytes()) {
            Some(b"coordinator") => Some((Self::Coordinator, "muster-coordinator")),
            Some(b"agent") => Some((Self::Agent, "muster-agent")),
            Some(b"spawner") => Some((Self::Spawner, "muster-spawner")),
            _ => None,
        };
        match by_word {
            Some((role, name)) => {
                args.splice(0..2, [OsString::from(name)]);
                (role, args)
            }
            None => (Self::Operator, args),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &[&str]) -> (Role, Vec<String>) {
        let (role, args) = Role::of(words.iter().map(OsString::from).collect());
        (role, args.into_iter().map(|arg| arg.into_string().unwrap()).collect())
    }

    #[test]
    fn the_name_goes_before_the_first_word() {
        assert_eq!(of(&["/usr/bin/muster-agent", "run"]).0, Role::Agent);
        assert_eq!(
            of(&["/x/muster", "coordinator", "serve"]),
            (Role::Coordinator, vec!["muster-coordinator".to_owned(), "serve".to_owned()])
        );
        assert_eq!(of(&["muster", "spawner"]).0, Role::Spawner);
        assert_eq!(of(&["muster", "run", "--", "agent"]).0, Role::Operator);
        assert_eq!(of(&[]).0, Role::Operator);
    }
}
