//! Making identities.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use super::certificate::Facts;
use super::files::{self, PRIVATE, PUBLIC};
use super::{CA_CERT, CA_KEY, HOST_CERT, HOST_KEY, IdentityError, SERVER_NAME, printable};

/// Bytes of a host's name: what X.520 allows a common name.
pub const MAX_NAME_BYTES: usize = 64;

/// Days a certificate may be valid: a hundred years.
pub const MAX_VALID_DAYS: i64 = 36_500;

/// The CA outlives every certificate one would renew: ten years.
const CA_DAYS: i64 = 3_653;

/// Certificates count as valid from this long ago, so that clocks need not agree to the second.
const CLOCK_SKEW: Duration = Duration::HOUR;

/// Makes a new CA and, signed by it, the identity of host `name` in `dir`, which is created if needed.
///
/// `valid_days` may be zero or negative and then makes a certificate that has already expired; the CA itself is always
/// valid for ten years at least. Existing files are never overwritten.
pub fn init(dir: &Path, name: &str, valid_days: i64) -> Result<(), IdentityError> {
    check_request(name, valid_days)?;
    prepare(dir, &[CA_CERT, CA_KEY, HOST_CERT, HOST_KEY])?;
    let now = OffsetDateTime::now_utc();
    let key = generate("the CA's key")?;
    let params = authority_params(name, &key, now, valid_days);
    let certificate = params.self_signed(&key).map_err(making("the CA"))?;
    let (ca_pem, ca_key_pem) = (certificate.pem(), key.serialize_pem());
    let issuer = Issuer::new(params, key);
    let host = sign_host(&issuer, &host_params(name, now, valid_days)?)?;
    write_all(
        dir,
        &[
            (CA_KEY, ca_key_pem.as_bytes(), PRIVATE),
            (CA_CERT, ca_pem.as_bytes(), PUBLIC),
            (HOST_KEY, host.key.as_bytes(), PRIVATE),
            (HOST_CERT, host.cert.as_bytes(), PUBLIC),
        ],
    )
}

/// Makes the identity of a further host `name` in `dir`, signed by the CA in `ca_dir` (see [`init`]). The new directory
/// can be copied to that host; the CA's key stays where it is.
///
/// `valid_days` is as for [`init`], but no certificate outlives its CA.
pub fn issue(ca_dir: &Path, dir: &Path, name: &str, valid_days: i64) -> Result<(), IdentityError> {
    check_request(name, valid_days)?;
    let now = OffsetDateTime::now_utc();
    let authority = Authority::load(ca_dir, now)?;
    prepare(dir, &[CA_CERT, CA_KEY, HOST_CERT, HOST_KEY])?;
    let mut params = host_params(name, now, valid_days)?;
    params.not_after = params.not_after.min(authority.not_after);
    let host = sign_host(&authority.issuer, &params)?;
    write_all(
        dir,
        &[
            (CA_CERT, &authority.pem, PUBLIC),
            (HOST_KEY, host.key.as_bytes(), PRIVATE),
            (HOST_CERT, host.cert.as_bytes(), PUBLIC),
        ],
    )
}

struct Authority {
    pem: Vec<u8>,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Reads the CA in `dir`; with several certificates in `ca.pem`, the first is the one that signs.
    fn load(dir: &Path, now: OffsetDateTime) -> Result<Authority, IdentityError> {
        let (cert_path, key_path) = (dir.join(CA_CERT), dir.join(CA_KEY));
        let pem = files::read_public(&cert_path)?;
        let all = files::certificates_in(&pem, &cert_path)?;
        let (certificate, _) = files::leaf(&all, &cert_path)?;
        let facts = Facts::parse(certificate, &cert_path)?;
        facts.check_validity(now, &cert_path)?;
        let key = files::read_key(&key_path).map_err(|error| match error {
            IdentityError::Missing { path } => IdentityError::NoCaKey { path },
            other => other,
        })?;
        files::read_key_pair(vec![certificate.clone()], &cert_path, &key_path)?;
        let unfit = |path: &Path| {
            let path = path.to_owned();
            move |error: rcgen::Error| IdentityError::Malformed {
                path,
                what: format!("not usable for signing ({error})"),
            }
        };
        let key = KeyPair::try_from(&key).map_err(unfit(&key_path))?;
        let issuer = Issuer::from_ca_cert_der(certificate, key).map_err(unfit(&cert_path))?;
        Ok(Authority {
            pem,
            not_after: facts.not_after,
            issuer,
        })
    }
}

struct HostFiles {
    key: String,
    cert: String,
}

fn sign_host(
    issuer: &Issuer<'_, KeyPair>,
    params: &CertificateParams,
) -> Result<HostFiles, IdentityError> {
    let key = generate("the host's key")?;
    let certificate = params
        .signed_by(&key, issuer)
        .map_err(making("the host's certificate"))?;
    Ok(HostFiles {
        key: key.serialize_pem(),
        cert: certificate.pem(),
    })
}

fn authority_params(
    name: &str,
    key: &KeyPair,
    now: OffsetDateTime,
    valid_days: i64,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    let id = params.key_identifier(key);
    // Two CAs of one name would make a foreign certificate look forged instead of foreign.
    let id: String = id
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    params.distinguished_name = distinguished(&format!("{SERVER_NAME} CA {id} of {name}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(CA_DAYS.max(valid_days + 1));
    params
}

fn host_params(
    name: &str,
    now: OffsetDateTime,
    valid_days: i64,
) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])
        .map_err(making("the host's certificate"))?;
    params.distinguished_name = distinguished(name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.not_after = now + Duration::days(valid_days);
    params.not_before = now.min(params.not_after) - CLOCK_SKEW;
    Ok(params)
}

fn distinguished(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn generate(what: &'static str) -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(making(what))
}

fn making(what: &'static str) -> impl FnOnce(rcgen::Error) -> IdentityError {
    move |source| IdentityError::Make { what, source }
}

fn check_request(name: &str, valid_days: i64) -> Result<(), IdentityError> {
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len());
    if !fits || name.trim().is_empty() || name.chars().any(char::is_control) {
        let name = printable(name);
        return Err(IdentityError::BadName { name });
    }
    if !(-MAX_VALID_DAYS..=MAX_VALID_DAYS).contains(&valid_days) {
        return Err(IdentityError::BadDays { days: valid_days });
    }
    Ok(())
}

fn prepare(dir: &Path, names: &[&str]) -> Result<(), IdentityError> {
    files::make_directory(dir)?;
    names
        .iter()
        .try_for_each(|name| files::check_absent(&dir.join(name)))
}

/// Writes all files or, as far as that can be done, none.
fn write_all(dir: &Path, wanted: &[(&str, &[u8], u32)]) -> Result<(), IdentityError> {
    for (index, (name, content, mode)) in wanted.iter().enumerate() {
        if let Err(error) = files::write_new(&dir.join(name), content, *mode) {
            for (written, ..) in &wanted[..index] {
                // Nothing better can be done when this fails too; the error to report is the first one.
                let _ = fs::remove_file(dir.join(written));
            }
            return Err(error);
        }
    }
    Ok(())
}
