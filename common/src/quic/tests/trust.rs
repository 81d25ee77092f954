//! Who accepts whom, and how each side learns of a refusal.

use super::super::*;
use super::lab::*;
use crate::identity;

/// How each side learns of the refusal; the client may learn it late.
async fn refusals(listener: &Listener, client: &Endpoint) -> (Refusal, Refusal) {
    let (at_client, at_server) = meet(listener, client).await;
    let at_client = match at_client {
        Ok(connection) => {
            let error = connection.closed().await;
            QuicError::from_connection(connection.remote_address(), &error)
        }
        Err(error) => error,
    };
    (refused(at_client), refused(at_server.unwrap_err()))
}

fn refused(error: QuicError) -> Refusal {
    match error {
        QuicError::Refused { refusal, .. } => refusal,
        other => panic!("not refused but: {other}"),
    }
}

fn by_client(cause: Cause) -> (Refusal, Refusal) {
    let (by_peer, refused) = (false, true);
    (
        Refusal { by_peer, cause },
        Refusal {
            by_peer: refused,
            cause,
        },
    )
}

fn by_server(cause: Cause) -> (Refusal, Refusal) {
    let (client, server) = by_client(cause);
    (server, client)
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_ca() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Fault);
    let stranger = Identity::load(&lab.path("theirs")).unwrap();
    let endpoint = client(&listener, &stranger, &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_client(Cause::UnknownCa));
}

#[tokio::test]
async fn a_server_refuses_a_client_of_another_ca_and_the_client_learns_it_late() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Fault);
    let endpoint = client(&listener, &lab.two_faced(), &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::UnknownCa));
    assert!(
        seen.0
            .to_string()
            .starts_with("the peer refuses our certificate")
    );
    assert!(
        seen.1
            .to_string()
            .starts_with("we refuse the peer's certificate")
    );
}

#[tokio::test]
async fn a_certificate_that_expires_while_its_host_runs_is_refused_by_both_ends() {
    let lab = Lab::new();
    let (source, outdated) = (lab.source(), lab.outdated().await);
    let listener = server(&source, &Trust::Ca, Role::Fault);
    let endpoint = client(&listener, &outdated, &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::Expired));
    let listener = server(&outdated, &Trust::Ca, Role::Fault);
    let endpoint = client(&listener, &source, &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_client(Cause::Expired));
}

#[tokio::test]
async fn pins_admit_the_pinned_peer_and_nobody_else() {
    let lab = Lab::new();
    let (source, destination) = (lab.source(), lab.destination());
    let pin = |whom: &Identity| Trust::Fingerprints(vec![whom.fingerprint()]);
    let pick = |server_trust: &Trust, client_trust: &Trust| {
        let listener = server(&source, server_trust, Role::Fault);
        let endpoint = client(&listener, &destination, client_trust, Role::Fault);
        (listener, endpoint)
    };
    let (listener, endpoint) = pick(&pin(&destination), &pin(&source));
    let (at_client, at_server) = meet(&listener, &endpoint).await;
    assert!(at_client.is_ok() && at_server.is_ok());
    let (listener, endpoint) = pick(&pin(&source), &pin(&source));
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::NotPinned));
    let (listener, endpoint) = pick(&Trust::Fingerprints(Vec::new()), &pin(&destination));
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_client(Cause::NotPinned));
}

#[tokio::test]
async fn a_pin_does_not_replace_the_ca() {
    let lab = Lab::new();
    let stranger = lab.two_faced();
    let trust = Trust::Fingerprints(vec![stranger.fingerprint()]);
    let listener = server(&lab.source(), &trust, Role::Fault);
    let endpoint = client(&listener, &stranger, &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::UnknownCa));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Fault);
    let mut tls = rustls::ClientConfig::builder_with_provider(identity::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(lab.source().roots.clone())
        .with_no_client_auth();
    tls.alpn_protocols = vec![Role::Fault.alpn().to_vec()];
    let peer = listener.local_addr().unwrap();
    let mtu = Mtu::Known(MAX_MTU);
    let endpoint = bind_client_with(peer, None, tls, Role::Fault, mtu).unwrap();
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::NoCertificate));
}

#[tokio::test]
async fn a_fault_client_is_refused_on_the_bulk_port() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Bulk);
    let endpoint = client(&listener, &lab.destination(), &Trust::Ca, Role::Fault);
    let seen = refusals(&listener, &endpoint).await;
    assert_eq!(seen, by_server(Cause::WrongProtocol));
}
