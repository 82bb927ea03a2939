//! This host's time of day against its coordinator's. Every answer over HTTP
//! carries the date of whoever answers: the health check, which anybody may ask,
//! is enough. Nothing is set, and no identity of this host is used.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::fmt::rfc2822;
use muster_agent::{chain, identity::Certificate, tls};
use tonic::codegen::{Service as _, http};

use super::{finding::Finding, host::Host};
use crate::args::Doctor;

/// Where the agent's unit is told its coordinator.
const AGENT_ENV: &str = "/etc/muster/agent.env";
/// A coordinator that is there answers sooner.
const PATIENCE: Duration = Duration::from_secs(5);
/// A date has whole seconds: in the middle it is off by at most this.
const DATE_MS: i64 = 500;
/// What leases allow for beside their share (core, `lease`): more than that surprises people who compare records.
const OFF_MAX_MS: i64 = 2_000;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drift {
    /// No coordinator is configured here.
    Alone,
    /// Without the fleet's CA nobody can be believed.
    NotJoined,
    /// It did not answer.
    Silent(String),
    /// This host's clock is so much ahead, give or take.
    Ahead {
        /// Negative: behind.
        ms: i64,
        give_or_take_ms: i64,
    },
}

impl Drift {
    /// Asks the coordinator, if there is one.
    pub fn look(host: &Host, args: &Doctor) -> Self {
        let configured = || {
            let text = host.text(AGENT_ENV)?;
            let line = text.lines().find_map(|line| line.trim().strip_prefix("MUSTER_COORDINATOR="))?;
            line.trim_matches('"').split(',').next().map(str::to_owned)
        };
        let Some(address) = args.coordinator.clone().or_else(configured) else { return Self::Alone };
        let Ok(Some(certificate)) = Certificate::read(&host.path(&args.agent_state)) else { return Self::NotJoined };
        match ask(&address, &certificate.ca) {
            Ok((ms, give_or_take_ms)) => Self::Ahead { ms, give_or_take_ms },
            Err(why) => Self::Silent(format!("{address}: {why}")),
        }
    }

    /// The rule.
    pub fn finding(&self) -> Finding {
        let (check, affects) = ("clock.drift", "certificates, times in the record");
        let told = |ms: i64, give_or_take: i64| {
            let word = if ms < 0 { "behind" } else { "ahead of" };
            format!("{:.1} s {word} the coordinator, within {:.1} s", seconds(ms.abs()), seconds(give_or_take))
        };
        match self {
            Self::Alone => Finding::unknown(
                check,
                affects,
                "no coordinator is configured here",
                "name it: --coordinator HOST:PORT",
            ),
            Self::NotJoined => {
                Finding::unknown(check, affects, "this host has not joined, or its folder is closed to you", "")
            }
            Self::Silent(why) => {
                Finding::unknown(check, affects, why.clone(), "is the coordinator up, and does this network reach it?")
            }
            // Only what is off for certain.
            Self::Ahead { ms, give_or_take_ms } if ms.abs() - give_or_take_ms > OFF_MAX_MS => {
                let mend = "run chronyd or systemd-timesyncd on both: timedatectl set-ntp true";
                Finding::warn(check, affects, told(*ms, *give_or_take_ms), mend)
            }
            Self::Ahead { ms, give_or_take_ms } => Finding::ok(check, affects, told(*ms, *give_or_take_ms)),
        }
    }
}

fn seconds(ms: i64) -> f64 {
    Duration::from_millis(ms.unsigned_abs()).as_secs_f64()
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// How far ahead we are, and how sure that is.
fn ask(address: &str, ca: &[u8]) -> Result<(i64, i64), String> {
    let config = tls::config_of_authority(ca).map_err(|error| chain(&error))?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let asked = runtime.block_on(async {
        tokio::time::timeout(PATIENCE, async {
            let mut channel = tls::connect(address, config).await.map_err(|error| chain(&error))?;
            std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(|error| chain(&error))?;
            // An empty message with the five bytes before it that every message of gRPC has.
            let body = tonic::body::Body::new("\0".repeat(5));
            let request = http::Request::post("http://muster-coordinator/grpc.health.v1.Health/Check")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(body)
                .map_err(|error| error.to_string())?;
            let sent = now_ms();
            let answer = channel.call(request).await.map_err(|error| chain(&error))?;
            let heard = now_ms();
            let date = answer.headers().get("date").and_then(|date| date.to_str().ok()).map(str::to_owned);
            Ok::<_, String>((sent, heard, date))
        })
        .await
    });
    let (sent, heard, date): (i64, i64, Option<String>) =
        asked.map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))??;
    let date = date.ok_or("its answers carry no date")?;
    let theirs = rfc2822::parse(&date).map_err(|error| format!("its date {date:?} cannot be read: {error}"))?;
    Ok(offset(sent, heard, theirs.timestamp().as_millisecond()))
}

/// From when we asked and heard, and the second that they said.
const fn offset(sent: i64, heard: i64, theirs: i64) -> (i64, i64) {
    let half = (heard - sent) / 2;
    (sent + half - (theirs + DATE_MS), half + DATE_MS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::State;

    #[test]
    fn only_what_is_off_for_certain_is_a_warning() {
        let state = |ms| Drift::Ahead { ms, give_or_take_ms: 600 }.finding().state;
        assert_eq!((state(0), state(2_600), state(-2_600)), (State::Ok, State::Ok, State::Ok));
        assert_eq!((state(2_601), state(-2_601)), (State::Warn, State::Warn));
        assert!(Drift::Ahead { ms: -90_000, give_or_take_ms: 500 }.finding().seen.contains("90.0 s behind"));
    }

    #[test]
    fn the_way_there_and_back_makes_it_less_sure() {
        // They said second 10 while it was between 10.0 and 11.0 there; we asked at 10.4 and heard at 10.6.
        assert_eq!(offset(10_400, 10_600, 10_000), (0, 600));
        assert_eq!(offset(70_400, 70_600, 10_000), (60_000, 600));
    }
}
