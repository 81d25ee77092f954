//! TLS settings: TLS 1.3 only, both ends authenticated, no resumption.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tracing::warn;

use super::{Fingerprint, Identity, IdentityError, SERVER_NAME, common_name};

/// Which of the peers with a certificate of our CA are welcome.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// All of them.
    #[default]
    Ca,
    /// Those with one of these certificates; an empty list means all of them.
    Fingerprints(Vec<Fingerprint>),
}

impl Trust {
    fn admit(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let Trust::Fingerprints(pins) = self else {
            return Ok(());
        };
        let fingerprint = Fingerprint::of(certificate);
        if pins.is_empty() || pins.contains(&fingerprint) {
            return Ok(());
        }
        let name = common_name(certificate).unwrap_or_default();
        warn!(%fingerprint, name, "refusing a peer whose fingerprint is not accepted here");
        Err(CertificateError::ApplicationVerificationFailure.into())
    }
}

impl Identity {
    /// Settings of a server that speaks `alpn` and accepts whom `trust` names.
    pub(crate) fn server_config(&self, trust: &Trust, alpn: &[u8]) -> Result<ServerConfig, Error> {
        let verifier = Arc::new(ClientVerifier {
            ca: client_verifier(&self.roots)?,
            trust: trust.clone(),
        });
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.key.clone());
        config.alpn_protocols = vec![alpn.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// Settings of a client that speaks `alpn` and accepts whom `trust` names.
    pub(crate) fn client_config(&self, trust: &Trust, alpn: &[u8]) -> Result<ClientConfig, Error> {
        let verifier = Arc::new(ServerVerifier {
            ca: server_verifier(&self.roots)?,
            trust: trust.clone(),
        });
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            // Called dangerous because a verifier can be written that accepts anybody; ours only refuses more.
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(self.key.clone());
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// The ring provider with the cipher suites in order of speed on hardware with AES instructions (measured: ChaCha20
/// is 40 % slower there, AES-256 3 %).
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

/// The CAs in `authorities`, read from `path`, as trust anchors.
pub(super) fn root_store(
    authorities: &[CertificateDer<'static>],
    path: &Path,
) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for der in authorities {
        roots
            .add(der.clone())
            .map_err(|error| IdentityError::Malformed {
                path: path.to_owned(),
                what: format!("no usable CA certificate ({error})"),
            })?;
    }
    Ok(roots)
}

/// Fails unless a peer would accept `host` both as a server and as a client.
pub(super) fn check_signed(
    host: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &Arc<RootCertStore>,
    now: UnixTime,
    host_path: &Path,
    ca_path: &Path,
) -> Result<(), IdentityError> {
    let explain = |source| match source {
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => IdentityError::NotSignedByCa {
            cert: host_path.to_owned(),
            ca: ca_path.to_owned(),
        },
        source => IdentityError::Unusable {
            path: host_path.to_owned(),
            source,
        },
    };
    let name = ServerName::try_from(SERVER_NAME)
        .map_err(|error| explain(Error::General(error.to_string())))?;
    server_verifier(roots)
        .and_then(|ca| ca.verify_server_cert(host, intermediates, &name, &[], now))
        .map_err(explain)?;
    client_verifier(roots)
        .and_then(|ca| ca.verify_client_cert(host, intermediates, now))
        .map_err(explain)?;
    Ok(())
}

fn server_verifier(roots: &Arc<RootCertStore>) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    let built = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider()).build();
    Ok(built.map_err(unbuildable)?)
}

fn client_verifier(roots: &Arc<RootCertStore>) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(unbuildable)
}

// By value, because that is what `map_err` calls it with.
#[allow(clippy::needless_pass_by_value)]
fn unbuildable(error: VerifierBuilderError) -> Error {
    Error::General(error.to_string())
}

/// The CA's verdict on a server, then ours.
#[derive(Debug)]
struct ServerVerifier {
    ca: Arc<dyn ServerCertVerifier>,
    trust: Trust,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.ca.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        self.trust.admit(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.ca.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.ca.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.ca.supported_verify_schemes()
    }
}

/// The CA's verdict on a client, then ours.
#[derive(Debug)]
struct ClientVerifier {
    ca: Arc<dyn ClientCertVerifier>,
    trust: Trust,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.ca.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.ca.verify_client_cert(end_entity, intermediates, now)?;
        self.trust.admit(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.ca.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.ca.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.ca.supported_verify_schemes()
    }
}
