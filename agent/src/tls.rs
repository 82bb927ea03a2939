//! TLS 1.3 towards the coordinator: pinned by fingerprint while joining, then
//! by the fleet's CA with this node's certificate.

use std::{io, sync::Arc, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use muster_core::limits;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

use crate::identity::Identity;

/// The name that every coordinator's certificate carries.
pub const SERVER_NAME: &str = "muster-coordinator";

/// A TLS configuration that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Key or certificate do not fit.
    #[error("the node's key or certificate cannot be used")]
    Identity(#[source] rustls::Error),
    /// The CA is no certificate.
    #[error("the fleet's CA certificate cannot be used")]
    Authority(#[source] rustls::Error),
}

/// For everything after joining.
///
/// # Errors
/// The identity cannot be used.
pub fn config_of(identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(identity.certificate.ca.clone())).map_err(TlsError::Authority)?;
    let chain = identity.certificate.chain.iter().cloned().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::try_from(identity.key.serialize_der())
        .map_err(|error| TlsError::Identity(rustls::Error::General(error.to_owned())))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(TlsError::Identity)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// For looking alone, without a certificate of our own: the fleet's CA vouches for the coordinator.
///
/// # Errors
/// The CA is no certificate.
pub fn config_of_authority(ca: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(ca.to_vec())).map_err(TlsError::Authority)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// For joining: the CA is the one whose SHA-256 the token carries.
#[must_use]
pub fn config_pinned(fingerprint: [u8; 32]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedAuthority { fingerprint, provider: provider() }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Opens one HTTP/2 connection to one address; it fails if nobody answers in time.
///
/// # Errors
/// Nobody answers there, or it is not our coordinator.
pub async fn connect(address: &str, config: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
    let address: Arc<str> = address.into();
    let connector = tower::service_fn(move |_: Uri| {
        let (address, config) = (Arc::clone(&address), Arc::clone(&config));
        async move { handshake(&address, config).await.map(TokioIo::new) }
    });
    // The scheme only names the origin: the connector above is what encrypts.
    Endpoint::from_static("http://muster-coordinator")
        .connect_timeout(Duration::from_millis(limits::HANDSHAKE_TIMEOUT.0))
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(4 * WINDOW_BYTES)
        .connect_with_connector(connector)
        .await
}

/// A peer that is gone without a word is noticed after these two together.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// One stream's window: a blob on its own stream cannot fill the connection's.
const WINDOW_BYTES: u32 = 256 << 10;

async fn handshake(address: &str, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(SERVER_NAME).expect("a constant DNS name");
    let stream = TlsConnector::from(config).connect(name, socket).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(io::Error::other(format!("{address} does not speak HTTP/2 inside TLS")));
    }
    Ok(stream)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Trusts the one CA with this fingerprint, and what it signed.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| Sha256::digest(certificate).as_slice() == self.fingerprint)
            .ok_or_else(|| {
                rustls::Error::General(
                    "this coordinator's CA is not the one that the join token names; the token is of another fleet, or someone is in between".into(),
                )
            })?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
