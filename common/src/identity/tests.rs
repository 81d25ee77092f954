use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn made(days: i64) -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("identity");
    init(&dir, "alpha", days).unwrap();
    (parent, dir)
}

fn problem(dir: &Path) -> String {
    Identity::load(dir).unwrap_err().to_string()
}

#[test]
fn init_makes_an_identity_that_loads_and_only_its_owner_can_read() {
    let (_parent, dir) = made(825);
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join(CA_KEY)), 0o600);
    assert_eq!(mode(&dir.join(HOST_KEY)), 0o600);
    assert_eq!(mode(&dir.join(CA_CERT)) & 0o022, 0);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 4);
    let identity = Identity::load(&dir).unwrap();
    assert_eq!(identity.name(), "alpha");
    let left = identity.not_after() - OffsetDateTime::now_utc();
    assert_eq!(left.whole_days(), 824);
    assert!(!format!("{identity:?}").contains("key"));
}

#[test]
fn an_issued_identity_loads_without_the_ca_key() {
    let (parent, dir) = made(825);
    let other = parent.path().join("other");
    issue(&dir, &other, "beta", 30).unwrap();
    assert!(!other.join(CA_KEY).exists());
    assert_eq!(mode(&other.join(HOST_KEY)), 0o600);
    let identity = Identity::load(&other).unwrap();
    assert_eq!(identity.name(), "beta");
    assert_ne!(
        identity.fingerprint(),
        Identity::load(&dir).unwrap().fingerprint()
    );
    let third = issue(&other, &parent.path().join("third"), "gamma", 30);
    assert!(matches!(third, Err(IdentityError::NoCaKey { .. })));
    assert!(!parent.path().join("third").exists());
}

#[test]
fn no_certificate_outlives_its_ca() {
    let (parent, dir) = made(825);
    let other = parent.path().join("other");
    issue(&dir, &other, "beta", MAX_VALID_DAYS).unwrap();
    let description = describe(&other).unwrap();
    assert_eq!(
        description.host.not_after,
        description.authorities[0].not_after
    );
}

#[test]
fn nothing_is_overwritten() {
    let (parent, dir) = made(825);
    let before = fs::read(dir.join(HOST_KEY)).unwrap();
    for again in [init(&dir, "alpha", 825), issue(&dir, &dir, "alpha", 825)] {
        assert!(matches!(again, Err(IdentityError::Exists { .. })));
    }
    assert_eq!(fs::read(dir.join(HOST_KEY)).unwrap(), before);
    let partial = parent.path().join("partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join(HOST_CERT), "mine").unwrap();
    assert!(init(&partial, "alpha", 825).is_err());
    assert_eq!(fs::read_dir(&partial).unwrap().count(), 1);
}

#[test]
fn an_expired_certificate_is_named_with_its_date_and_can_still_be_described() {
    let (_parent, dir) = made(-3);
    let text = problem(&dir);
    assert!(text.contains("host.pem expired on 20"), "{text}");
    let description = describe(&dir).unwrap();
    assert!(description.can_issue);
    let shown = description.to_string();
    assert!(
        shown.contains("NOT USABLE") && shown.contains("alpha"),
        "{shown}"
    );
    let ca_left = description.authorities[0].not_after - OffsetDateTime::now_utc();
    assert!(ca_left.whole_days() > 3650);
}

#[test]
fn certificates_and_keys_of_different_origin_are_told_apart() {
    let (_parent, dir) = made(825);
    let (_parent, other) = made(825);
    let original = fs::read(dir.join(HOST_KEY)).unwrap();
    fs::write(dir.join(HOST_KEY), fs::read(other.join(HOST_KEY)).unwrap()).unwrap();
    assert!(matches!(
        Identity::load(&dir),
        Err(IdentityError::KeyMismatch { .. })
    ));
    fs::write(dir.join(HOST_KEY), original).unwrap();
    fs::copy(other.join(CA_CERT), dir.join(CA_CERT)).unwrap();
    assert!(matches!(
        Identity::load(&dir),
        Err(IdentityError::NotSignedByCa { .. })
    ));
    let issued = issue(&dir, &dir.join("new"), "beta", 1);
    assert!(matches!(issued, Err(IdentityError::KeyMismatch { .. })));
}

#[test]
fn two_cas_are_trusted_side_by_side() {
    let (_parent, dir) = made(825);
    let (_parent, other) = made(825);
    let mut both = fs::read(other.join(CA_CERT)).unwrap();
    both.extend(fs::read(dir.join(CA_CERT)).unwrap());
    fs::write(dir.join(CA_CERT), both).unwrap();
    assert!(Identity::load(&dir).is_ok());
    assert_eq!(describe(&dir).unwrap().authorities.len(), 2);
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let (_parent, dir) = made(825);
    chmod(&dir.join(HOST_KEY), 0o640);
    let text = problem(&dir);
    assert!(
        text.contains("chmod 600") && text.contains("0640"),
        "{text}"
    );
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    chmod(parent.path(), 0o777);
    let refused = init(parent.path(), "alpha", 825);
    assert!(matches!(
        refused,
        Err(IdentityError::DirectoryExposed { mode: 0o777, .. })
    ));
}

#[test]
fn files_that_are_missing_or_hold_something_else_are_named() {
    let (_parent, dir) = made(825);
    let host = dir.join(HOST_CERT);
    let good = fs::read(&host).unwrap();
    let key = fs::read(dir.join(HOST_KEY)).unwrap();
    let in_der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (content, expected) in [
        (b"".to_vec(), "no certificate in it"),
        (b"hello".to_vec(), "no certificate in it"),
        (b"-----BEGIN CERTIFICATE-----\n!".to_vec(), "no PEM"),
        (in_der.into(), "no X.509"),
        ([good, key].concat(), "a private key among"),
        (vec![b'x'; 70_000], "larger than 65536"),
    ] {
        fs::write(&host, content).unwrap();
        let text = problem(&dir);
        assert!(
            text.contains(expected) && text.contains("host.pem"),
            "{text}"
        );
    }
    fs::remove_file(&host).unwrap();
    assert!(matches!(
        Identity::load(&dir),
        Err(IdentityError::Missing { .. })
    ));
    nix::unistd::mkfifo(&host, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(
        Identity::load(&dir),
        Err(IdentityError::NotAFile { .. })
    ));
}

#[test]
fn a_file_we_may_not_read_is_named() {
    let (_parent, dir) = made(825);
    chmod(&dir.join(HOST_CERT), 0);
    match Identity::load(&dir) {
        Err(IdentityError::Unreadable { path, .. }) => assert_eq!(path, dir.join(HOST_CERT)),
        // Root reads everything.
        Ok(_) => assert!(nix::unistd::geteuid().is_root()),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn names_and_days_have_bounds() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("identity");
    for name in ["", " ", "a\nb", &"x".repeat(MAX_NAME_BYTES + 1)] {
        let refused = init(&dir, name, 1);
        assert!(matches!(refused, Err(IdentityError::BadName { .. })));
    }
    for days in [i64::MIN, -MAX_VALID_DAYS - 1, MAX_VALID_DAYS + 1, i64::MAX] {
        let refused = init(&dir, "alpha", days);
        assert!(matches!(refused, Err(IdentityError::BadDays { .. })));
    }
    assert!(!dir.exists());
    init(&dir, "größter.example", MAX_VALID_DAYS).unwrap();
    assert_eq!(Identity::load(&dir).unwrap().name(), "größter.example");
    init(&parent.path().join("oldest"), "alpha", -MAX_VALID_DAYS).unwrap();
}
