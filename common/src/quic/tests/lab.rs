//! Hosts to let meet.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use time::OffsetDateTime;

use super::super::*;
use crate::identity::{self, CA_CERT};

/// Two installations, each with a CA of its own: `ours` and `theirs`.
pub(super) struct Lab {
    dir: TempDir,
}

impl Lab {
    pub(super) fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        identity::init(&dir.path().join("ours"), "source", 30).unwrap();
        identity::init(&dir.path().join("theirs"), "stranger", 30).unwrap();
        Lab { dir }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn issued(&self, ca: &str, name: &str, days: i64) -> PathBuf {
        let dir = self.path(name);
        identity::issue(&self.path(ca), &dir, name, days).unwrap();
        dir
    }

    pub(super) fn source(&self) -> Identity {
        Identity::load(&self.path("ours")).unwrap()
    }

    pub(super) fn destination(&self) -> Identity {
        Identity::load(&self.issued("ours", "destination", 30)).unwrap()
    }

    /// A host whose certificate is `theirs` but that trusts `ours` as well.
    pub(super) fn two_faced(&self) -> Identity {
        let dir = self.issued("theirs", "two-faced", 30);
        append(&self.path("ours").join(CA_CERT), &dir.join(CA_CERT));
        Identity::load(&dir).unwrap()
    }

    /// A host whose certificate was valid when it was loaded and no longer is.
    pub(super) async fn outdated(&self) -> Identity {
        let dir = self.issued("ours", "outdated", 0);
        tokio::time::sleep(Duration::from_millis(2100)).await;
        assert!(Identity::load(&dir).is_err());
        let earlier = OffsetDateTime::now_utc() - time::Duration::MINUTE;
        Identity::load_at(&dir, earlier).unwrap()
    }
}

pub(super) fn append(from: &Path, to: &Path) {
    let both = [fs::read(to).unwrap(), fs::read(from).unwrap()].concat();
    fs::write(to, both).unwrap();
}

pub(super) fn any_port(ip: &str) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), 0)
}

pub(super) fn server(identity: &Identity, trust: &Trust, role: Role) -> Listener {
    let path = PathProfile::default();
    bind_server(
        any_port("127.0.0.1"),
        identity,
        trust,
        role,
        path,
        &FaultGauge::default(),
    )
    .unwrap()
}

pub(super) fn client(
    listener: &Listener,
    identity: &Identity,
    trust: &Trust,
    role: Role,
) -> Endpoint {
    let (peer, path) = (listener.local_addr().unwrap(), PathProfile::default());
    bind_client(peer, None, identity, trust, role, path).unwrap()
}

/// What each side makes of the connection: first the client, then the server.
pub(super) async fn meet(
    listener: &Listener,
    client: &Endpoint,
) -> (Result<Connection, QuicError>, Result<Connection, QuicError>) {
    let mut peer = listener.local_addr().unwrap();
    if peer.ip().is_unspecified() {
        peer.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    let accept = async { listener.next().await.unwrap().finish().await };
    tokio::join!(connect(client, peer), accept)
}
