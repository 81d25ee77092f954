//! Fingerprints of certificates.

use std::fmt;
use std::str::FromStr;

use ring::digest;
use rustls_pki_types::CertificateDer;

use super::{IdentityError, printable};

const BYTES: usize = digest::SHA256_OUTPUT_LEN;

/// SHA-256 of a certificate's DER; written `AB:CD:...`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; BYTES]);

impl Fingerprint {
    /// The fingerprint of `certificate`.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
        Fingerprint(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let colon = if index == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02X}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = IdentityError;

    /// Reads 32 bytes of hexadecimal in either case, with or without a colon between two bytes.
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        parse(text).ok_or_else(|| IdentityError::BadFingerprint {
            text: printable(text),
        })
    }
}

fn parse(text: &str) -> Option<Fingerprint> {
    let mut rest = text.as_bytes();
    let mut bytes = [0; BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        if index > 0 {
            rest = rest.strip_prefix(b":").unwrap_or(rest);
        }
        let (&[high, low], tail) = rest.split_first_chunk()?;
        *byte = digit(high)? << 4 | digit(low)?;
        rest = tail;
    }
    rest.is_empty().then_some(Fingerprint(bytes))
}

fn digit(byte: u8) -> Option<u8> {
    let value = char::from(byte).to_digit(16)?;
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_is_the_sha256_that_other_tools_print() {
        let of_nothing = Fingerprint::of(&CertificateDer::from(Vec::new()));
        assert!(
            of_nothing
                .to_string()
                .starts_with("E3:B0:C4:42:98:FC:1C:14")
        );
    }

    #[test]
    fn what_is_no_fingerprint_is_refused() {
        let good = Fingerprint([7; BYTES]).to_string();
        for bad in [
            "",
            "AB",
            &good[1..],
            &format!("{good}:"),
            &format!("{good}:07"),
            &good.replace("07:", "0z:"),
        ] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn printed_and_read_is_the_same(bytes: [u8; BYTES], lower: bool, colons: bool) {
            let mut text = Fingerprint(bytes).to_string();
            if lower { text = text.to_lowercase(); }
            if !colons { text = text.replace(':', ""); }
            prop_assert_eq!(text.parse::<Fingerprint>().unwrap(), Fingerprint(bytes));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Fingerprint>();
        }
    }
}
