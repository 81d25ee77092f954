//! A stranger whose papers are no good: it shows a certificate that has expired, which no program of ours would, or none
//! at all. `wrong-papers ADDRESS CA [IDENTITY]`. Says `refused: WHY`, or `let in`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use common::identity::SERVER_NAME;
use common::quic::{QuicError, Role, connect};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ConfigBuilder, RootCertStore, WantsVerifier};

/// A server that refuses a certificate says so within this.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, authority, identity @ ..] = &arguments[..] else {
        anyhow::bail!("usage: wrong-papers ADDRESS CA [IDENTITY]");
    };
    let address: SocketAddr = address.parse().context("no address")?;
    let tls = papers(Path::new(authority), identity.first().map(Path::new))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(knock(tls, address))
}

/// Trusts the authority, and shows the certificate in `identity` whatever it says.
fn papers(authority: &Path, identity: Option<&Path>) -> Result<rustls::ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority.join("ca.pem"))? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder: ConfigBuilder<_, WantsVerifier> =
        rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.with_root_certificates(roots);
    let mut tls = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::pem_file_iter(identity.join("host.pem"))?;
            let key = PrivateKeyDer::from_pem_file(identity.join("host.key"))?;
            builder.with_client_auth_cert(chain.collect::<Result<_, _>>()?, key)?
        }
    };
    tls.alpn_protocols = vec![Role::Fault.alpn().to_vec()];
    Ok(tls)
}

async fn knock(tls: rustls::ClientConfig, address: SocketAddr) -> Result<()> {
    let mut endpoint = Endpoint::client(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?;
    let crypto = QuicClientConfig::try_from(tls).with_context(|| format!("for {SERVER_NAME}"))?;
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(crypto)));
    // It learns late what the server thinks of it.
    let refusal = match connect(&endpoint, address).await {
        Err(error) => Some(error),
        Ok(connection) => tokio::time::timeout(PATIENCE, connection.closed())
            .await
            .ok()
            .map(|error| QuicError::from_connection(address, &error)),
    };
    match refusal {
        Some(error) => println!("refused: {error}"),
        None => println!("let in"),
    }
    Ok(())
}
