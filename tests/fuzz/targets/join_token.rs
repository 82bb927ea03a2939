//! Join tokens, as the coordinator and as the agent read them: both must see the
//! same fleet in what both take.

use muster_agent::identity::{token_coordinators, token_fingerprint};
use muster_coordinator::tokens::TokenText;

use crate::target::{Shape, Signs, Target};

pub(super) const TARGET: Target = Target {
    name: "join_token",
    shape: Shape::Text,
    // Pieces of the JSON within, in its own coding.
    words: &["muster1.", "7b", "7d", "22", "3a", "2c", "5b5d", "6e756c6c", "226361223a", "22706f6f6c223a", "+f", "é"],
    inputs_in_ci: 20_000,
    take,
    seeds,
};

fn take(input: &[u8], signs: &mut Signs) -> Result<(), String> {
    let Ok(text) = std::str::from_utf8(input) else { return Ok(()) };
    let token = TokenText::decode(text);
    let coordinators = token_coordinators(text);
    let fingerprint = token_fingerprint(text);
    signs.accepted = token.is_some();
    signs.note("fingerprint", if fingerprint.is_some() { "some" } else { "none" });
    signs.count("coordinators", coordinators.len());
    let Some(token) = token else { return Ok(()) };
    signs.note("token", if token.host.is_some() { "of a request" } else { "of a person" });
    if token.coordinators != coordinators {
        return Err("the agent dials others than the token names".into());
    }
    let again = token.encode();
    if TokenText::decode(&again).is_some_and(|again| again != token) {
        return Err("it reads differently again".into());
    }
    if token_fingerprint(&again) != fingerprint {
        return Err("the agent sees another fleet in the same token".into());
    }
    Ok(())
}

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let token = TokenText {
        id: "00112233445566778899aabbccddeeff".into(),
        secret: "ab".repeat(32),
        ca: "cd".repeat(32),
        pool: "local".into(),
        host: Some(7),
        coordinators: vec!["a.example:7400".into(), "b.example:7400".into()],
    };
    let plain = TokenText { host: None, coordinators: Vec::new(), ..token.clone() };
    // As one says it over the telephone: JSON in base64url, which agents read too.
    let short = "muster1.eyJjYSI6ImNkY2QiLCJjb29yZGluYXRvcnMiOlsiYToxIl19";
    vec![
        ("base64", short.as_bytes().to_vec()),
        ("of_a_person", plain.encode().into_bytes()),
        ("of_a_request", token.encode().into_bytes()),
    ]
}
