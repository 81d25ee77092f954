mod lab;
mod trust;

use std::sync::OnceLock;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::UdpSocket;
use tokio::time::sleep;

use super::*;
use lab::{Lab, any_port, client, meet, server};

async fn echo_one_mib(at_client: &Connection, at_server: &Connection) {
    let sent: Vec<u8> = (0..1 << 20)
        .map(|n: u32| n.to_le_bytes()[n as usize % 4])
        .collect();
    let (mut send, mut receive) = at_client.open_bi().await.unwrap();
    let serve = async {
        let (mut send, mut receive) = at_server.accept_bi().await.unwrap();
        while let Some(chunk) = receive.read_chunk(64 * 1024, true).await.unwrap() {
            send.write_chunk(chunk.bytes).await.unwrap();
        }
        send.finish().unwrap();
    };
    let ask = async {
        send.write_all(&sent).await.unwrap();
        send.finish().unwrap();
    };
    let ((), (), got) = tokio::join!(serve, ask, receive.read_to_end(2 << 20));
    assert!(got.unwrap() == sent);
}

#[tokio::test]
async fn hosts_of_one_ca_meet_and_each_role_echoes_a_mebibyte() {
    let lab = Lab::new();
    let (source, destination) = (lab.source(), lab.destination());
    for role in [Role::Fault, Role::Bulk] {
        let listener = server(&source, &Trust::Ca, role);
        let endpoint = client(&listener, &destination, &Trust::Ca, role);
        let (at_client, at_server) = meet(&listener, &endpoint).await;
        let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
        assert_eq!(peer_name(&at_client).unwrap(), "source");
        assert_eq!(peer_name(&at_server).unwrap(), "destination");
        assert_eq!(peer_fingerprint(&at_client), Some(source.fingerprint()));
        echo_one_mib(&at_client, &at_server).await;
    }
}

#[tokio::test]
async fn on_loopback_packets_are_large_even_if_the_server_listens_to_all_addresses() {
    let lab = Lab::new();
    let (trust, path) = (Trust::Ca, PathProfile::default());
    let listener = bind_server(
        any_port("0.0.0.0"),
        &lab.source(),
        &trust,
        Role::Bulk,
        path,
        &FaultGauge::default(),
    )
    .unwrap();
    let peer = SocketAddr::new(
        Ipv4Addr::LOCALHOST.into(),
        listener.local_addr().unwrap().port(),
    );
    let endpoint = bind_client(peer, None, &lab.destination(), &trust, Role::Bulk, path).unwrap();
    let (at_client, at_server) = meet(&listener, &endpoint).await;
    let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
    echo_one_mib(&at_client, &at_server).await;
    for connection in [at_client, at_server] {
        let path = connection.stats().path;
        assert_eq!((path.current_mtu, path.black_holes_detected), (MAX_MTU, 0));
    }
}

#[tokio::test]
async fn elsewhere_the_packet_size_is_found_up_to_that_of_ethernet() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Bulk);
    let peer = listener.local_addr().unwrap();
    let tls = lab
        .destination()
        .client_config(&Trust::Ca, Role::Bulk.alpn())
        .unwrap();
    let endpoint = bind_client_with(peer, None, tls, Role::Bulk, Mtu::Discover).unwrap();
    let (at_client, at_server) = meet(&listener, &endpoint).await;
    let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
    // One probe per round trip: a few rounds of echo are enough, but how many depends on the machine.
    let found = async {
        while at_client.stats().path.current_mtu < 1452 {
            echo_one_mib(&at_client, &at_server).await;
        }
    };
    timeout(HANDSHAKE_TIMEOUT, found).await.unwrap();
    assert_eq!(at_client.stats().path.current_mtu, 1452);
}

/// Where `far` is found at the end of a path that takes packets this long in either direction.
async fn long_way_to(far: SocketAddr, one_way: Duration) -> SocketAddr {
    let (near, there) = (udp().await, udp().await);
    there.connect(far).await.unwrap();
    let address = near.local_addr().unwrap();
    let caller = Arc::new(OnceLock::new());
    let (to_far, from_far, back) = (there.clone(), there, near.clone());
    let called = caller.clone();
    tokio::spawn(async move {
        let mut packet = vec![0; 1 << 16];
        while let Ok((length, from)) = near.recv_from(&mut packet).await {
            called.get_or_init(|| from);
            let (packet, to_far) = (packet[..length].to_vec(), to_far.clone());
            tokio::spawn(async move {
                sleep(one_way).await;
                let _ = to_far.send(&packet).await;
            });
        }
    });
    tokio::spawn(async move {
        let mut packet = vec![0; 1 << 16];
        while let Ok(length) = from_far.recv(&mut packet).await {
            let caller = *caller.get().unwrap();
            let (packet, back) = (packet[..length].to_vec(), back.clone());
            tokio::spawn(async move {
                sleep(one_way).await;
                let _ = back.send_to(&packet, caller).await;
            });
        }
    });
    address
}

async fn udp() -> Arc<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    // The first burst fits, also when we are not given the CPU meanwhile.
    let room = SockRef::from(&socket).set_recv_buffer_size(4 << 20);
    room.unwrap();
    Arc::new(socket)
}

/// The first packets are acknowledged before quinn's estimator has measured anything, and what it assumes is shorter.
#[tokio::test]
async fn bulk_gets_up_to_speed_on_a_path_that_is_longer_than_was_assumed() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Bulk);
    let one_way = 3 * transport::INITIAL_RTT;
    let peer = long_way_to(listener.local_addr().unwrap(), one_way).await;
    let tls = lab
        .destination()
        .client_config(&Trust::Ca, Role::Bulk.alpn())
        .unwrap();
    let endpoint = bind_client_with(peer, None, tls, Role::Bulk, Mtu::Discover).unwrap();
    let accepting = async { listener.next().await.unwrap().finish().await.unwrap() };
    let (at_client, at_server) = tokio::join!(connect(&endpoint, peer), accepting);
    let at_client = at_client.unwrap();
    let before = at_server.stats().path.cwnd;
    let sending = async {
        let mut send = at_server.open_uni().await.unwrap();
        send.write_all(&vec![1; 2 << 20]).await.unwrap();
        send.finish().unwrap();
        send
    };
    let receiving = async {
        let mut receive = at_client.accept_uni().await.unwrap();
        receive.read_to_end(2 << 20).await.unwrap()
    };
    let (_send, got) = tokio::join!(sending, receiving);
    assert_eq!(got.len(), 2 << 20);
    let stats = at_server.stats().path;
    assert!(stats.rtt >= 2 * one_way, "{stats:?}");
    assert!(stats.cwnd > before, "{stats:?}, and at first {before}");
}

#[tokio::test]
async fn a_port_in_use_and_a_foreign_address_are_named() {
    let lab = Lab::new();
    let (source, trust, path) = (lab.source(), Trust::Ca, PathProfile::default());
    let listener = server(&source, &trust, Role::Fault);
    let taken = listener.local_addr().unwrap();
    let error = bind_server(
        taken,
        &source,
        &trust,
        Role::Bulk,
        path,
        &FaultGauge::default(),
    )
    .unwrap_err();
    assert!(matches!(error, QuicError::PortInUse { addr } if addr == taken));
    let text = error.to_string();
    assert!(
        text.contains(&format!("port {} of 127.0.0.1 is in use", taken.port())),
        "{text}"
    );
    let foreign = any_port("192.0.2.1");
    let error = bind_server(
        foreign,
        &source,
        &trust,
        Role::Bulk,
        path,
        &FaultGauge::default(),
    )
    .unwrap_err();
    assert!(matches!(error, QuicError::AddressNotAvailable { addr } if addr == foreign));
}

#[test]
fn an_endpoint_outside_a_runtime_is_an_error() {
    let (lab, path) = (Lab::new(), PathProfile::default());
    let addr = any_port("127.0.0.1");
    let error = bind_server(
        addr,
        &lab.source(),
        &Trust::Ca,
        Role::Bulk,
        path,
        &FaultGauge::default(),
    )
    .unwrap_err();
    assert!(matches!(error, QuicError::NoRuntime));
}

#[tokio::test]
async fn a_silent_server_is_named() {
    let lab = Lab::new();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (peer, path) = (silent.local_addr().unwrap(), PathProfile::default());
    let endpoint = bind_client(peer, None, &lab.source(), &Trust::Ca, Role::Fault, path).unwrap();
    let error = connect(&endpoint, peer).await.unwrap_err();
    assert!(error.is_transient());
    assert!(
        error
            .to_string()
            .contains(&format!("no answer from {peer}")),
        "{error}"
    );
}

#[tokio::test]
async fn what_the_peer_says_when_it_closes_arrives_fit_for_a_log() {
    let lab = Lab::new();
    let listener = server(&lab.source(), &Trust::Ca, Role::Fault);
    let endpoint = client(&listener, &lab.destination(), &Trust::Ca, Role::Fault);
    let (at_client, at_server) = meet(&listener, &endpoint).await;
    let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
    at_server.close(7u32.into(), b"done\x1b[2J");
    let peer = at_client.remote_address();
    match QuicError::from_connection(peer, &at_client.closed().await) {
        QuicError::ClosedByPeer {
            code: 7, reason, ..
        } => assert_eq!(reason, "done?[2J"),
        other => panic!("{other}"),
    }
    let ours = QuicError::from_connection(peer, &at_server.closed().await);
    assert!(matches!(ours, QuicError::Closed { .. }));
}
