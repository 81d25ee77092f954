//! Who a host is, and whom it trusts.
//!
//! An identity is a directory:
//!
//! | file | mode | holds |
//! | --- | --- | --- |
//! | `ca.pem` | 0644 | certificate of the CA that signs every host of one installation |
//! | `ca.key` | 0600 | its private key; only in the directory that [`init`] made |
//! | `host.pem` | 0644 | this host's certificate |
//! | `host.key` | 0600 | its private key |
//!
//! Peers are recognised by the CA's signature and, if the operator asks for it, by [`Fingerprint`]; never by address or
//! DNS name. `ca.pem` may hold several CAs, so that one can be replaced by another without a gap.

mod certificate;
mod error;
mod files;
mod fingerprint;
mod make;
#[cfg(test)]
mod tests;
mod tls;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

pub use certificate::common_name;
pub use certificate::format_utc;
pub(crate) use certificate::printable;
pub use error::IdentityError;
pub use fingerprint::Fingerprint;
pub use make::{MAX_NAME_BYTES, MAX_VALID_DAYS, init, issue};
pub use tls::Trust;
#[cfg(test)]
pub(crate) use tls::provider;

/// The name every host certificate carries as its only subject alternative name; what a client asks a server for.
pub const SERVER_NAME: &str = "postcopy";

/// File name of the CA's certificate.
pub const CA_CERT: &str = "ca.pem";
/// File name of the CA's private key.
pub const CA_KEY: &str = "ca.key";
/// File name of the host's certificate.
pub const HOST_CERT: &str = "host.pem";
/// File name of the host's private key.
pub const HOST_KEY: &str = "host.key";

/// A host's certificate and key together with the CAs it trusts: loaded, and checked to fit together.
#[derive(Clone)]
pub struct Identity {
    name: String,
    fingerprint: Fingerprint,
    not_after: OffsetDateTime,
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) key: Arc<SingleCertAndKey>,
}

impl Identity {
    /// Reads the identity in `dir` and checks everything a peer would: validity now, the CA's signature, that key and
    /// certificate belong together, and that nobody else can read the key.
    pub fn load(dir: &Path) -> Result<Identity, IdentityError> {
        Identity::load_at(dir, OffsetDateTime::now_utc())
    }

    /// [`load`](Self::load) as it was or will be at `now`.
    pub(crate) fn load_at(dir: &Path, now: OffsetDateTime) -> Result<Identity, IdentityError> {
        let ca_path = dir.join(CA_CERT);
        let host_path = dir.join(HOST_CERT);
        let authorities = files::read_certificates(&ca_path)?;
        let chain = files::read_certificates(&host_path)?;
        for der in &authorities {
            certificate::Facts::parse(der, &ca_path)?.check_validity(now, &ca_path)?;
        }
        let (host, intermediates) = files::leaf(&chain, &host_path)?;
        let facts = certificate::Facts::parse(host, &host_path)?;
        facts.check_validity(now, &host_path)?;
        let roots = Arc::new(tls::root_store(&authorities, &ca_path)?);
        tls::check_signed(host, intermediates, &roots, unix(now), &host_path, &ca_path)?;
        let fingerprint = Fingerprint::of(host);
        let key = files::read_key_pair(chain.clone(), &host_path, &dir.join(HOST_KEY))?;
        Ok(Identity {
            name: facts.name,
            fingerprint,
            not_after: facts.not_after,
            roots,
            key: Arc::new(SingleCertAndKey::from(key)),
        })
    }

    /// The host's name: its certificate's common name. For logs only, peers are not addressed by it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fingerprint of the host's certificate, as a peer may pin it.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Last moment the host's certificate is valid.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// One certificate, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateSummary {
    /// Common name of the subject.
    pub name: String,
    /// First moment of validity.
    pub not_before: OffsetDateTime,
    /// Last moment of validity.
    pub not_after: OffsetDateTime,
    /// SHA-256 of the certificate's DER.
    pub fingerprint: Fingerprint,
}

impl fmt::Display for CertificateSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.name)?;
        let (from, until) = (format_utc(self.not_before), format_utc(self.not_after));
        writeln!(f, "  valid        {from} to {until}")?;
        write!(f, "  fingerprint  {}", self.fingerprint)
    }
}

/// What an identity directory holds, for people; see [`describe`].
#[derive(Debug)]
pub struct Description {
    /// The host's certificate.
    pub host: CertificateSummary,
    /// The CAs it trusts.
    pub authorities: Vec<CertificateSummary>,
    /// Whether the directory can issue identities for other hosts.
    pub can_issue: bool,
    /// Why [`Identity::load`] would refuse the directory, if it would.
    pub problem: Option<IdentityError>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "host {}", self.host)?;
        for authority in &self.authorities {
            writeln!(f, "CA {authority}")?;
        }
        let can = if self.can_issue { "yes" } else { "no" };
        write!(f, "can issue other identities: {can}")?;
        match &self.problem {
            Some(problem) => write!(f, "\nNOT USABLE: {problem}"),
            None => Ok(()),
        }
    }
}

/// Describes the identity in `dir`, also when it is expired or otherwise unusable; fails only if a certificate cannot
/// be read.
pub fn describe(dir: &Path) -> Result<Description, IdentityError> {
    let host_path = dir.join(HOST_CERT);
    let chain = files::read_certificates(&host_path)?;
    let (host, _) = files::leaf(&chain, &host_path)?;
    let ca_path = dir.join(CA_CERT);
    let authorities = files::read_certificates(&ca_path)?;
    Ok(Description {
        host: summarise(host, &host_path)?,
        authorities: authorities
            .iter()
            .map(|der| summarise(der, &ca_path))
            .collect::<Result<_, _>>()?,
        can_issue: dir.join(CA_KEY).exists(),
        problem: Identity::load(dir).err(),
    })
}

fn summarise(der: &CertificateDer<'_>, path: &Path) -> Result<CertificateSummary, IdentityError> {
    let facts = certificate::Facts::parse(der, path)?;
    Ok(CertificateSummary {
        name: facts.name,
        not_before: facts.not_before,
        not_after: facts.not_after,
        fingerprint: Fingerprint::of(der),
    })
}

fn unix(moment: OffsetDateTime) -> UnixTime {
    let seconds = u64::try_from(moment.unix_timestamp()).unwrap_or(0);
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds))
}
