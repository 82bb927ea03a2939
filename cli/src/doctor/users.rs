//! Users and uids: who runs this, who the agent is, which uids jobs get and
//! whether anybody else has one of them.

use std::ops::RangeInclusive;

use muster_agent::spawner::policy::{Policy, Weakest};

use super::{finding::Finding, host::Host};
use crate::args::Doctor;

/// The agent's user.
const AGENT_USER: &str = "muster";
/// Two pipes, the pair to its init, its pidfd, its working folder, and its cgroup with the group's events.
const DESCRIPTORS_OF_AN_ATTEMPT: u64 = 7;

/// A line of /etc/passwd or /etc/group.
#[derive(Clone, Debug)]
struct Named {
    name: String,
    id: u64,
}

/// A line of /etc/subuid or /etc/subgid.
#[derive(Clone, Debug)]
struct Granted {
    name: String,
    first: u64,
    count: u64,
}

/// What was seen.
#[derive(Debug)]
pub struct Users {
    uid: u32,
    users: Vec<Named>,
    groups: Vec<Named>,
    subuids: Vec<Granted>,
    subgids: Vec<Granted>,
    /// None: there is no file.
    policy: Option<Result<Policy, String>>,
    config: String,
    descriptors_max: Option<u64>,
}

impl Users {
    /// Looks.
    pub fn look(host: &Host, args: &Doctor, uid: u32) -> Self {
        let config = host.path(&args.spawner_config);
        let policy = config.exists().then(|| Policy::load(&config).map_err(|error| muster_agent::chain(&error)));
        let text = |path: &str| host.text(path).unwrap_or_default();
        Self {
            uid,
            users: named(&text("/etc/passwd")),
            groups: named(&text("/etc/group")),
            subuids: granted(&text("/etc/subuid")),
            subgids: granted(&text("/etc/subgid")),
            policy,
            config: args.spawner_config.display().to_string(),
            descriptors_max: host.number("/proc/sys/fs/nr_open"),
        }
    }

    /// The rules.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = vec![self.caller()];
        if self.uid == 0 {
            findings.extend([self.agent_user(), self.policy(), self.uid_range(), self.descriptors()]);
        } else {
            findings.push(self.ranges_of_ours());
        }
        findings
    }

    fn caller(&self) -> Finding {
        let (check, affects) = ("user.caller", "uid.own, kill.cgroup, limits.*");
        match self.uid {
            0 => Finding::ok(check, affects, "root: what a spawner that root starts would have"),
            uid => Finding::warn(
                check,
                affects,
                format!(
                    "uid {uid}: what a spawner of this user would have. Jobs share this uid; agent and spawner are \
                    one user, so nothing stands between them; no limits and no cgroup unless one is delegated"
                ),
                "run the spawner as root from its unit; and this as root to check it",
            ),
        }
    }

    fn agent_user(&self) -> Finding {
        let (check, affects) = ("user.agent", "the wall between agent and spawner");
        match self.users.iter().find(|user| user.name == AGENT_USER) {
            Some(Named { id: 0, .. }) => {
                Finding::missing(check, affects, "the user muster has uid 0", "systemd-sysusers, after removing it")
            }
            Some(user) => Finding::ok(check, affects, format!("muster is uid {}", user.id)),
            None => Finding::warn(
                check,
                affects,
                "there is no user muster",
                "install systemd/sysusers.conf as /usr/lib/sysusers.d/muster.conf and run systemd-sysusers",
            ),
        }
    }

    fn policy(&self) -> Finding {
        let (check, affects) = ("user.spawner_config", "what jobs may ask of this host");
        match &self.policy {
            None => Finding::warn(
                check,
                affects,
                format!("{} is not there: a spawner without it allows every profile", self.config),
                format!("install -m 0644 systemd/spawner.toml {}", self.config),
            ),
            Some(Err(why)) => Finding::missing(
                check,
                "every job: the spawner does not start",
                why,
                format!("mend {0}; chown root:root {0}; chmod 0644 {0}", self.config),
            ),
            Some(Ok(policy)) => {
                let weakest = match policy.weakest_profile {
                    Weakest::Strict => "strict",
                    Weakest::Shared => "shared",
                    Weakest::None => "none",
                };
                let poweroff = if policy.allow_poweroff { ", power-off allowed" } else { "" };
                Finding::ok(check, affects, format!("weakest profile {weakest}{poweroff}"))
            }
        }
    }

    fn uids_of_jobs(&self) -> Option<RangeInclusive<u64>> {
        match &self.policy {
            Some(Ok(policy)) => Some(u64::from(policy.uid_first)..=u64::from(policy.uid_last)),
            Some(Err(_)) => None,
            None => {
                let policy = Policy::default();
                Some(u64::from(policy.uid_first)..=u64::from(policy.uid_last))
            }
        }
    }

    fn uid_range(&self) -> Finding {
        let (check, affects) = ("user.uid_range", "uid.own");
        let Some(range) = self.uids_of_jobs() else {
            return Finding::unknown(check, affects, "the spawner's policy does not read", "see user.spawner_config");
        };
        let (first, last) = (*range.start(), *range.end());
        let mut others: Vec<String> = Vec::new();
        for (file, list) in [("/etc/passwd", &self.users), ("/etc/group", &self.groups)] {
            let inside = list.iter().filter(|named| range.contains(&named.id));
            others.extend(inside.map(|named| format!("{} ({}, {file})", named.name, named.id)));
        }
        for (file, list) in [("/etc/subuid", &self.subuids), ("/etc/subgid", &self.subgids)] {
            let meets = |grant: &&Granted| grant.first <= last && grant.first.saturating_add(grant.count) > first;
            let inside = list.iter().filter(meets);
            others.extend(inside.map(|grant| format!("{} ({}+{}, {file})", grant.name, grant.first, grant.count)));
        }
        if others.is_empty() {
            return Finding::ok(check, affects, format!("{first}-{last}: nobody else has one of them"));
        }
        let mend = format!("choose another uid_first and uid_last in {}, or move the others", self.config);
        Finding::missing(check, affects, format!("{first}-{last} also belongs to {}", others.join(", ")), mend)
    }

    fn descriptors(&self) -> Finding {
        let (check, affects) = ("user.descriptors", "attempts_max");
        let attempts = match &self.policy {
            Some(Ok(policy)) => policy.attempts_max,
            Some(Err(_)) | None => Policy::default().attempts_max,
        };
        let needed = DESCRIPTORS_OF_AN_ATTEMPT.saturating_mul(attempts as u64);
        match self.descriptors_max {
            Some(most) if most >= needed => Finding::ok(check, affects, format!("fs.nr_open is {most}")),
            Some(most) => Finding::warn(
                check,
                affects,
                format!("fs.nr_open is {most}, and {attempts} attempts need {needed}"),
                format!("sysctl -w fs.nr_open={}, or a lower attempts_max", needed.next_power_of_two()),
            ),
            None => Finding::unknown(check, affects, "fs.nr_open is not readable", "mount /proc"),
        }
    }

    fn ranges_of_ours(&self) -> Finding {
        let (check, affects) = ("user.subuids", "uid.own");
        let name = self.users.iter().find(|user| user.id == u64::from(self.uid)).map(|user| user.name.as_str());
        let id = self.uid.to_string();
        let ours = self.subuids.iter().find(|grant| Some(grant.name.as_str()) == name || grant.name == id);
        let seen = match ours {
            Some(grant) => format!("{}+{} are ours, and are not used yet", grant.first, grant.count),
            None => "this user has none".to_owned(),
        };
        Finding::ok(check, affects, format!("{seen}: all jobs run with uid {}", self.uid))
    }
}

/// `name:password:id:...`
fn named(text: &str) -> Vec<Named> {
    let line = |line: &str| {
        let mut fields = line.split(':');
        Some(Named { name: fields.next()?.to_owned(), id: fields.nth(1)?.parse().ok()? })
    };
    text.lines().filter_map(line).collect()
}

/// `name:first:count`
fn granted(text: &str) -> Vec<Granted> {
    let line = |line: &str| {
        let mut fields = line.split(':');
        Some(Granted {
            name: fields.next()?.to_owned(),
            first: fields.next()?.trim().parse().ok()?,
            count: fields.next()?.trim().parse().ok()?,
        })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        doctor::{finding::State, host::fixture},
    };

    const CONFIG: &str = "/etc/muster/spawner.toml";
    const GOOD: &str = "uid_first = 2000000\nuid_last = 2004095\nweakest_profile = \"strict\"\n";
    const PASSWD: (&str, &str) = ("/etc/passwd", "root:x:0:0::/:/bin/sh\nmuster:x:990:990::/:/bin/false\n");

    fn args() -> Doctor {
        match Cli::try_parse_from(["muster", "doctor"]).unwrap().command {
            Command::Doctor(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn found(files: &[(&str, &str)], config_mode: u32, uid: u32) -> Vec<Finding> {
        let (_folder, host) = fixture(files);
        if host.has(CONFIG) {
            fs::set_permissions(host.path(CONFIG), fs::Permissions::from_mode(config_mode)).unwrap();
        }
        Users::look(&host, &args(), uid).findings()
    }

    fn one(files: &[(&str, &str)], check: &str) -> Finding {
        found(files, 0o644, 0).into_iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_host_as_it_is_installed_is_well() {
        let files =
            [(CONFIG, GOOD), PASSWD, ("/etc/subuid", "ana:100000:65536\n"), ("/proc/sys/fs/nr_open", "1048576\n")];
        let findings = found(&files, 0o644, 0);
        assert!(findings.iter().all(|finding| finding.state == State::Ok), "{findings:?}");
    }

    #[test]
    fn uids_of_jobs_that_somebody_has_are_told_by_name() {
        let overlapping = [
            ("/etc/passwd", "eve:x:2000001:100::/:/bin/sh\n", "eve"),
            ("/etc/group", "staff:x:2004095:\n", "staff"),
            ("/etc/subuid", "ana:1990000:10001\n", "ana"),
            ("/etc/subgid", "bob:2004095:1\n", "bob"),
        ];
        for (path, text, name) in overlapping {
            let finding = one(&[(CONFIG, GOOD), (path, text)], "user.uid_range");
            assert_eq!(finding.state, State::Missing, "{path}");
            assert!(finding.seen.contains(name) && finding.mend.contains("uid_first"), "{finding:?}");
        }
        let beside = [(CONFIG, GOOD), ("/etc/subuid", "ana:1990000:10000\nbob:2004096:100\n")];
        assert_eq!(one(&beside, "user.uid_range").state, State::Ok);
    }

    #[test]
    fn a_spawner_config_that_keeps_the_spawner_down_is_told_with_its_error() {
        for (text, word) in [
            ("uid_frist = 3\n", "uid_frist"),
            ("uid_first = 0\nuid_last = 9\n", "must not contain 0"),
            ("weakest_profile = \"soft\"\n", "soft"),
        ] {
            let finding = one(&[(CONFIG, text)], "user.spawner_config");
            assert_eq!(finding.state, State::Missing, "{text}");
            assert!(finding.seen.contains(word), "{finding:?}");
            assert_eq!(one(&[(CONFIG, text)], "user.uid_range").state, State::Unknown);
        }
        let writable = found(&[(CONFIG, GOOD)], 0o666, 0);
        let finding = writable.iter().find(|finding| finding.check == "user.spawner_config").unwrap();
        assert_eq!(finding.state, State::Missing);
        assert!(finding.seen.contains("writable by nobody else"), "{finding:?}");
        assert_eq!(one(&[], "user.spawner_config").state, State::Warn);
    }

    #[test]
    fn the_agents_user_and_the_descriptors_are_looked_at() {
        assert_eq!(one(&[], "user.agent").state, State::Warn);
        assert_eq!(one(&[("/etc/passwd", "muster:x:0:0::/:/bin/sh\n")], "user.agent").state, State::Missing);
        let few = one(&[("/proc/sys/fs/nr_open", "1024\n")], "user.descriptors");
        assert_eq!(few.state, State::Warn);
        assert!(few.mend.contains("fs.nr_open=65536"), "{few:?}");
    }

    #[test]
    fn an_ordinary_user_hears_what_does_not_hold() {
        let findings = found(
            &[("/etc/passwd", "ana:x:1000:1000::/:/bin/sh\n"), ("/etc/subuid", "ana:100000:65536\n")],
            0o644,
            1000,
        );
        assert_eq!(findings[0].state, State::Warn);
        assert!(findings[0].seen.contains("share this uid"), "{findings:?}");
        assert!(findings[1].seen.contains("100000+65536"), "{findings:?}");
        assert_eq!(findings.len(), 2);
    }
}
