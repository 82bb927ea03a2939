//! Who this host is to the fleet: the agent's key, certificate and join token;
//! on the coordinator's machine its certificates.

use std::path::{Path, PathBuf};

use muster_agent::identity::{CERTIFICATE_FILE, Certificate, IdentityError, KEY_FILE};

use super::{
    finding::Finding,
    host::{Host, Rights},
};
use crate::{args::Doctor, output::span};

/// A person's or the server's certificate with less than this left is told.
const SOON_MS: u64 = 30 * 86_400_000;

/// The agent's certificate, as far as we may see it.
#[derive(Debug)]
enum Stored {
    Absent,
    Hidden,
    Damaged(String),
    Held { received_ms: u64, not_after_ms: u64 },
}

/// What was seen.
#[derive(Debug)]
pub struct Identity {
    state: PathBuf,
    certificate: Stored,
    key: Rights,
    token: (PathBuf, Rights),
    /// Of the coordinator: each file with its end, or why it cannot be read.
    certificates: Vec<(PathBuf, Result<u64, String>)>,
    ca_key: Option<(PathBuf, Rights)>,
    now_ms: u64,
}

impl Identity {
    /// Looks.
    pub fn look(host: &Host, args: &Doctor, now_ms: u64) -> Self {
        let state = &args.agent_state;
        let certificate = match Certificate::read(&host.path(state)) {
            Ok(Some(held)) => Stored::Held { received_ms: held.received_ms, not_after_ms: held.not_after_ms },
            // A folder that is closed to us looks as if it were empty to nobody but a careless reader.
            Ok(None) => Stored::Absent,
            Err(IdentityError::Unreadable { .. }) => Stored::Hidden,
            Err(error) => Stored::Damaged(muster_agent::chain(&error)),
        };
        let pki = args.coordinator_data.join("pki");
        let runs_here = !matches!(host.rights(pki.join("ca.pem")), Rights::Absent);
        let ends = |name: &str| {
            let file = pki.join(name);
            let end = muster_coordinator::identity::certificate_end(&host.path(&file));
            (file, end.map(|time| time.0).map_err(|error| muster_agent::chain(&error)))
        };
        Self {
            certificate,
            key: host.rights(state.join(KEY_FILE)),
            token: (args.token_file.clone(), host.rights(&args.token_file)),
            certificates: if runs_here { ["ca.pem", "server.pem", "admin.pem"].map(ends).into() } else { Vec::new() },
            ca_key: runs_here.then(|| (pki.join("ca.key"), host.rights(pki.join("ca.key")))),
            state: state.clone(),
            now_ms,
        }
    }

    /// The rules.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = vec![self.certificate(), self.key(), self.token()];
        findings.extend(self.certificates.iter().map(|(file, end)| self.coordinators(file, end)));
        findings.extend(self.ca_key.as_ref().map(|(file, rights)| {
            private("identity.ca_key", "FL-15: whoever has it makes nodes and administrators", file, *rights)
        }));
        findings
    }

    fn certificate(&self) -> Finding {
        let (check, affects) = ("identity.certificate", "FL-15: the agent's way to its coordinator");
        let again = format!(
            "on the coordinator: muster token create; here: put it into {} and systemctl restart muster-agent",
            self.token.0.display()
        );
        match &self.certificate {
            Stored::Absent => {
                let seen = format!("{} has joined no fleet yet", self.state.display());
                Finding::warn(check, affects, seen, again)
            }
            Stored::Hidden => {
                let file = self.state.join(CERTIFICATE_FILE);
                Finding::unknown(check, affects, format!("{} is not ours to read", file.display()), "run as root")
            }
            Stored::Damaged(why) => {
                let mend = format!("remove {}, then {again}", self.state.join(CERTIFICATE_FILE).display());
                Finding::missing(check, affects, why, mend)
            }
            Stored::Held { not_after_ms, .. } if *not_after_ms <= self.now_ms => {
                Finding::missing(check, affects, format!("ended {} ago", span(self.now_ms - not_after_ms)), again)
            }
            Stored::Held { received_ms, not_after_ms } => {
                let left = not_after_ms - self.now_ms;
                let seen = format!("good for {} more", span(left));
                // It is renewed at two thirds of its life; a tenth left means that renewals fail.
                if left < not_after_ms.saturating_sub(*received_ms) / 10 {
                    let mend = "see why it is not renewed: journalctl -u muster-agent";
                    return Finding::warn(check, affects, format!("{seen}, and not renewed"), mend);
                }
                Finding::ok(check, affects, seen)
            }
        }
    }

    fn key(&self) -> Finding {
        let (check, affects) = ("identity.key", "FL-15: whoever has it is this node");
        private(check, affects, &self.state.join(KEY_FILE), self.key)
    }

    fn token(&self) -> Finding {
        let (check, affects) = ("identity.join_token", "FL-15: whoever has it may join first");
        match self.token.1 {
            Rights::Absent => Finding::ok(check, affects, "none is kept; it is needed once only"),
            rights => private(check, affects, &self.token.0, rights),
        }
    }

    fn coordinators(&self, file: &Path, end: &Result<u64, String>) -> Finding {
        let name = file.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        let (check, affects) = (format!("identity.coordinator_{name}"), "FL-15");
        let mend = match name {
            "ca" => "make a new fleet (muster-coordinator init) and join every host again",
            "server" => "systemctl restart muster-coordinator: it makes a new one",
            _ => "ask an administrator for a new certificate",
        };
        match end {
            Err(why) => Finding::unknown(&check, affects, why, "run as root, or restore the pki folder"),
            Ok(end) if *end <= self.now_ms => {
                Finding::missing(&check, affects, format!("ended {} ago", span(self.now_ms - end)), mend)
            }
            Ok(end) if end - self.now_ms < SOON_MS => {
                Finding::warn(&check, affects, format!("good for {} more only", span(end - self.now_ms)), mend)
            }
            Ok(end) => Finding::ok(&check, affects, format!("good for {} more", span(end - self.now_ms))),
        }
    }
}

/// A file that only its owner may read.
fn private(check: &str, affects: &str, file: &Path, rights: Rights) -> Finding {
    let path = file.display();
    match rights {
        Rights::Absent => Finding::ok(check, affects, format!("{path} is not there")),
        Rights::Hidden => Finding::unknown(check, affects, format!("{path} is not ours to see"), "run as root"),
        Rights::Of { mode, .. } if mode & 0o077 != 0 => Finding::missing(
            check,
            affects,
            format!("{path} is open to others (mode {mode:04o})"),
            format!("chmod 0600 {path}, and make a new one if others have read it"),
        ),
        Rights::Of { uid, .. } => Finding::ok(check, affects, format!("{path} is readable by uid {uid} alone")),
    }
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

    const NOW_MS: u64 = 1_800_000_000_000;
    const DAY_MS: u64 = 86_400_000;

    fn args() -> Doctor {
        match Cli::try_parse_from(["muster", "doctor"]).unwrap().command {
            Command::Doctor(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn certificate(received_ms: u64, not_after_ms: u64) -> String {
        format!(r#"{{"node":7,"chain":["00"],"ca":"00","received_ms":{received_ms},"not_after_ms":{not_after_ms}}}"#)
    }

    fn found(files: &[(&str, &str)], mode: u32) -> Vec<Finding> {
        let (_folder, host) = fixture(files);
        for (path, _) in files {
            fs::set_permissions(host.path(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        Identity::look(&host, &args(), NOW_MS).findings()
    }

    fn state(findings: &[Finding], check: &str) -> State {
        findings.iter().find(|finding| finding.check == check).unwrap().state
    }

    #[test]
    fn a_certificate_that_ended_says_how_to_join_again() {
        let path = "/var/lib/muster-agent/certificate.json";
        let of = |received, end| found(&[(path, &certificate(received, end))], 0o600);
        let ended = of(NOW_MS - 2 * DAY_MS, NOW_MS - DAY_MS);
        assert_eq!(state(&ended, "identity.certificate"), State::Missing);
        assert!(ended[0].seen.contains("ended") && ended[0].mend.contains("muster token create"), "{ended:?}");
        assert_eq!(state(&of(NOW_MS, NOW_MS + DAY_MS), "identity.certificate"), State::Ok);
        let overdue = of(NOW_MS - 20 * DAY_MS, NOW_MS + DAY_MS);
        assert_eq!(state(&overdue, "identity.certificate"), State::Warn);
        assert_eq!(state(&found(&[(path, "{")], 0o600), "identity.certificate"), State::Missing);
        assert_eq!(state(&found(&[], 0o600), "identity.certificate"), State::Warn);
    }

    #[test]
    fn a_key_or_token_that_others_can_read_is_told() {
        for (path, check) in
            [("/var/lib/muster-agent/key.pem", "identity.key"), ("/etc/muster/join-token", "identity.join_token")]
        {
            assert_eq!(state(&found(&[(path, "x")], 0o644), check), State::Missing, "{path}");
            assert_eq!(state(&found(&[(path, "x")], 0o600), check), State::Ok, "{path}");
            assert_eq!(state(&found(&[], 0o600), check), State::Ok, "{path}");
        }
    }

    #[test]
    fn the_coordinators_certificates_are_looked_at_where_it_runs() {
        let (_folder, host) = fixture(&[("/var/lib/muster/x", "")]);
        assert!(Identity::look(&host, &args(), NOW_MS).certificates.is_empty());
        let pki = host.path("/var/lib/muster/pki");
        muster_coordinator::identity::Authority::create(&pki, &[]).unwrap();
        let at = |now_ms| Identity::look(&host, &args(), now_ms).findings();
        let now_ms = crate::output::now_ms();
        let checks = ["identity.coordinator_ca", "identity.coordinator_server", "identity.coordinator_admin"];
        for check in checks.iter().chain(&["identity.ca_key"]) {
            assert_eq!(state(&at(now_ms), check), State::Ok, "{check}");
        }
        let in_a_year = at(now_ms + 366 * DAY_MS);
        assert_eq!(checks.map(|check| state(&in_a_year, check)), [State::Ok, State::Missing, State::Ok]);
        assert_eq!(state(&at(now_ms + 350 * DAY_MS), checks[1]), State::Warn);
    }
}
