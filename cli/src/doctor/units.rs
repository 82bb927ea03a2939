//! The systemd units, as systemd holds them: shipped settings that a drop-in
//! must not have taken away.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use super::{finding::Finding, host::Host};

const SPAWNER: &str = "muster-spawner.service";
const AGENT: &str = "muster-agent.service";
const PROPERTIES: &str = "LoadState,ActiveState,Delegate,KillMode,ControlGroup,DropInPaths,User,NoNewPrivileges";

/// Properties of one unit, by name.
#[derive(Clone, Debug, Default)]
pub struct Unit(BTreeMap<String, String>);

/// What was seen.
#[derive(Clone, Debug)]
pub enum Units {
    /// Another init runs this host.
    NoSystemd,
    /// systemd runs, and says nothing to us.
    Silent,
    /// What it says.
    Seen { spawner: Unit, agent: Unit },
}

impl Unit {
    /// `NAME=VALUE` lines.
    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn is_installed(&self) -> bool {
        self.get("LoadState") == "loaded"
    }

    /// Which drop-ins may have changed it.
    fn by(&self) -> String {
        match self.get("DropInPaths") {
            "" => String::from("the unit file"),
            paths => paths.to_owned(),
        }
    }
}

impl Units {
    /// Asks systemd, if it runs here.
    pub fn look(host: &Host) -> Self {
        if !host.has("/run/systemd/system") {
            return Self::NoSystemd;
        }
        match (show(SPAWNER), show(AGENT)) {
            (Some(spawner), Some(agent)) => Self::Seen { spawner, agent },
            _one_is_silent => Self::Silent,
        }
    }

    /// The cgroup that the spawner's unit has, or gets when it starts.
    pub fn spawner_cgroup(&self, mount: Option<&Path>) -> Option<PathBuf> {
        let Self::Seen { spawner, .. } = self else { return None };
        if !spawner.is_installed() {
            return None;
        }
        let group = match spawner.get("ControlGroup") {
            "" => "system.slice/muster-spawner.service",
            group => group.trim_start_matches('/'),
        };
        mount.map(|mount| mount.join(group))
    }

    /// The rules.
    pub fn findings(&self) -> Vec<Finding> {
        match self {
            Self::NoSystemd => vec![Finding::ok(
                "unit.spawner",
                "restarts, limits.*",
                "systemd does not run here; a spawner that root starts makes a cgroup of its own",
            )],
            Self::Silent => {
                let mend = "run as root on the host itself";
                vec![Finding::unknown("unit.spawner", "restarts, limits.*", "systemd does not answer", mend)]
            }
            Self::Seen { spawner, agent } => {
                let mut findings = spawner_findings(spawner);
                findings.extend(agent_findings(agent));
                findings
            }
        }
    }
}

fn not_installed(check: &str, unit: &str) -> Finding {
    let mend = format!("install -m 0644 systemd/{unit} /usr/lib/systemd/system/ and systemctl daemon-reload");
    Finding::warn(check, "restarts, limits.*", format!("{unit} is not installed"), mend)
}

/// A setting that must be as it was shipped.
fn shipped(unit: &Unit, check: &str, affects: &str, name: &str, wanted: &str) -> Finding {
    let value = unit.get(name);
    if value == wanted {
        return Finding::ok(check, affects, format!("{name}={value}"));
    }
    let seen = format!("{name}={value} (by {})", unit.by());
    let mend = format!("take {name}= out of {}, then systemctl daemon-reload; shipped is {name}={wanted}", unit.by());
    Finding::missing(check, affects, seen, mend)
}

fn spawner_findings(unit: &Unit) -> Vec<Finding> {
    if !unit.is_installed() {
        return vec![not_installed("unit.spawner", SPAWNER)];
    }
    vec![
        Finding::ok("unit.spawner", "restarts, limits.*", unit.get("ActiveState")),
        shipped(unit, "unit.spawner.delegate", "limits.*, kill.cgroup", "Delegate", "yes"),
        shipped(unit, "unit.spawner.kill_mode", "FL-5", "KillMode", "mixed"),
    ]
}

fn agent_findings(unit: &Unit) -> Vec<Finding> {
    if !unit.is_installed() {
        return vec![not_installed("unit.agent", AGENT)];
    }
    let (check, affects) = ("unit.agent.user", "the wall between agent and spawner");
    let user = match unit.get("User") {
        "" | "root" | "0" => {
            let mend = format!("take User= out of {}, then systemctl daemon-reload; shipped is User=muster", unit.by());
            Finding::missing(check, affects, "the agent runs as root", mend)
        }
        user => Finding::ok(check, affects, format!("User={user}")),
    };
    vec![
        Finding::ok("unit.agent", "restarts", unit.get("ActiveState")),
        user,
        shipped(unit, "unit.agent.no_new_privileges", affects, "NoNewPrivileges", "yes"),
    ]
}

fn show(unit: &str) -> Option<Unit> {
    let shown = Command::new("systemctl").args(["show", unit, "-p", PROPERTIES]).output().ok()?;
    shown.status.success().then(|| Unit::parse(&String::from_utf8_lossy(&shown.stdout)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::State;

    const SHIPPED: &str = "LoadState=loaded\nActiveState=active\nDelegate=yes\nKillMode=mixed\n\
        ControlGroup=/system.slice/muster-spawner.service\nDropInPaths=\nUser=\nNoNewPrivileges=yes\n";

    fn states(spawner: &str, agent: &str) -> Vec<(String, State)> {
        let units = Units::Seen { spawner: Unit::parse(spawner), agent: Unit::parse(agent) };
        units.findings().into_iter().map(|finding| (finding.check, finding.state)).collect()
    }

    #[test]
    fn a_drop_in_that_takes_the_delegation_away_is_named() {
        let changed = SHIPPED
            .replace("Delegate=yes", "Delegate=no")
            .replace("DropInPaths=", "DropInPaths=/etc/systemd/system/muster-spawner.service.d/override.conf");
        let found = spawner_findings(&Unit::parse(&changed));
        assert_eq!(found[1].state, State::Missing);
        assert!(found[1].mend.contains("override.conf") && found[1].mend.contains("Delegate=yes"), "{found:?}");
        let found = spawner_findings(&Unit::parse(&SHIPPED.replace("mixed", "process")));
        assert_eq!(found[2].state, State::Missing);
        assert!(spawner_findings(&Unit::parse(SHIPPED)).iter().all(|finding| finding.state == State::Ok));
    }

    #[test]
    fn an_agent_that_runs_as_root_has_no_wall() {
        let agent = SHIPPED.replace("User=", "User=muster");
        assert!(states(SHIPPED, &agent).iter().all(|(_, state)| *state == State::Ok));
        assert!(states(SHIPPED, SHIPPED).contains(&("unit.agent.user".to_owned(), State::Missing)));
        let absent = "LoadState=not-found\n";
        assert_eq!(
            states(absent, absent),
            [("unit.spawner".to_owned(), State::Warn), ("unit.agent".to_owned(), State::Warn)]
        );
    }

    #[test]
    fn the_spawners_cgroup_is_its_units() {
        let group = |text: &str| {
            let units = Units::Seen { spawner: Unit::parse(text), agent: Unit::default() };
            units.spawner_cgroup(Some(Path::new("/sys/fs/cgroup")))
        };
        let expected = Path::new("/sys/fs/cgroup/system.slice/muster-spawner.service");
        assert_eq!(group(SHIPPED).as_deref(), Some(expected));
        assert_eq!(group("LoadState=loaded\nControlGroup=\n").as_deref(), Some(expected));
        assert_eq!(group("LoadState=not-found\n"), None);
    }
}
