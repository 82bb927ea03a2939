//! What hosts remember for us, sealed: a host tells a leader what an earlier one
//! had committed, and that stops the whole fleet if it contradicts the store. So
//! it counts only with the seal that a coordinator of this fleet put on it.
//!
//! HMAC-SHA-256 (RFC 2104) under a key that follows from the CA's, which every
//! coordinator of the fleet has and no host.

use muster_core::timeline::Seen;
use sha2::{Digest as _, Sha256};

const BLOCK_BYTES: usize = 64;

/// Seals and checks.
#[derive(Clone)]
pub struct Seal {
    key: [u8; 32],
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seal").finish_non_exhaustive()
    }
}

impl Seal {
    /// From a secret that all coordinators of a fleet share.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let own = Sha256::digest(secret);
        Self { key: hmac(&own.into(), b"muster: what hosts have seen") }
    }

    /// The seal on this.
    #[must_use]
    pub fn of(&self, seen: Seen) -> [u8; 32] {
        let mut text = [0; 16];
        text[..8].copy_from_slice(&seen.term.0.to_be_bytes());
        text[8..].copy_from_slice(&seen.commit.to_be_bytes());
        hmac(&self.key, &text)
    }

    /// What was sealed, or nothing at all: a host that never was told has no seal either.
    #[must_use]
    pub fn checked(&self, seen: Seen, seal: &[u8]) -> Seen {
        // Digests of both are compared: their timing says nothing of the right one.
        if Sha256::digest(self.of(seen)) == Sha256::digest(seal) { seen } else { Seen::default() }
    }
}

fn hmac(key: &[u8; 32], text: &[u8]) -> [u8; 32] {
    let pad = |with: u8| {
        let mut block = [with; BLOCK_BYTES];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use muster_core::ids::Term;

    use super::*;

    #[test]
    fn only_what_this_fleet_sealed_counts() {
        let (ours, theirs) = (Seal::new(b"ours"), Seal::new(b"theirs"));
        let seen = Seen { term: Term(7), commit: 812 };
        assert_eq!(ours.checked(seen, &ours.of(seen)), seen);
        let more = Seen { commit: 813, ..seen };
        for (claim, seal) in [(more, ours.of(seen).to_vec()), (seen, theirs.of(seen).to_vec()), (seen, Vec::new())] {
            assert_eq!(ours.checked(claim, &seal), Seen::default());
        }
    }

    #[test]
    fn it_is_hmac_as_it_is_published() {
        // RFC 4231, test case 1, with its key of 20 bytes filled up by zeros as HMAC does.
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let expected = "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7";
        assert_eq!(crate::hex::encode(&hmac(&key, b"Hi There")), expected);
    }
}
