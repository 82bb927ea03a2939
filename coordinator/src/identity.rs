//! Who is who: the fleet's CA, the certificates that it signs, and what a
//! certificate says of its holder.
//!
//! A node is `muster://node/<id>`, a person `muster://user/<name>?role=<role>`,
//! both in the certificate's URI name. Nothing in a message can claim another.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use muster_core::{
    ids::NodeId,
    time::{Millis, Timestamp},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _,
};
use sha2::{Digest as _, Sha256};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::{
    folder::{self, write_durably},
    person::{PersonName, Role},
    seal::Seal,
};

/// The name under which clients know every coordinator.
pub const SERVER_NAME: &str = "muster-coordinator";

const DAY: Duration = Duration::from_secs(86_400);
const CA_LIFE: Duration = Duration::from_secs(20 * 365 * 86_400);
const SERVER_LIFE: Duration = Duration::from_secs(365 * 86_400);
const PERSON_LIFE: Duration = Duration::from_secs(2 * 365 * 86_400);
/// The server's certificate is made anew when it has less than this left.
const SERVER_RENEW: Duration = Duration::from_secs(90 * 86_400);
/// Clocks of hosts may be behind ours by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(3_600);

/// What can go wrong with identities.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder refused.
    #[error(transparent)]
    Folder(#[from] folder::Error),
    /// A key or certificate that was ours does not read.
    #[error("cannot {doing} {what}")]
    Certificate {
        /// What was tried.
        doing: &'static str,
        /// On what.
        what: String,
        /// Why it failed.
        #[source]
        source: rcgen::Error,
    },
    /// A file of the pki folder is missing or no PEM.
    #[error("{file} is missing or damaged; restore the pki folder from a backup")]
    Pem {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// PEM, and no certificate in it.
    #[error("{file} holds no certificate; restore the pki folder from a backup")]
    Damaged {
        /// The file.
        file: String,
    },
    /// TLS refused what we gave it.
    #[error("TLS refuses the server's certificate")]
    Tls(#[source] rustls::Error),
    /// A certificate is not written over.
    #[error("{file} is there already; move it away, or name another folder")]
    Exists {
        /// The file.
        file: String,
    },
    /// A request that is no request for one of our certificates.
    #[error("the certificate request is refused: {reason}")]
    Request {
        /// The sentence.
        reason: String,
    },
}

/// Who is on the other side of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// No certificate.
    Nobody,
    /// A local process of another user.
    Stranger {
        /// Its uid.
        uid: u32,
    },
    /// A node, by its certificate.
    Node {
        /// Which.
        node: NodeId,
        /// SHA-256 of its public key.
        key: [u8; 32],
    },
    /// A person or program.
    Person {
        /// Who; "uid:0" on the Unix socket.
        name: String,
        /// What it may do.
        role: Role,
    },
    /// A certificate of our CA that names nobody we know how to treat.
    Unclear,
}

/// The fleet's CA and the server's own certificate.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    server: Arc<Served>,
    seal: Seal,
    pki: PathBuf,
    sans: Vec<String>,
}

/// What the server shows of itself: whoever connects after a renewal sees the new certificate, who is connected stays.
#[derive(Debug)]
struct Served(RwLock<Arc<CertifiedKey>>);

impl Served {
    fn now(&self) -> Arc<CertifiedKey> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Served {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

fn certificate(doing: &'static str, what: impl Into<String>) -> impl FnOnce(rcgen::Error) -> Error {
    let what = what.into();
    move |source| Error::Certificate { doing, what, source }
}

/// SHA-256, as keys and certificates are named by.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Authority {
    /// Makes a CA, the server's certificate and the first person's, an admin's.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(pki: &Path, sans: &[String]) -> Result<(), Error> {
        fs::create_dir_all(pki).map_err(folder::io_error("make", pki))?;
        let key = new_key()?;
        let mut params = named("Muster fleet CA", CA_LIFE);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = params.self_signed(&key).map_err(certificate("make", "the CA"))?;
        write_durably(&pki.join("ca.pem"), ca.pem().as_bytes(), 0o644)?;
        write_durably(&pki.join("ca.key"), key.serialize_pem().as_bytes(), 0o600)?;
        let issuer = Issuer::new(params, key);
        issue_server(&issuer, pki, sans, SERVER_LIFE)?;
        issue_person(&issuer, pki, &PersonName::first(), Role::Admin, PERSON_LIFE)
    }

    /// Makes a key and a certificate for a person, `NAME.key` and `NAME.pem` in `to`, signed by the CA of `pki`.
    ///
    /// # Errors
    /// The CA is missing or damaged, one of the two files is there, or `to` cannot be written.
    pub fn admit(pki: &Path, to: &Path, name: &PersonName, role: Role, life: Duration) -> Result<(), Error> {
        let (ca, key) = (read_pem(&pki.join("ca.pem"))?, read_key(&pki.join("ca.key"))?);
        let taken = ["pem", "key"].map(|ending| to.join(format!("{name}.{ending}")));
        if let Some(file) = taken.iter().find(|file| file.exists()) {
            return Err(Error::Exists { file: file.display().to_string() });
        }
        let issuer = Issuer::from_ca_cert_der(&ca, key).map_err(certificate("read", "the CA's certificate"))?;
        issue_person(&issuer, to, name, role, life)
    }

    /// Takes another coordinator's CA over from a copy of its folder, and makes a server's certificate of its own.
    ///
    /// # Errors
    /// The copy is incomplete or damaged, or the folder cannot be written.
    pub fn copy(from: &Path, pki: &Path, sans: &[String]) -> Result<(), Error> {
        let ca: CertificateDer<'static> = read_pem(&from.join("ca.pem"))?;
        let key = read_key(&from.join("ca.key"))?;
        fs::create_dir_all(pki).map_err(folder::io_error("make", pki))?;
        for (name, mode) in [("ca.pem", 0o644), ("ca.key", 0o600)] {
            let file = from.join(name);
            let bytes = fs::read(&file).map_err(folder::io_error("read", &file))?;
            write_durably(&pki.join(name), &bytes, mode)?;
        }
        let issuer = Issuer::from_ca_cert_der(&ca, key).map_err(certificate("read", "the CA's certificate"))?;
        issue_server(&issuer, pki, sans, SERVER_LIFE)
    }

    /// Reads what [`Self::create`] made; makes the server's certificate anew when it ends soon.
    ///
    /// # Errors
    /// A file is missing or damaged.
    pub fn open(pki: &Path, sans: &[String]) -> Result<Self, Error> {
        let ca: CertificateDer<'static> = read_pem(&pki.join("ca.pem"))?;
        let key = read_key(&pki.join("ca.key"))?;
        let seal = Seal::new(&key.serialize_der());
        let issuer = Issuer::from_ca_cert_der(&ca, key).map_err(certificate("read", "the CA's certificate"))?;
        let server = Arc::new(Served(RwLock::new(lasting_server(&issuer, &ca, pki, sans)?)));
        Ok(Self { issuer, ca, server, seal, pki: pki.to_owned(), sans: sans.to_vec() })
    }

    /// Makes the server's certificate anew when it ends soon: a coordinator may run for years. Says whether it did.
    ///
    /// # Errors
    /// The folder cannot be read or written; the certificate from before is shown on.
    pub fn renew_server(&self) -> Result<bool, Error> {
        let (before, server) = (self.server.now(), lasting_server(&self.issuer, &self.ca, &self.pki, &self.sans)?);
        let is_new = server.cert != before.cert;
        *self.server.0.write().unwrap_or_else(PoisonError::into_inner) = server;
        Ok(is_new)
    }

    /// Seals what hosts keep for the next leader.
    #[must_use]
    pub const fn seal(&self) -> &Seal {
        &self.seal
    }

    /// The CA's certificate.
    #[must_use]
    pub const fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// SHA-256 of the CA's certificate: what a token pins.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.ca)
    }

    /// Signs a node's key for so long.
    ///
    /// # Errors
    /// TLS libraries refuse.
    pub fn sign_node(
        &self,
        request: &NodeKeyRequest,
        node: NodeId,
        life: Millis,
    ) -> Result<CertificateDer<'static>, Error> {
        let life = Duration::from_millis(life.0);
        let params = client(&node.to_string(), &format!("muster://node/{}", node.0), life)?;
        let signed = params.signed_by(&request.key, &self.issuer).map_err(certificate("sign", node.to_string()))?;
        Ok(signed.der().clone())
    }

    /// TLS 1.3 with ours; a client's certificate is optional here and required per call.
    ///
    /// # Errors
    /// TLS refuses our own certificate.
    pub fn server_config(&self) -> Result<rustls::ServerConfig, Error> {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(Error::Tls)?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|error| Error::Tls(rustls::Error::General(error.to_string())))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(Error::Tls)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.server.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// A checked request of a host for a certificate.
#[derive(Debug)]
pub struct NodeKeyRequest {
    key: rcgen::PublicKey,
    /// SHA-256 of the public key.
    pub digest: [u8; 32],
}

impl NodeKeyRequest {
    /// Checks the request's own signature: the sender holds the key. Names in it are ignored.
    ///
    /// # Errors
    /// It does not read, is not signed by its key, or the key is of another kind.
    pub fn read(csr: &[u8]) -> Result<Self, Error> {
        let refused = |reason: &str| Error::Request { reason: reason.to_owned() };
        if csr.len() > 16 << 10 {
            return Err(refused("it is larger than any such request"));
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
            .map_err(|error| Error::Request { reason: error.to_string() })?;
        if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(refused("the key must be ECDSA P-256"));
        }
        let digest = sha256(&request.public_key.subject_public_key_info());
        Ok(Self { key: request.public_key, digest })
    }
}

/// What a verified client certificate says.
#[must_use]
pub fn caller(leaf: &CertificateDer<'_>) -> Caller {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(leaf) else {
        return Caller::Unclear;
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Caller::Unclear };
    let uri = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _other => None,
    });
    uri.and_then(|uri| caller_of_uri(uri, certificate.public_key().raw)).unwrap_or(Caller::Unclear)
}

fn caller_of_uri(uri: &str, public_key: &[u8]) -> Option<Caller> {
    let rest = uri.strip_prefix("muster://")?;
    if let Some(node) = rest.strip_prefix("node/") {
        return Some(Caller::Node { node: NodeId(node.parse().ok()?), key: sha256(public_key) });
    }
    let (name, role) = rest.strip_prefix("user/")?.split_once("?role=")?;
    Some(Caller::Person { name: name.to_owned(), role: Role::named(role)? })
}

fn new_key() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(certificate("make", "a key"))
}

fn named(common_name: &str, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + life).into();
    params
}

fn client(common_name: &str, uri: &str, life: Duration) -> Result<CertificateParams, Error> {
    let mut params = named(common_name, life);
    let uri = uri.try_into().map_err(certificate("name", uri))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn issue_person(
    issuer: &Issuer<'_, KeyPair>,
    to: &Path,
    name: &PersonName,
    role: Role,
    life: Duration,
) -> Result<(), Error> {
    let key = new_key()?;
    let params = client(&name.to_string(), &format!("muster://user/{name}?role={}", role.name()), life)?;
    let signed = params.signed_by(&key, issuer).map_err(certificate("sign", name.to_string()))?;
    write_durably(&to.join(format!("{name}.key")), key.serialize_pem().as_bytes(), 0o600)?;
    write_durably(&to.join(format!("{name}.pem")), signed.pem().as_bytes(), 0o644).map_err(Error::from)
}

fn issue_server(issuer: &Issuer<'_, KeyPair>, pki: &Path, sans: &[String], life: Duration) -> Result<(), Error> {
    let key = new_key()?;
    let mut params = named(SERVER_NAME, life);
    let usual = ["localhost", SERVER_NAME, "127.0.0.1", "::1"].map(str::to_owned);
    for san in usual.iter().chain(sans) {
        params.subject_alt_names.push(match san.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(san.as_str().try_into().map_err(certificate("name", san))?),
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let signed = params.signed_by(&key, issuer).map_err(certificate("sign", "the server's certificate"))?;
    // The key first: a certificate without its key would not start, and is made anew then.
    write_durably(&pki.join("server.key"), key.serialize_pem().as_bytes(), 0o600)?;
    write_durably(&pki.join("server.pem"), signed.pem().as_bytes(), 0o644).map_err(Error::from)
}

/// The server's certificate on disk, made anew when it ends soon.
fn lasting_server(
    issuer: &Issuer<'_, KeyPair>,
    ca: &CertificateDer<'static>,
    pki: &Path,
    sans: &[String],
) -> Result<Arc<CertifiedKey>, Error> {
    let ends_soon = read_pem(&pki.join("server.pem")).map_or(true, |leaf| life_left(&leaf) < SERVER_RENEW);
    if ends_soon {
        issue_server(issuer, pki, sans, SERVER_LIFE)?;
    }
    let key = read_key(&pki.join("server.key"))?.serialize_der();
    // The CA goes along, so that a joining host can check it against its token.
    let chain = vec![read_pem(&pki.join("server.pem"))?, ca.clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, key, &provider).map(Arc::new).map_err(Error::Tls)
}

/// When the certificate in this file ends.
///
/// # Errors
/// The file is missing or damaged.
pub fn certificate_end(file: &Path) -> Result<Timestamp, Error> {
    let der = read_pem(file)?;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&der)
        .map_err(|_| Error::Damaged { file: file.display().to_string() })?;
    Ok(Timestamp(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0).saturating_mul(1_000)))
}

fn read_pem(file: &Path) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_file(file).map_err(|source| Error::Pem { file: file.display().to_string(), source })
}

fn read_key(file: &Path) -> Result<KeyPair, Error> {
    let der =
        PrivateKeyDer::from_pem_file(file).map_err(|source| Error::Pem { file: file.display().to_string(), source })?;
    KeyPair::try_from(&der).map_err(certificate("read", file.display().to_string()))
}

fn life_left(certificate: &CertificateDer<'_>) -> Duration {
    let Ok((_, parsed)) = x509_parser::certificate::X509Certificate::from_der(certificate) else {
        return Duration::ZERO;
    };
    let left = parsed.validity().time_to_expiration();
    left.map_or(Duration::ZERO, |left| DAY * u32::try_from(left.whole_days()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_says_who_its_holder_is() {
        let root = tempfile::tempdir().unwrap();
        let pki = root.path().join("pki");
        Authority::create(&pki, &["fleet.example".into(), "10.0.0.1".into()]).unwrap();
        let authority = Authority::open(&pki, &[]).unwrap();
        let admin = CertificateDer::from_pem_file(pki.join("admin.pem")).unwrap();
        assert_eq!(caller(&admin), Caller::Person { name: "admin".into(), role: Role::Admin });

        let key = new_key().unwrap();
        let request = NodeKeyRequest::read(&csr(&key)).unwrap();
        let leaf = authority.sign_node(&request, NodeId(7), Millis::from_secs(60)).unwrap();
        assert_eq!(caller(&leaf), Caller::Node { node: NodeId(7), key: request.digest });
        assert!(authority.server_config().is_ok());
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(pki.join("ca.key")).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_server_that_runs_on_shows_a_new_certificate_before_the_old_one_ends() {
        let root = tempfile::tempdir().unwrap();
        let pki = root.path().join("pki");
        Authority::create(&pki, &[]).unwrap();
        let authority = Authority::open(&pki, &["fleet.example".to_owned()]).unwrap();
        assert!(!authority.renew_server().unwrap(), "it has a year");

        issue_server(&authority.issuer, &pki, &[], DAY * 80).unwrap();
        let shown = || authority.server.now().cert[0].clone();
        let old = shown();
        assert!(authority.renew_server().unwrap());
        assert_ne!(shown(), old);
        assert!(life_left(&shown()) > DAY * 300);
        assert_eq!(read_pem(&pki.join("server.pem")).unwrap(), shown(), "it is there at the next start");
        assert!(!authority.renew_server().unwrap());
    }

    #[test]
    fn a_request_for_a_certificate_is_distrusted() {
        let key = new_key().unwrap();
        let mut tampered = csr(&key);
        let last = tampered.len() - 1;
        tampered[last] ^= 1;
        assert!(NodeKeyRequest::read(&tampered).is_err(), "not signed by its key");
        assert!(NodeKeyRequest::read(b"garbage").is_err());
        assert!(NodeKeyRequest::read(&vec![0; 20 << 10]).is_err());
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert!(NodeKeyRequest::read(&csr(&other)).is_err(), "another kind of key");
    }

    #[test]
    fn a_person_gets_a_certificate_once_with_the_role_that_was_named() {
        let root = tempfile::tempdir().unwrap();
        let (pki, to) = (root.path().join("pki"), root.path());
        Authority::create(&pki, &[]).unwrap();
        let ana: PersonName = "ana@example.com".parse().unwrap();
        Authority::admit(&pki, to, &ana, Role::Operate, DAY * 30).unwrap();
        let file = to.join("ana@example.com.pem");
        let leaf = CertificateDer::from_pem_file(&file).unwrap();
        assert_eq!(caller(&leaf), Caller::Person { name: "ana@example.com".into(), role: Role::Operate });
        assert!(life_left(&leaf) <= DAY * 30);
        let key = fs::read(to.join("ana@example.com.key")).unwrap();
        let again = Authority::admit(&pki, to, &ana, Role::Admin, DAY);
        assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
        assert_eq!(fs::read(to.join("ana@example.com.key")).unwrap(), key, "it is as it was");
    }

    #[test]
    fn a_strange_name_is_nobody() {
        for uri in
            ["muster://node/x", "muster://user/ana", "muster://user/ana?role=king", "https://node/1", "muster://"]
        {
            assert_eq!(caller_of_uri(uri, b""), None, "{uri}");
        }
    }
}
