//! Transport settings; what they rest on was measured on loopback, see `docs/decisions/0001-*`.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::{IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::congestion::{FaultGauge, PacedBulk, WatchedCubic};
use super::{QuicError, Role};
use crate::limits::{IDLE_TIMEOUT, KEEP_ALIVE, MAX_BULK_WINDOW_BYTES};

/// Smallest UDP payload that QUIC allows a path to carry, in bytes (RFC 9000, section 14).
pub const MIN_MTU: u16 = 1200;

/// Largest UDP payload we send, in bytes. quinn puts ten packets into one system call without checking that they fit
/// into the 65 507 bytes of one; beyond this every such call would fail.
pub const MAX_MTU: u16 = 6500;

/// UDP payload that fits an Ethernet frame of 1500 bytes behind an IPv6 header.
const ETHERNET_MTU: u16 = 1452;
/// The same behind an IPv4 header.
const LARGEST_OF_ETHERNET: u16 = 1472;

/// Streams a peer may have open: control, demand, and a few for bulk.
const MAX_STREAMS: u32 = 8;

/// Round trip assumed before one was measured. Hosts that migrate to each other are mostly near; on a long path this
/// costs a few repeated handshake packets, nothing else.
pub(super) const INITIAL_RTT: Duration = Duration::from_millis(10);

/// Unacknowledged bytes a fault connection holds; also what one of its streams may have unread.
const FAULT_WINDOW: u32 = 4 << 20;

/// Unacknowledged and unsent bytes a bulk connection holds: 1 Gbit/s at 100 ms. What is on the path is bounded by
/// [`crate::pacing`], and what waits here by the destination's credit.
const BULK_SEND_WINDOW: u64 = 16 << 20;

/// Unread bytes a bulk stream may have: twice the most that is ever in flight, so that flow control never stalls it.
const BULK_STREAM_WINDOW: u32 = 2 * MAX_BULK_WINDOW_BYTES as u32;

/// First congestion windows in bytes.
const FAULT_INITIAL_WINDOW: u64 = 64 * 1024;
const BULK_INITIAL_WINDOW: u64 = 256 * 1024;
const JUMBO_INITIAL_WINDOW: u64 = 1 << 20;

/// What the operator knows of the path between the hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathProfile {
    /// UDP payload in bytes that every packet may have, [`MIN_MTU`] to [`MAX_MTU`]. `None`: [`MAX_MTU`] to a peer on the
    /// loopback interface, and up to 1452, found by probing, to any other.
    pub mtu: Option<u16>,
}

impl PathProfile {
    /// Whether packets are known to be larger than Ethernet's usual frames.
    pub fn has_jumbo_frames(self) -> bool {
        self.mtu.is_some_and(|mtu| mtu > LARGEST_OF_ETHERNET)
    }

    /// The packet size for a peer that is on the loopback interface or not.
    pub(super) fn resolve(self, loopback: bool) -> Result<Mtu, QuicError> {
        match self.mtu {
            Some(mtu) if (MIN_MTU..=MAX_MTU).contains(&mtu) => Ok(Mtu::Known(mtu)),
            Some(mtu) => Err(QuicError::BadMtu { mtu }),
            None if loopback => Ok(Mtu::Known(MAX_MTU)),
            None => Ok(Mtu::Discover),
        }
    }
}

/// How the packet size of a path is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mtu {
    /// By probing, up to what Ethernet carries.
    Discover,
    /// It is this; should packets vanish all the same, quinn falls back to [`MIN_MTU`] and probes again.
    Known(u16),
}

/// Settings of a connection of `role`. A source, which pushes, has a `gauge` that ties its two connections together.
pub(super) fn config(role: Role, mtu: Mtu, gauge: Option<&FaultGauge>) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(MAX_STREAMS.into())
        .max_concurrent_uni_streams(MAX_STREAMS.into())
        .datagram_receive_buffer_size(None)
        .initial_rtt(INITIAL_RTT)
        .max_idle_timeout(idle_timeout())
        .keep_alive_interval(Some(KEEP_ALIVE));
    set_windows(&mut config, role);
    set_mtu(&mut config, mtu);
    config.congestion_controller_factory(congestion(role, mtu, gauge));
    config
}

fn congestion(
    role: Role,
    mtu: Mtu,
    gauge: Option<&FaultGauge>,
) -> Arc<dyn ControllerFactory + Send + Sync> {
    let initial_window = initial_window(role, mtu);
    let mut cubic = CubicConfig::default();
    cubic.initial_window(initial_window);
    match (role, gauge.cloned()) {
        (_, None) => Arc::new(cubic),
        (Role::Fault, Some(gauge)) => Arc::new(WatchedCubic {
            config: Arc::new(cubic),
            gauge,
        }),
        (Role::Bulk, Some(gauge)) => Arc::new(PacedBulk {
            initial_window,
            gauge,
        }),
    }
}

fn idle_timeout() -> Option<IdleTimeout> {
    IdleTimeout::try_from(IDLE_TIMEOUT).ok()
}

fn set_windows(config: &mut TransportConfig, role: Role) {
    let (stream, send) = match role {
        Role::Fault => (FAULT_WINDOW, u64::from(FAULT_WINDOW)),
        Role::Bulk => (BULK_STREAM_WINDOW, BULK_SEND_WINDOW),
    };
    // Twice a stream's, so that one that nobody reads does not block the others.
    let connection = VarInt::from_u32(stream.saturating_mul(2));
    config
        .stream_receive_window(stream.into())
        .receive_window(connection)
        .send_window(send);
}

fn set_mtu(config: &mut TransportConfig, mtu: Mtu) {
    let (initial, upper) = match mtu {
        Mtu::Discover => (MIN_MTU, ETHERNET_MTU),
        Mtu::Known(mtu) => (mtu, mtu),
    };
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(upper);
    config
        .min_mtu(MIN_MTU)
        .initial_mtu(initial)
        .mtu_discovery_config(Some(discovery));
}

fn initial_window(role: Role, mtu: Mtu) -> u64 {
    match (role, mtu) {
        (_, Mtu::Known(mtu)) if mtu > ETHERNET_MTU => JUMBO_INITIAL_WINDOW,
        (Role::Fault, _) => FAULT_INITIAL_WINDOW,
        (Role::Bulk, _) => BULK_INITIAL_WINDOW,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_idle_timeout_is_one_quic_can_express() {
        assert!(idle_timeout().is_some());
    }

    #[test]
    fn only_a_known_mtu_says_that_frames_are_large() {
        let jumbo = |mtu| PathProfile { mtu }.has_jumbo_frames();
        assert_eq!(
            [None, Some(1472), Some(1473)].map(jumbo),
            [false, false, true]
        );
    }

    #[test]
    fn an_mtu_out_of_range_is_refused() {
        for mtu in [0, MIN_MTU - 1, MAX_MTU + 1, u16::MAX] {
            let refused = PathProfile { mtu: Some(mtu) }.resolve(true);
            assert!(matches!(refused, Err(QuicError::BadMtu { mtu: named }) if named == mtu));
        }
    }

    #[test]
    fn the_mtu_given_wins_over_the_one_for_loopback() {
        let given = PathProfile {
            mtu: Some(9000 - 2600),
        };
        assert_eq!(given.resolve(true).unwrap(), Mtu::Known(6400));
        let none = PathProfile::default();
        assert_eq!(none.resolve(true).unwrap(), Mtu::Known(MAX_MTU));
        assert_eq!(none.resolve(false).unwrap(), Mtu::Discover);
    }
}
