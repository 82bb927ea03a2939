//! What the coordinator and the program that makes local hosts say to each
//! other: JSON lines on a Unix socket that the program serves.
//!
//! ```text
//! coordinator: {"op":"create","host":7,…}   {"op":"delete","host":7}   {"op":"list"}
//! program:     {"event":"created","host":7}   {"event":"failed","host":7,"reason":"…"}
//!              {"event":"gone","host":7}   {"event":"delete_failed","host":7,"reason":"…"}
//!              {"event":"hosts","hosts":[7,8]}
//! ```
//! Every request may come twice.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// From the coordinator to the program that makes hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Make a host. Idempotent by `host`.
    Create(Create),
    /// End a host and remove all of it. Idempotent by `host`.
    Delete {
        /// Which.
        host: u64,
    },
    /// Say which hosts there are.
    List,
}

/// A host to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// The stored request.
    pub host: u64,
    /// Its pool.
    pub pool: String,
    /// Its node's name.
    pub name: String,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes for working folders.
    pub disk_bytes: u64,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// One-time, bound to pool and request.
    pub token: String,
    /// Where to dial.
    pub coordinator: String,
}

/// From the program that makes hosts to the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Told {
    /// A host is there, or on its way.
    Created {
        /// Which.
        host: u64,
    },
    /// A host could not be made.
    Failed {
        /// Which.
        host: u64,
        /// The sentence.
        reason: String,
    },
    /// A host and all of it is gone.
    Gone {
        /// Which.
        host: u64,
    },
    /// A host could not be ended.
    DeleteFailed {
        /// Which.
        host: u64,
        /// The sentence.
        reason: String,
    },
    /// Answer to `list`.
    Hosts {
        /// All that there are.
        hosts: Vec<u64>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_they_are_documented() {
        let line = |op: &Op| serde_json::to_string(op).unwrap();
        assert_eq!(line(&Op::List), r#"{"op":"list"}"#);
        assert_eq!(line(&Op::Delete { host: 7 }), r#"{"op":"delete","host":7}"#);
        let create = r#"{"op":"create","host":7,"pool":"local","name":"local-7","cpu_milli":500,"memory_bytes":1,
            "disk_bytes":2,"labels":{},"token":"t","coordinator":"127.0.0.1:1"}"#;
        let Op::Create(new) = serde_json::from_str(create).unwrap() else { panic!("{create}") };
        assert_eq!((new.host, new.name.as_str(), new.cpu_milli), (7, "local-7", 500));
        let told = |text: &str| serde_json::from_str::<Told>(text).unwrap();
        assert_eq!(told(r#"{"event":"created","host":7}"#), Told::Created { host: 7 });
        assert_eq!(told(r#"{"event":"hosts","hosts":[7,8]}"#), Told::Hosts { hosts: vec![7, 8] });
        let failed = Told::DeleteFailed { host: 7, reason: "busy".into() };
        assert_eq!(told(r#"{"event":"delete_failed","host":7,"reason":"busy"}"#), failed);
    }
}
