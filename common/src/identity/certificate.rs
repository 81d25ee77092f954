//! What we need to know of a certificate.

use std::path::Path;

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::IdentityError;

/// Characters of foreign text that reach a log or an error.
const MAX_PRINTED_CHARS: usize = 128;

/// The parts of a certificate that concern us.
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) not_before: OffsetDateTime,
    pub(super) not_after: OffsetDateTime,
}

impl Facts {
    /// Parses the certificate `der`, which was read from `path`.
    pub(super) fn parse(der: &CertificateDer<'_>, path: &Path) -> Result<Facts, IdentityError> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| IdentityError::Malformed {
                path: path.to_owned(),
                what: format!("no X.509 certificate ({error})"),
            })?;
        Ok(Facts {
            name: subject(&certificate).unwrap_or_else(|| "(no name)".to_owned()),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
        })
    }

    /// Fails unless `now` lies within the certificate's validity.
    pub(super) fn check_validity(
        &self,
        now: OffsetDateTime,
        path: &Path,
    ) -> Result<(), IdentityError> {
        if now > self.not_after {
            return Err(IdentityError::Expired {
                path: path.to_owned(),
                not_after: format_utc(self.not_after),
            });
        }
        if now < self.not_before {
            return Err(IdentityError::NotYetValid {
                path: path.to_owned(),
                not_before: format_utc(self.not_before),
            });
        }
        Ok(())
    }
}

/// The subject's common name, fit for a log; `None` without one or if `der` is no certificate.
pub fn common_name(der: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    subject(&certificate)
}

fn subject(certificate: &X509Certificate<'_>) -> Option<String> {
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(printable)
}

/// Foreign text fit for a terminal: shortened, without control characters.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_PRINTED_CHARS)
        .map(|char| if char.is_control() { '?' } else { char })
        .collect()
}

/// A moment as `2026-11-23 16:48:05 UTC`.
pub fn format_utc(moment: OffsetDateTime) -> String {
    let utc = moment.to_offset(time::UtcOffset::UTC);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02} UTC",
        utc.year(),
        u8::from(utc.month()),
        utc.day(),
        utc.hour(),
        utc.minute(),
        utc.second()
    )
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;

    #[test]
    fn validity_includes_its_ends_and_nothing_else() {
        let start = OffsetDateTime::UNIX_EPOCH;
        let facts = Facts {
            name: String::new(),
            not_before: start,
            not_after: start + Duration::DAY,
        };
        let path = Path::new("host.pem");
        assert!(facts.check_validity(start, path).is_ok());
        assert!(facts.check_validity(start + Duration::DAY, path).is_ok());
        let early = facts.check_validity(start - Duration::SECOND, path);
        assert!(matches!(early, Err(IdentityError::NotYetValid { .. })));
        let late = facts.check_validity(start + Duration::days(2), path);
        let text = late.unwrap_err().to_string();
        assert!(
            text.contains("host.pem expired on 1970-01-02 00:00:00 UTC"),
            "{text}"
        );
    }

    #[test]
    fn foreign_text_is_shortened_and_cleaned() {
        assert_eq!(printable("a\x1b[31m\n"), "a?[31m?");
        assert_eq!(
            printable(&"ä".repeat(1000)).chars().count(),
            MAX_PRINTED_CHARS
        );
    }
}
