//! Reading and writing the files of an identity.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustls::crypto::ring;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::IdentityError;

/// Bytes of one PEM file; a certificate of ours has 700, and chains of strangers' CAs a few thousand.
const MAX_PEM_BYTES: u64 = 64 * 1024;
const PERMISSIONS: u32 = 0o7777;
const OTHERS: u32 = 0o077;
const OTHERS_WRITE: u32 = 0o022;

/// A private file's mode.
pub(super) const PRIVATE: u32 = 0o600;
/// A public file's mode.
pub(super) const PUBLIC: u32 = 0o644;

/// All certificates of a PEM file, at least one.
pub(super) fn read_certificates(
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    certificates_in(&read_public(path)?, path)
}

/// The content of a file of certificates.
pub(super) fn read_public(path: &Path) -> Result<Vec<u8>, IdentityError> {
    read_bounded(open(path)?, path)
}

/// All certificates in `pem`, the content of `path`: at least one, and no private key, because the file is public.
pub(super) fn certificates_in(
    pem: &[u8],
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    if PrivateKeyDer::from_pem_slice(pem).is_ok() {
        return Err(malformed(
            path,
            "a private key among public certificates".to_owned(),
        ));
    }
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| malformed(path, format!("no PEM ({error})")))?;
    if certificates.is_empty() {
        return Err(malformed(path, "no certificate in it".to_owned()));
    }
    Ok(certificates)
}

/// A chain's first certificate and the others; `path` is where it came from.
pub(super) fn leaf<'a>(
    chain: &'a [CertificateDer<'static>],
    path: &Path,
) -> Result<(&'a CertificateDer<'static>, &'a [CertificateDer<'static>]), IdentityError> {
    chain
        .split_first()
        .ok_or_else(|| malformed(path, "no certificate in it".to_owned()))
}

/// The private key in `path`, provided that only its owner has access to it.
pub(super) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    let file = open(path)?;
    let mode = file.metadata().map_err(|e| unreadable(path, e))?.mode() & PERMISSIONS;
    if mode & OTHERS != 0 {
        return Err(IdentityError::KeyExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let pem = read_bounded(file, path)?;
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| malformed(path, format!("no PEM private key ({error})")))
}

/// The private key in `key_path`, provided that it belongs to the first certificate of `chain`, read from `cert_path`.
pub(super) fn read_key_pair(
    chain: Vec<CertificateDer<'static>>,
    cert_path: &Path,
    key_path: &Path,
) -> Result<CertifiedKey, IdentityError> {
    let key = read_key(key_path)?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => IdentityError::KeyMismatch {
            key: key_path.to_owned(),
            cert: cert_path.to_owned(),
        },
        other => malformed(key_path, format!("no usable private key ({other})")),
    })
}

/// Makes `dir` with mode 0700 unless it is there; an existing one must not be writable by others.
pub(super) fn make_directory(dir: &Path) -> Result<(), IdentityError> {
    let write = |source| IdentityError::Write {
        path: dir.to_owned(),
        source,
    };
    let mut builder = DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(write)?;
    let mode = fs::metadata(dir).map_err(write)?.mode() & PERMISSIONS;
    if mode & OTHERS_WRITE != 0 {
        return Err(IdentityError::DirectoryExposed {
            path: dir.to_owned(),
            mode,
        });
    }
    Ok(())
}

/// Fails if anything is at `path`, a dangling link included.
pub(super) fn check_absent(path: &Path) -> Result<(), IdentityError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(IdentityError::Exists {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(unreadable(path, error)),
    }
}

/// Puts a file with `content` and `mode` at `path` in one step, which must be free. The file never exists half-written
/// or with a wider mode.
pub(super) fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), IdentityError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let written = write_beside(dir, content, mode).map_err(|source| IdentityError::Write {
        path: path.to_owned(),
        source,
    })?;
    match written.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => {
            Err(IdentityError::Exists {
                path: path.to_owned(),
            })
        }
        Err(failed) => Err(IdentityError::Write {
            path: path.to_owned(),
            source: failed.error,
        }),
    }
}

fn write_beside(dir: &Path, content: &[u8], mode: u32) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(".identity-")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(dir)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// Opens a regular file for reading. Never blocks, not even on a FIFO.
fn open(path: &Path) -> Result<File, IdentityError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| unreadable(path, error))?;
    let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
    if !metadata.is_file() {
        return Err(IdentityError::NotAFile {
            path: path.to_owned(),
        });
    }
    Ok(file)
}

fn read_bounded(file: File, path: &Path) -> Result<Vec<u8>, IdentityError> {
    let mut content = Vec::new();
    file.take(MAX_PEM_BYTES + 1)
        .read_to_end(&mut content)
        .map_err(|error| unreadable(path, error))?;
    if content.len() as u64 > MAX_PEM_BYTES {
        return Err(IdentityError::TooLarge {
            path: path.to_owned(),
            limit: MAX_PEM_BYTES,
        });
    }
    Ok(content)
}

fn unreadable(path: &Path, source: io::Error) -> IdentityError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing { path },
        _ => IdentityError::Unreadable { path, source },
    }
}

fn malformed(path: &Path, what: String) -> IdentityError {
    IdentityError::Malformed {
        path: path.to_owned(),
        what,
    }
}
