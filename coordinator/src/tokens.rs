//! Join tokens: one-time, bound to the first key that uses them.
//!
//! The text carries the CA's fingerprint, so that a host knows the fleet before
//! it says anything. The store has only the secret's SHA-256.

use std::sync::Arc;

use muster_core::{
    ids::{HostRequestId, PoolName},
    time::{Millis, Timestamp},
};
use serde::{Deserialize, Serialize};

use crate::{
    hex,
    identity::sha256,
    store::{self, Reader, TokenRecord},
};

const PREFIX: &str = "muster1.";
const TEXT_MAX: usize = 4_096;

/// Why a token opens nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not read.
    #[error("this is no join token: it begins with `muster1.` and is used whole")]
    Malformed,
    /// Its public part is not in the store.
    #[error("this join token is not known here; make one with `muster token create`")]
    Unknown,
    /// Its secret is wrong.
    #[error("this join token is not valid: its secret does not match")]
    WrongSecret,
    /// Too late.
    #[error("this join token ran out {} ago; make another with `muster token create`", .0)]
    Expired(Millis),
    /// Another key came first.
    #[error("this join token was used by another host already; make another with `muster token create`")]
    Used,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What a token's text holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenText {
    /// Public part, hexadecimal.
    pub id: String,
    /// Secret part, 32 bytes in hexadecimal.
    pub secret: String,
    /// SHA-256 of the CA's certificate, hexadecimal.
    pub ca: String,
    /// Pool of the node.
    pub pool: String,
    /// The provider's request that it was made for.
    pub host: Option<u64>,
    /// Where the coordinators are dialled; empty: the host is told otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub coordinators: Vec<String>,
}

impl TokenText {
    /// The text that a person copies.
    #[must_use]
    pub fn encode(&self) -> String {
        let json = serde_json::to_string(self).expect("a table of plain strings");
        format!("{PREFIX}{}", hex::encode(json.as_bytes()))
    }

    /// Reads the text.
    #[must_use]
    pub fn decode(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > TEXT_MAX {
            return None;
        }
        serde_json::from_slice(&hex::decode(text.strip_prefix(PREFIX)?)?).ok()
    }
}

/// Makes and checks tokens.
#[derive(Clone)]
pub struct Tokens {
    reader: Arc<dyn Reader>,
    ca: [u8; 32],
    coordinators: Arc<[String]>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// Of the fleet with this CA and these coordinators.
    #[must_use]
    pub fn new(reader: Arc<dyn Reader>, ca: [u8; 32], coordinators: &[String]) -> Self {
        Self { reader, ca, coordinators: coordinators.into() }
    }

    /// Where hosts dial, if the operator set it.
    #[must_use]
    pub fn coordinators(&self) -> &[String] {
        &self.coordinators
    }

    /// A new token's text. Blocks.
    ///
    /// # Errors
    /// The store failed.
    pub fn create(&self, pool: &PoolName, host: Option<HostRequestId>, expires: Timestamp) -> Result<String, Error> {
        let (id, secret) = (random::<16>(), random::<32>());
        let record = TokenRecord { id, secret: sha256(&secret), pool: pool.clone(), host, expires, used_by: None };
        self.reader.add_token(&record)?;
        let text = TokenText {
            id: hex::encode(&id),
            secret: hex::encode(&secret),
            ca: hex::encode(&self.ca),
            pool: pool.0.clone(),
            host: host.map(|host| host.0),
            coordinators: self.coordinators.to_vec(),
        };
        Ok(text.encode())
    }

    /// Uses a token for a key: the first key that comes has it for good. Blocks.
    ///
    /// # Errors
    /// It opens nothing, for the reason given.
    pub fn redeem(&self, text: &str, key: [u8; 32], now: Timestamp) -> Result<TokenRecord, Error> {
        let text = TokenText::decode(text).ok_or(Error::Malformed)?;
        let id = hex::decode_array(&text.id).ok_or(Error::Malformed)?;
        let secret = hex::decode(&text.secret).ok_or(Error::Malformed)?;
        let record = self.reader.token(id)?.ok_or(Error::Unknown)?;
        // Digests of what was sent are compared: their timing says nothing of the secret.
        if sha256(&secret) != record.secret {
            return Err(Error::WrongSecret);
        }
        if now >= record.expires {
            return Err(Error::Expired(now.since(record.expires)));
        }
        match self.reader.bind_token(id, key)? {
            Some(first) if first == key => Ok(record),
            Some(_) => Err(Error::Used),
            None => Err(Error::Unknown),
        }
    }
}

/// Random bytes.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the system has randomness once it has booted");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::EmbeddedStore;

    const NOW: Timestamp = Timestamp(1_000);

    #[test]
    fn each_refusal_has_a_sentence_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::create(&folder.path().join("fleet.db")).unwrap();
        let tokens = Tokens::new(Arc::new(store.reader().unwrap()), [9; 32], &["a:1".to_owned()]);
        let pool = PoolName("local".into());
        let text = tokens.create(&pool, Some(HostRequestId(7)), Timestamp(2_000)).unwrap();

        assert!(matches!(tokens.redeem("muster1.zz", [1; 32], NOW), Err(Error::Malformed)));
        let mut other = TokenText::decode(&text).unwrap();
        assert_eq!(other.coordinators, ["a:1"]);
        other.secret = hex::encode(&[0; 32]);
        assert!(matches!(tokens.redeem(&other.encode(), [1; 32], NOW), Err(Error::WrongSecret)));
        other.id = hex::encode(&[0; 16]);
        assert!(matches!(tokens.redeem(&other.encode(), [1; 32], NOW), Err(Error::Unknown)));
        assert!(matches!(tokens.redeem(&text, [1; 32], Timestamp(2_000)), Err(Error::Expired(_))));

        let record = tokens.redeem(&text, [1; 32], NOW).unwrap();
        assert_eq!((record.pool, record.host), (pool, Some(HostRequestId(7))));
        assert!(tokens.redeem(&text, [1; 32], NOW).is_ok(), "a lost answer costs nothing");
        assert!(matches!(tokens.redeem(&text, [2; 32], NOW), Err(Error::Used)));
    }
}
