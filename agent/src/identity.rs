//! Who this node is: a key made here once, a certificate fetched with a join
//! token and renewed in place at two thirds of its life.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use muster_proto::v1;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;

use crate::{
    connection::leader_in,
    hex,
    state::{StateError, write_durably},
    tls,
};

/// The node's key and its present certificate.
#[derive(Debug)]
pub struct Identity {
    /// ECDSA P-256, made on this host and never sent.
    pub key: KeyPair,
    /// What the fleet's CA says of it.
    pub certificate: Certificate,
}

/// A certificate as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The node that it names.
    pub node: u64,
    /// DER, leaf first.
    #[serde(with = "der_list")]
    pub chain: Vec<Vec<u8>>,
    /// The fleet's CA, DER.
    #[serde(with = "der")]
    pub ca: Vec<u8>,
    /// When it was received, Unix milliseconds.
    pub received_ms: u64,
    /// When it ends, Unix milliseconds.
    pub not_after_ms: u64,
    /// Every coordinator's HOST:PORT, if the fleet's operator set them.
    #[serde(default)]
    pub coordinators: Vec<String>,
}

/// Joining or renewing failed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The token is no token.
    #[error("the join token cannot be read; `muster token create` prints one, it begins with `muster1.`")]
    BadToken,
    /// There is no certificate and no token.
    #[error("{} has no certificate yet: give a join token (`muster token create` on the coordinator)", .0.display())]
    NotJoined(PathBuf),
    /// The key file is damaged.
    #[error("the key in {} cannot be used", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The certificate file is damaged.
    #[error("the certificate in {} cannot be read", path.display())]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The key cannot sign the request.
    #[error("cannot make the certificate request")]
    Request(#[source] rcgen::Error),
    /// Nobody answers.
    #[error("cannot reach the coordinator at {address}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It answered no.
    #[error("the coordinator refused: {}", .0.message())]
    Refused(tonic::Status),
    /// Its answer makes no sense.
    #[error("the coordinator answered with {0}")]
    BadAnswer(&'static str),
}

impl IdentityError {
    /// Trying again later may help.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused(status) => matches!(
                status.code(),
                tonic::Code::Unavailable
                    | tonic::Code::Unknown
                    | tonic::Code::Cancelled
                    | tonic::Code::DeadlineExceeded
            ),
            Self::BadToken
            | Self::NotJoined(_)
            | Self::BadKey { .. }
            | Self::BadCertificate { .. }
            | Self::Unreadable { .. }
            | Self::State(_)
            | Self::Request(_)
            | Self::BadAnswer(_) => false,
        }
    }
}

impl Identity {
    /// The stored identity, if this folder has joined.
    ///
    /// # Errors
    /// It is there and cannot be used.
    pub fn load(state: &Path) -> Result<Option<Self>, IdentityError> {
        let Some(certificate) = Certificate::read(state)? else { return Ok(None) };
        Ok(Some(Self { key: load_or_make_key(state)?, certificate }))
    }

    /// Exchanges a token for a certificate and stores it.
    ///
    /// The key is stored first: a lost answer is repeated with the same key,
    /// which the coordinator accepts as the same request.
    ///
    /// # Errors
    /// The token, the network or the coordinator said no.
    pub async fn join(state: &Path, addresses: &[String], token: &str, name: &str) -> Result<Self, IdentityError> {
        let fingerprint = token_fingerprint(token).ok_or(IdentityError::BadToken)?;
        let key = load_or_make_key(state)?;
        let request =
            v1::JoinRequest { token: token.to_owned(), csr: request_of(&key)?.into(), node_name: name.into() };
        let answer = ask_any(addresses, fingerprint, &request).await?;
        let certificate = Certificate::checked(answer, None)?;
        certificate.store(state)?;
        Ok(Self { key, certificate })
    }

    /// Fetches a new certificate for the same key and stores it.
    ///
    /// # Errors
    /// The coordinator said no, or the disk did.
    pub fn renew(
        &self,
        state: PathBuf,
        channel: Channel,
    ) -> impl Future<Output = Result<Certificate, IdentityError>> + use<> {
        let (request, old) = (request_of(&self.key), self.certificate.clone());
        async move {
            let request = v1::RenewRequest { csr: request?.into() };
            let answer = v1::agent_client::AgentClient::new(channel)
                .renew(request)
                .await
                .map_err(IdentityError::Refused)?
                .into_inner();
            let certificate = Certificate::checked(answer, Some(&old))?;
            certificate.store(&state)?;
            Ok(certificate)
        }
    }
}

impl Certificate {
    /// The stored certificate alone, if this folder has joined.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(state: &Path) -> Result<Option<Self>, IdentityError> {
        let path = state.join(CERTIFICATE_FILE);
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|source| IdentityError::BadCertificate { path, source })
    }

    /// How long until it should be renewed: two thirds of its life, less up to
    /// a tenth, so that a fleet that joined at once does not renew at once.
    #[must_use]
    pub fn renew_in(&self) -> Duration {
        let life = self.not_after_ms.saturating_sub(self.received_ms);
        let jitter = crate::jitter::below(life / 10);
        let at = self.received_ms + (life / 3 * 2).saturating_sub(jitter);
        Duration::from_millis(at.saturating_sub(unix_ms()))
    }

    /// Nobody accepts it any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.not_after_ms <= unix_ms()
    }

    fn checked(answer: v1::JoinResponse, old: Option<&Self>) -> Result<Self, IdentityError> {
        if answer.certificate_chain.is_empty() || answer.ca.is_empty() {
            return Err(IdentityError::BadAnswer("no certificate"));
        }
        if old.is_some_and(|old| old.node != answer.node) {
            return Err(IdentityError::BadAnswer("the certificate of another node"));
        }
        Ok(Self {
            node: answer.node,
            chain: answer.certificate_chain.iter().map(|der| der.to_vec()).collect(),
            ca: answer.ca.to_vec(),
            received_ms: unix_ms(),
            not_after_ms: answer.not_after_ms,
            coordinators: answer.coordinators,
        })
    }

    fn store(&self, state: &Path) -> Result<(), IdentityError> {
        let text = serde_json::to_vec_pretty(self).expect("plain fields are JSON");
        Ok(write_durably(&state.join(CERTIFICATE_FILE), &text, 0o600)?)
    }
}

/// Holds the certificate, below the agent's folder.
pub const CERTIFICATE_FILE: &str = "certificate.json";
/// Holds the key, below the agent's folder.
pub const KEY_FILE: &str = "key.pem";

fn load_or_make_key(state: &Path) -> Result<KeyPair, IdentityError> {
    let path = state.join(KEY_FILE);
    if let Some(text) = read_if_there(&path)? {
        return KeyPair::from_pem(&String::from_utf8_lossy(&text))
            .map_err(|source| IdentityError::BadKey { path, source });
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(IdentityError::Request)?;
    write_durably(&path, key.serialize_pem().as_bytes(), 0o600)?;
    Ok(key)
}

fn request_of(key: &KeyPair) -> Result<Vec<u8>, IdentityError> {
    // The coordinator names the node itself; a subject would only be ignored.
    let params = CertificateParams::new(Vec::<String>::new()).map_err(IdentityError::Request)?;
    let request = params.serialize_request(key).map_err(IdentityError::Request)?;
    Ok(request.der().to_vec())
}

/// Asks each coordinator in turn, and the one that leads as soon as a standby names it.
async fn ask_any(
    addresses: &[String],
    fingerprint: [u8; 32],
    request: &v1::JoinRequest,
) -> Result<v1::JoinResponse, IdentityError> {
    let mut last = IdentityError::BadAnswer("nothing: no address was given");
    let mut left: VecDeque<String> = addresses.iter().cloned().collect();
    let mut named = None;
    while let Some(address) = left.pop_front() {
        let channel = match tls::connect(&address, tls::config_pinned(fingerprint)).await {
            Ok(channel) => channel,
            Err(source) => {
                last = IdentityError::Unreachable { address, source };
                continue;
            }
        };
        match v1::enrollment_client::EnrollmentClient::new(channel).join(request.clone()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                if let Some(leader) = leader_in(&status).filter(|leader| named.as_ref() != Some(leader)) {
                    left.push_front(leader.clone());
                    named = Some(leader);
                }
                last = IdentityError::Refused(status);
            }
            Err(status) => return Err(IdentityError::Refused(status)),
        }
    }
    Err(last)
}

/// The part of a token that the agent itself needs.
#[derive(Deserialize)]
struct TokenText {
    ca: String,
    #[serde(default)]
    coordinators: Vec<String>,
}

fn token_text(token: &str) -> Option<TokenText> {
    let body = token.trim().strip_prefix("muster1.")?;
    let parse = |bytes: Vec<u8>| serde_json::from_slice::<TokenText>(&bytes).ok();
    hex::decode(body).and_then(parse).or_else(|| hex::decode_base64url(body).and_then(parse))
}

/// SHA-256 of the fleet's certificate that a token names; none: this is no token.
#[must_use]
pub fn token_fingerprint(token: &str) -> Option<[u8; 32]> {
    hex::decode(&token_text(token)?.ca)?.try_into().ok()
}

/// The coordinators that a token names.
#[must_use]
pub fn token_coordinators(token: &str) -> Vec<String> {
    token_text(token).map(|text| text.coordinators).unwrap_or_default()
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::Unreadable { path: path.to_owned(), source }),
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

mod der {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::hex;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("no hexadecimal text"))
    }
}

mod der_list {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use crate::hex;

    pub fn serialize<S: Serializer>(list: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(|bytes| hex::encode(bytes)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        Vec::<String>::deserialize(deserializer)?
            .iter()
            .map(|text| hex::decode(text).ok_or_else(|| D::Error::custom("no hexadecimal text")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_carries_the_fingerprint_in_either_coding() {
        let json = format!(r#"{{"id":"00","secret":"11","ca":"{}","pool":"p","host":null}}"#, "ab".repeat(32));
        let token = format!("muster1.{}", hex::encode(json.as_bytes()));
        assert_eq!(token_fingerprint(&token), Some([0xab; 32]));
        assert_eq!(token_fingerprint("muster1.zz"), None);
        assert_eq!(token_fingerprint("other"), None);
    }

    #[test]
    fn renewal_falls_in_the_second_third_of_life() {
        let now = unix_ms();
        let certificate =
            Certificate { received_ms: now, not_after_ms: now + 24 * 3_600_000, ..Certificate::default() };
        let hours = certificate.renew_in().as_secs_f64() / 3_600.0;
        assert!((13.5..=16.0).contains(&hours), "{hours}");
    }
}
