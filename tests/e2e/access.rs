//! Who gets in: nothing without a certificate but health and Join with a token.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use muster_proto::v1::{
    self, JoinRequest, ListNodesRequest, enrollment_client::EnrollmentClient, nodes_client::NodesClient,
};
use muster_tests::{Fleet, NodeOptions, WAIT, client::bytes};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

/// A channel over TLS 1.3, with the admin's certificate or without any.
async fn tls_channel(fleet: &Fleet, with_certificate: bool) -> Result<Channel, tonic::transport::Error> {
    let pki = fleet.data().join("pki");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&pki.join("ca.pem")) {
        roots.add(certificate).expect("the fleet's CA");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3")
        .with_root_certificates(roots);
    let mut config = if with_certificate {
        let key = std::fs::read(pki.join("admin.key")).expect("the admin's key");
        let key = PrivateKeyDer::from_pem_slice(&key).expect("a key in PEM");
        builder.with_client_auth_cert(certificates(&pki.join("admin.pem")), key).expect("a matching pair")
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let address = fleet.address.clone();
    let dial = tower::service_fn(move |_| {
        let (address, connector) = (address.clone(), connector.clone());
        async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            let name = ServerName::try_from("muster-coordinator").expect("a DNS name");
            connector.connect(name, stream).await.map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://muster-coordinator").timeout(WAIT).connect_with_connector(dial).await
}

fn certificates(path: &Path) -> Vec<CertificateDer<'static>> {
    let pem = std::fs::read(path).expect("a certificate file");
    CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().expect("certificates in PEM")
}

#[tokio::test]
async fn the_admins_certificate_opens_the_port_and_none_does_not() {
    let fleet = Fleet::start().await;
    let channel = tls_channel(&fleet, true).await.expect("a connection with the admin's certificate");
    NodesClient::new(channel).list(ListNodesRequest {}).await.expect("the admin lists nodes");

    let refused = match tls_channel(&fleet, false).await {
        // A certificate is optional at TLS, so that a host can join; each RPC then asks for one.
        Ok(channel) => NodesClient::new(channel).list(ListNodesRequest {}).await.expect_err("refused").code(),
        Err(_) => Code::Unauthenticated,
    };
    assert!(matches!(refused, Code::Unauthenticated | Code::PermissionDenied), "{refused:?}");
}

#[tokio::test]
async fn every_operator_rpc_without_a_certificate_is_refused() {
    use v1::{fleet_client::FleetClient, jobs_client::JobsClient, pools_client::PoolsClient};
    let fleet = Fleet::start().await;
    let channel = tls_channel(&fleet, false).await.expect("TLS itself is open, for Join");
    let (mut jobs, mut pools, mut whole) =
        (JobsClient::new(channel.clone()), PoolsClient::new(channel.clone()), FleetClient::new(channel));
    let codes: [Option<Status>; 6] = [
        jobs.submit(v1::SubmitRequest::default()).await.err(),
        jobs.list(v1::ListJobsRequest::default()).await.err(),
        jobs.fetch_blob(v1::BlobRef::default()).await.err(),
        pools.list(v1::ListPoolsRequest {}).await.err(),
        whole.create_token(v1::CreateTokenRequest::default()).await.err(),
        whole.status(v1::StatusRequest {}).await.err(),
    ];
    for status in codes {
        assert_eq!(status.map(|status| status.code()), Some(Code::Unauthenticated));
    }
}

#[tokio::test]
async fn a_wrong_token_and_a_used_token_are_refused() {
    let mut fleet = Fleet::start().await;
    let channel = tls_channel(&fleet, false).await.expect("TLS itself is open, for Join");
    let join =
        |token: &str| JoinRequest { token: token.to_owned(), csr: bytes("no csr"), node_name: String::from("x") };
    for token in ["", "muster1.", "muster1.bm90aGluZw", "something else", &"x".repeat(100_000)] {
        let refused = EnrollmentClient::new(channel.clone()).join(join(token)).await.expect_err("a wrong token");
        let code = refused.code();
        let closed = matches!(
            code,
            Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument | Code::ResourceExhausted
        );
        assert!(closed, "{code:?}: {refused}");
        assert!(
            token.is_empty() || !refused.message().contains(token) || token.len() < 10,
            "the token is not repeated"
        );
    }
    fleet.add_node("n1", &NodeOptions::default()).await;

    // The token that n1 used, by a second agent with a key of its own.
    let used = fleet.token("").await;
    fleet.join_with_token("first", &used, &NodeOptions::default()).await;
    let said = fleet.refused_join("second", &used);
    assert!(said.contains("token"), "the refusal says that it is the token: {said}");
    assert!(!said.contains(&used), "a secret is not logged");
}

#[tokio::test]
async fn garbage_on_the_port_disturbs_nobody() {
    let fleet = Fleet::with_node().await;
    let noise: [&[u8]; 5] =
        [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 4_096], b"\x16\x03\x01\xff\xff", b""];
    for bytes in noise {
        let mut stream = TcpStream::connect(&fleet.address).expect("the port is open");
        stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a timeout");
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // Closed, with or without a TLS alert; never an answer in plain text.
        let mut answer = Vec::new();
        let _ = stream.take(4_096).read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    let done = fleet.client.run(fleet.job(["/bin/true"])).await;
    assert_eq!(done.summary.state, "succeeded");
}

#[tokio::test]
async fn plain_http2_without_tls_is_refused() {
    let fleet = Fleet::start().await;
    let endpoint = Endpoint::from_shared(format!("http://{}", fleet.address)).expect("an address").timeout(WAIT);
    if let Ok(channel) = endpoint.connect().await {
        NodesClient::new(channel).list(ListNodesRequest {}).await.expect_err("nothing is served without TLS");
    }
}

#[tokio::test]
async fn keys_and_the_store_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let fleet = Fleet::with_node().await;
    let mut keys = Vec::new();
    for folder in [fleet.data(), fleet.folder().join("n1")] {
        collect(&folder, &mut |path| {
            if path.extension().is_some_and(|ending| ending == "key") {
                keys.push(path.to_owned());
                let mode = path.metadata().expect("a file").permissions().mode();
                assert_eq!(mode & 0o077, 0, "{} is open to others", path.display());
            }
        });
    }
    assert!(keys.len() >= 3, "CA or server, admin and node keys: {keys:?}");
}

fn collect(folder: &Path, found: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, found);
        } else {
            found(&path);
        }
    }
}
