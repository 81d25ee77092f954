//! What can be wrong with an identity.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{MAX_NAME_BYTES, MAX_VALID_DAYS};

/// Why an identity cannot be made, read or used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file of the identity is not there.
    #[error(
        "{path} does not exist; make an identity with `page-server identity init`, or `identity issue` for a further host"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The CA's private key is not there.
    #[error(
        "{path} does not exist; identities are issued from the directory that `page-server identity init` made, which alone holds the CA's key"
    )]
    NoCaKey {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refuses to read a file or directory.
    #[error("cannot read {path}: {source}; run as the file's owner or correct its permissions")]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something other than a regular file is in a file's place.
    #[error("{path} is not a regular file; replace it by a PEM file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file is larger than any key or certificate.
    #[error("{path} is larger than {limit} bytes, too large for a PEM key or certificate")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes allowed.
        limit: u64,
    },
    /// A file's content is not what it should be.
    #[error("{path} is malformed: {what}; restore it from a copy or issue the identity again")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Key and certificate are not a pair.
    #[error(
        "the private key {key} does not belong to the certificate {cert}; copy both from one identity"
    )]
    KeyMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        cert: PathBuf,
    },
    /// Others than the owner have access to a private key.
    #[error(
        "others can access the private key {path} (mode {mode:04o}); run `chmod 600 {path}`, and issue a new identity if it may have been copied"
    )]
    KeyExposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate's time is over.
    #[error(
        "the certificate {path} expired on {not_after}; issue a new one with `page-server identity issue`, and check this host's clock"
    )]
    Expired {
        /// The certificate file.
        path: PathBuf,
        /// Last moment of validity.
        not_after: String,
    },
    /// A certificate's time has not come.
    #[error("the certificate {path} is not valid before {not_before}; check this host's clock")]
    NotYetValid {
        /// The certificate file.
        path: PathBuf,
        /// First moment of validity.
        not_before: String,
    },
    /// The host's certificate is another CA's.
    #[error("the certificate {cert} is not signed by the CA in {ca}; copy both from one identity")]
    NotSignedByCa {
        /// The host's certificate file.
        cert: PathBuf,
        /// The CA's certificate file.
        ca: PathBuf,
    },
    /// The certificate is sound but not made for this purpose.
    #[error(
        "the certificate {path} cannot be used here: {source}; issue one with `page-server identity issue`"
    )]
    Unusable {
        /// The certificate file.
        path: PathBuf,
        /// What the verifier said.
        source: rustls::Error,
    },
    /// A file would have been overwritten.
    #[error("{path} exists already and is not overwritten; remove it or choose another directory")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others could replace files in the directory.
    #[error("others can write to the directory {path} (mode {mode:04o}); run `chmod 700 {path}`")]
    DirectoryExposed {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file or directory cannot be created.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A host name that no certificate can carry.
    #[error("{name:?} is no usable host name; give 1 to {MAX_NAME_BYTES} bytes of printable text")]
    BadName {
        /// What was given, shortened.
        name: String,
    },
    /// A validity that no certificate can carry.
    #[error("{days} days of validity are out of range; give at most {MAX_VALID_DAYS}")]
    BadDays {
        /// What was given.
        days: i64,
    },
    /// The certificate library failed.
    #[error("cannot make {what}: {source}")]
    Make {
        /// What was being made.
        what: &'static str,
        /// What the library said.
        source: rcgen::Error,
    },
    /// Text that is no fingerprint.
    #[error(
        "{text:?} is no certificate fingerprint; give the 32 bytes in hexadecimal (AB:CD:...) as `page-server identity show` prints them"
    )]
    BadFingerprint {
        /// What was given, shortened.
        text: String,
    },
}
