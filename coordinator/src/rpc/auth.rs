//! Who may call what: one table, from an RPC's path to what it needs.
//!
//! Without a certificate only the health check and Join are open. What is not
//! in the table is closed, so a new RPC needs a line here.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{identity::Caller, person::Role, shared::Members};

/// What a call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Open,
    /// The certificate of a node that is known and not removed.
    Node,
    /// A person with this role or a higher one.
    Person(Role),
}

/// A path that ends in `/` stands for all below it.
const TABLE: [(&str, Need); 40] = [
    ("/grpc.health.v1.Health/", Need::Open),
    ("/grpc.reflection.v1.ServerReflection/", Need::Person(Role::Read)),
    ("/grpc.reflection.v1alpha.ServerReflection/", Need::Person(Role::Read)),
    ("/muster.v1.Enrollment/Join", Need::Open),
    ("/muster.v1.Agent/Session", Need::Node),
    ("/muster.v1.Agent/Renew", Need::Node),
    ("/muster.v1.Agent/UploadLogs", Need::Node),
    ("/muster.v1.Agent/FetchBlob", Need::Node),
    ("/muster.v1.Agent/StoreBlob", Need::Node),
    ("/muster.v1.Jobs/Submit", Need::Person(Role::Submit)),
    ("/muster.v1.Jobs/List", Need::Person(Role::Read)),
    ("/muster.v1.Jobs/Inspect", Need::Person(Role::Read)),
    ("/muster.v1.Jobs/ListTasks", Need::Person(Role::Read)),
    ("/muster.v1.Jobs/Cancel", Need::Person(Role::Submit)),
    ("/muster.v1.Jobs/Retry", Need::Person(Role::Submit)),
    ("/muster.v1.Jobs/Watch", Need::Person(Role::Read)),
    ("/muster.v1.Jobs/Logs", Need::Person(Role::Read)),
    ("/muster.v1.Jobs/StoreBlob", Need::Person(Role::Submit)),
    ("/muster.v1.Jobs/FetchBlob", Need::Person(Role::Read)),
    ("/muster.v1.Nodes/List", Need::Person(Role::Read)),
    ("/muster.v1.Nodes/Inspect", Need::Person(Role::Read)),
    ("/muster.v1.Nodes/Cordon", Need::Person(Role::Operate)),
    ("/muster.v1.Nodes/Uncordon", Need::Person(Role::Operate)),
    ("/muster.v1.Nodes/Drain", Need::Person(Role::Operate)),
    ("/muster.v1.Nodes/Resume", Need::Person(Role::Operate)),
    ("/muster.v1.Nodes/ListRolling", Need::Person(Role::Read)),
    ("/muster.v1.Nodes/CancelRolling", Need::Person(Role::Operate)),
    ("/muster.v1.Nodes/Remove", Need::Person(Role::Admin)),
    ("/muster.v1.Pools/List", Need::Person(Role::Read)),
    ("/muster.v1.Pools/Set", Need::Person(Role::Admin)),
    ("/muster.v1.Pools/Pause", Need::Person(Role::Operate)),
    ("/muster.v1.Pools/Resume", Need::Person(Role::Operate)),
    ("/muster.v1.Pools/Scale", Need::Person(Role::Operate)),
    ("/muster.v1.Pools/Delete", Need::Person(Role::Admin)),
    ("/muster.v1.Pools/History", Need::Person(Role::Read)),
    ("/muster.v1.Fleet/Status", Need::Person(Role::Read)),
    ("/muster.v1.Fleet/Events", Need::Person(Role::Read)),
    ("/muster.v1.Fleet/AcceptLoss", Need::Person(Role::Admin)),
    ("/muster.v1.Fleet/ReleaseBrake", Need::Person(Role::Operate)),
    ("/muster.v1.Fleet/CreateToken", Need::Person(Role::Admin)),
];

/// What a path needs; none: there is no such RPC.
#[must_use]
pub fn need(path: &str) -> Option<Need> {
    TABLE.iter().find(|(known, _)| *known == path || (known.ends_with('/') && path.starts_with(known))).map(|row| row.1)
}

/// Decides one call.
///
/// # Errors
/// The sentence for the caller.
pub fn check(path: &str, caller: &Caller, members: &Members) -> Result<(), Status> {
    let Some(need) = need(path) else { return Err(Status::unimplemented(format!("there is no call {path}"))) };
    match (need, caller) {
        (Need::Open, _) => Ok(()),
        (Need::Person(least), Caller::Person { role, .. }) if *role >= least => Ok(()),
        (Need::Person(least), Caller::Person { name, role }) => Err(Status::permission_denied(format!(
            "{path} needs the role {}, and {name} has {}",
            least.name(),
            role.name()
        ))),
        (Need::Node, Caller::Node { node, key }) => match members.get(*node) {
            Some(member) if member.key == *key => Ok(()),
            Some(_) => {
                Err(Status::unauthenticated(format!("node {node} has another key now; enrol again with a token")))
            }
            None => {
                members.note_shown(*node);
                Err(Status::unauthenticated(format!("node {node} was removed; enrol again with a token")))
            }
        },
        (Need::Person(_), Caller::Node { node, .. }) => {
            Err(Status::permission_denied(format!("{path} is for people, and this is the certificate of node {node}")))
        }
        (Need::Node, Caller::Person { name, .. }) => {
            Err(Status::permission_denied(format!("{path} is for nodes, and this is the certificate of {name}")))
        }
        (_, Caller::Nobody) => Err(Status::unauthenticated(format!("{path} needs a client certificate of this fleet"))),
        (_, Caller::Stranger { uid }) => Err(Status::permission_denied(format!(
            "uid {uid} may not use this socket; only root and the coordinator's own user may"
        ))),
        (_, Caller::Unclear) => {
            Err(Status::unauthenticated("the certificate is of this fleet, but names neither a node nor a person"))
        }
    }
}

/// Puts [`check`] before every service.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    members: Arc<Members>,
}

impl AuthLayer {
    /// With the known nodes.
    #[must_use]
    pub const fn new(members: Arc<Members>) -> Self {
        Self { members }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, members: self.members.clone() }
    }
}

/// A service behind the table.
#[derive(Clone, Debug)]
pub struct Auth<S> {
    inner: S,
    members: Arc<Members>,
}

impl<S> Service<Request<Body>> for Auth<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = futures_util::future::Either<S::Future, std::future::Ready<Result<Self::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        use futures_util::future::Either;
        let nobody = Caller::Nobody;
        let caller = request.extensions().get::<Arc<Caller>>().map_or(&nobody, AsRef::as_ref);
        match check(request.uri().path(), caller, &self.members) {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(status) => Either::Right(std::future::ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use muster_core::ids::NodeId;
    use tonic::Code;

    use super::*;
    use crate::shared::Member;

    fn person(role: Role) -> Caller {
        Caller::Person { name: "ana".into(), role }
    }

    #[test]
    fn every_rpc_of_the_protos_has_a_line() {
        use prost::Message as _;
        let set = prost_types::FileDescriptorSet::decode(muster_proto::v1::FILE_DESCRIPTOR_SET).unwrap();
        let mut seen = 0;
        for service in set.file.iter().filter(|file| file.package() == "muster.v1").flat_map(|file| &file.service) {
            for method in &service.method {
                let path = format!("/muster.v1.{}/{}", service.name(), method.name());
                assert!(need(&path).is_some(), "{path} is missing");
                seen += 1;
            }
        }
        assert_eq!(seen + 3, TABLE.len(), "the table has a line for a call that is gone");
    }

    #[test]
    fn nothing_but_health_and_join_is_open() {
        let members = Members::default();
        for (path, need) in TABLE {
            let open = check(path, &Caller::Nobody, &members).is_ok();
            assert_eq!(open, need == Need::Open, "{path}");
        }
        assert!(check("/muster.v1.Enrollment/Join", &Caller::Nobody, &members).is_ok());
    }

    #[test]
    fn a_wrong_role_is_told_which_one_is_needed() {
        let members = Members::default();
        let refused = check("/muster.v1.Nodes/Drain", &person(Role::Submit), &members).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("operate"), "{refused}");
        assert!(check("/muster.v1.Nodes/Drain", &person(Role::Admin), &members).is_ok());
        assert!(check("/muster.v1.Agent/Session", &person(Role::Admin), &members).is_err());
        assert_eq!(check("/x/y", &person(Role::Admin), &members).unwrap_err().code(), Code::Unimplemented);
    }

    #[test]
    fn a_removed_node_opens_nothing() {
        let members = Members::default();
        let node = Caller::Node { node: NodeId(3), key: [1; 32] };
        let call = |caller: &Caller| check("/muster.v1.Agent/Session", caller, &members);
        assert!(call(&node).unwrap_err().message().contains("removed"));
        assert_eq!(members.shown(), NodeId(3), "its number was given out once");
        members.set(NodeId(3), Some(Member { name: "web-01".into(), key: [1; 32] }));
        assert!(call(&node).is_ok());
        assert!(call(&Caller::Node { node: NodeId(3), key: [2; 32] }).is_err(), "another key");
        assert!(check("/muster.v1.Jobs/List", &node, &members).is_err());
        members.set(NodeId(3), None);
        assert!(call(&node).is_err());
    }
}
