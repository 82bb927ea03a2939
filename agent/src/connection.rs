//! One stream to the coordinator: connect to any of its addresses, say hello,
//! be welcomed. When it breaks the agent waits a random part of a growing
//! span, so that a fleet does not come back in step.

use std::{sync::Arc, time::Duration};

use backon::BackoffBuilder as _;
use muster_core::limits;
use muster_proto::v1;
use rustls::ClientConfig;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};

use crate::{jitter, tls};

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers there, or it is not our coordinator.
    #[error("cannot reach the coordinator at {address}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It refused the stream.
    #[error("the coordinator at {address} refused: {}", status.message())]
    Refused {
        /// Where.
        address: String,
        /// Its answer.
        status: Box<Status>,
    },
    /// It took the stream and said nothing.
    #[error("the coordinator at {address} does not answer")]
    Silent {
        /// Where.
        address: String,
    },
    /// Its first message was no welcome.
    #[error("the coordinator at {address} did not begin with a welcome")]
    NoWelcome {
        /// Where.
        address: String,
    },
}

/// A stream that was welcomed.
pub struct Session {
    /// To the coordinator, in order; bounded.
    pub outbound: mpsc::Sender<v1::AgentMessage>,
    /// From the coordinator.
    pub inbound: Streaming<v1::CoordinatorMessage>,
    /// For streams of their own: logs, blobs, renewal.
    pub channel: Channel,
    /// What it began with.
    pub welcome: v1::Welcome,
    /// Which address answered.
    pub address: String,
}

/// Opens a stream to one address and says hello.
///
/// # Errors
/// There is nobody, or it is not ours, or it refuses.
pub async fn open(address: String, config: Arc<ClientConfig>, hello: v1::Hello) -> Result<Session, ConnectError> {
    let channel = match timeout(OPEN_TIMEOUT, tls::connect(&address, config)).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(source)) => return Err(ConnectError::Unreachable { address, source }),
        Err(_) => return Err(ConnectError::Silent { address }),
    };
    let (outbound, messages) = mpsc::channel(OUTBOUND_MAX);
    let hello = v1::AgentMessage { message: Some(v1::agent_message::Message::Hello(hello)) };
    outbound.try_send(hello).expect("the channel is new and has room");
    let mut client = v1::agent_client::AgentClient::new(channel.clone())
        .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
    let opened = async {
        let mut inbound = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let first = inbound.message().await?;
        Ok::<_, Status>((inbound, first))
    };
    match timeout(OPEN_TIMEOUT, opened).await {
        Ok(Ok((inbound, Some(v1::CoordinatorMessage { message: Some(first) })))) => match first {
            v1::coordinator_message::Message::Welcome(welcome) => {
                Ok(Session { outbound, inbound, channel, welcome, address })
            }
            _ => Err(ConnectError::NoWelcome { address }),
        },
        Ok(Ok(_)) => Err(ConnectError::NoWelcome { address }),
        Ok(Err(status)) => Err(ConnectError::Refused { address, status: Box::new(status) }),
        Err(_) => Err(ConnectError::Silent { address }),
    }
}

/// Messages that wait for the network; beyond them reports wait with the host's rules.
const OUTBOUND_MAX: usize = 64;
const OPEN_TIMEOUT: Duration = Duration::from_millis(limits::HANDSHAKE_TIMEOUT.0);

/// Where the coordinators are dialled, and which comes next: the one that leads where a standby names it,
/// else all in turn. Between two rounds there is a pause.
#[derive(Debug)]
pub struct Addresses {
    all: Vec<String>,
    next: usize,
    /// Named by a standby, for the next try alone.
    leader: Option<String>,
    /// Failed in this round.
    tried: Vec<String>,
    /// A standby answered in this round: a takeover is under way.
    standby: bool,
}

/// The settings' addresses first, then those that the certificate came with and the settings do not name.
#[must_use]
pub fn all_addresses(settings: &[String], certificate: &[String]) -> Vec<String> {
    let more = certificate.iter().filter(|address| !settings.contains(address));
    settings.iter().chain(more).cloned().collect()
}

/// When the next try is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// There is another address to try.
    AtOnce,
    /// All were tried, and a standby is there: somebody leads soon.
    Soon,
    /// All were tried in vain.
    Later,
}

impl Addresses {
    /// In the order of preference; not empty.
    #[must_use]
    pub const fn new(all: Vec<String>) -> Self {
        Self { all, next: 0, leader: None, tried: Vec::new(), standby: false }
    }

    /// Where to dial now.
    #[must_use]
    pub fn dial(&mut self) -> String {
        self.leader.take().unwrap_or_else(|| self.all[self.next % self.all.len()].clone())
    }

    /// That try failed.
    pub fn failed(&mut self, error: &ConnectError) -> Again {
        let (address, named) = match error {
            ConnectError::Refused { address, status } => {
                self.standby |= status.code() == tonic::Code::Unavailable;
                (address, leader_in(status))
            }
            ConnectError::Unreachable { address, .. }
            | ConnectError::Silent { address }
            | ConnectError::NoWelcome { address } => (address, None),
        };
        self.tried.push(address.clone());
        self.leader = named.filter(|leader| !self.tried.contains(leader));
        let untried =
            (1..self.all.len()).find(|step| !self.tried.contains(&self.all[(self.next + step) % self.all.len()]));
        match (&self.leader, untried) {
            (Some(_), _) => Again::AtOnce,
            (None, Some(step)) => {
                self.next += step;
                Again::AtOnce
            }
            (None, None) => {
                self.next += 1;
                self.tried.clear();
                if std::mem::take(&mut self.standby) { Again::Soon } else { Again::Later }
            }
        }
    }

    /// A stream stands.
    pub fn worked(&mut self, address: &str) {
        self.tried.clear();
        self.standby = false;
        // Where it broke off is where it is tried first.
        if let Some(at) = self.all.iter().position(|known| known == address) {
            self.next = at;
        }
    }
}

/// The address that a standby's refusal names. What dials it checks its certificate, as with any other.
#[must_use]
pub fn leader_in(status: &Status) -> Option<String> {
    const ADDRESS_LEN_MAX: usize = 300;
    let text = status.metadata().get(muster_proto::LEADER_METADATA)?.to_str().ok()?;
    let (host, port) = text.rsplit_once(':')?;
    let reads = !host.is_empty() && port.parse::<u16>().is_ok() && text.len() <= ADDRESS_LEN_MAX;
    (reads && status.code() == tonic::Code::Unavailable).then(|| text.to_owned())
}

/// When to try next: full jitter below a span that doubles up to the server's hint.
#[derive(Debug)]
pub struct Reconnect {
    spread_max: Duration,
    spans: backon::ExponentialBackoff,
}

impl Reconnect {
    /// Before the first hint.
    #[must_use]
    pub fn new() -> Self {
        Self::within(SPREAD_DEFAULT)
    }

    /// With the server's hint.
    #[must_use]
    pub fn within(spread_max: Duration) -> Self {
        let spread_max = spread_max.clamp(SPREAD_MIN, SPREAD_MAX);
        let spans = backon::ExponentialBuilder::default()
            .with_min_delay(SPREAD_MIN.max(spread_max / 8))
            .with_max_delay(spread_max)
            .without_max_times()
            .build();
        Self { spread_max, spans }
    }

    /// How long to wait before the next try.
    pub fn next_wait(&mut self) -> Duration {
        let span = self.spans.next().unwrap_or(self.spread_max);
        Duration::from_millis(jitter::below(span.as_millis() as u64 + 1))
    }

    /// How long to wait for a takeover that is under way: a part of a span that does not grow.
    #[must_use]
    pub fn short_wait(&self) -> Duration {
        Duration::from_millis(jitter::below(SOON_MAX.as_millis() as u64 + 1))
    }

    /// The stream stands: the next break begins with a short span again.
    pub fn reset(&mut self) {
        *self = Self::within(self.spread_max);
    }
}

impl Default for Reconnect {
    fn default() -> Self {
        Self::new()
    }
}

const SOON_MAX: Duration = Duration::from_secs(1);
const SPREAD_MIN: Duration = Duration::from_millis(100);
const SPREAD_DEFAULT: Duration = Duration::from_secs(3);
const SPREAD_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(address: &str, leader: Option<&str>) -> ConnectError {
        let mut status = Status::unavailable("a standby");
        if let Some(leader) = leader {
            status.metadata_mut().insert(muster_proto::LEADER_METADATA, leader.parse().unwrap());
        }
        ConnectError::Refused { address: address.into(), status: Box::new(status) }
    }

    #[test]
    fn a_named_leader_is_tried_next_and_all_others_once_before_a_pause() {
        let mut addresses = Addresses::new(vec!["a:1".into(), "b:1".into(), "c:1".into()]);
        let silent = |address: &str| ConnectError::Silent { address: address.into() };
        assert_eq!(addresses.dial(), "a:1");
        assert_eq!(addresses.failed(&refused("a:1", Some("c:1"))), Again::AtOnce);
        assert_eq!(addresses.dial(), "c:1");
        assert_eq!(addresses.failed(&silent("c:1")), Again::AtOnce);
        assert_eq!(addresses.dial(), "b:1");
        assert_eq!(addresses.failed(&refused("b:1", Some("c:1"))), Again::Soon, "the one that it names was tried");
        for _ in 0..2 {
            let address = addresses.dial();
            assert_eq!(addresses.failed(&silent(&address)), Again::AtOnce);
        }
        let address = addresses.dial();
        assert_eq!(addresses.failed(&silent(&address)), Again::Later, "nobody is there");
        assert_eq!(addresses.failed(&refused("a:1", Some("nonsense"))), Again::AtOnce);

        let mut alone = Addresses::new(vec!["a:1".into()]);
        assert_eq!(alone.failed(&silent("a:1")), Again::Later);
        assert_eq!(alone.failed(&refused("a:1", Some("a:1"))), Again::Soon);
    }

    #[test]
    fn waits_stay_within_the_servers_hint_for_ever() {
        let mut reconnect = Reconnect::within(Duration::from_secs(2));
        let waits: Vec<_> = (0..1_000).map(|_| reconnect.next_wait()).collect();
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(2)));
        assert!(waits.iter().any(|wait| *wait > Duration::from_millis(500)));
        reconnect.reset();
        assert!(reconnect.next_wait() <= Duration::from_millis(250));
    }
}
