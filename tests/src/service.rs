//! The service address: the one clients know, which moves with the workload.
//!
//! The lines of shell here are what an operator writes into the hooks of the two programs.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::host::INTERFACE;

/// An address that belongs to a workload rather than to a host.
#[derive(Debug, Clone, Copy)]
pub struct ServiceAddress(pub Ipv4Addr);

impl ServiceAddress {
    /// The address with a port.
    pub fn port(self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.0, port)
    }

    /// Gives the address to the host at once, with no regard to connections.
    pub fn put(self) -> String {
        format!("ip addr add {}/32 dev {INTERFACE}", self.0)
    }

    /// Source, the workload is frozen: the address leaves this host.
    pub fn on_frozen(self) -> String {
        format!("ip addr del {}/32 dev {INTERFACE}", self.0)
    }

    /// Source, about to run again: the address is back before the first packet leaves.
    pub fn on_thawed(self) -> String {
        format!("ip addr replace {}/32 dev {INTERFACE}", self.0)
    }

    /// Destination, before sockets are restored: the address is here for `bind`, but no packet gets in.
    ///
    /// A packet that arrives before its socket exists would be answered with a reset.
    pub fn before_restore(self) -> String {
        format!(
            "iptables -w -I INPUT -d {0} -j DROP && ip addr add {0}/32 dev {INTERFACE}",
            self.0
        )
    }

    /// Destination, the workload runs: packets get in, and the neighbours learn where the address is now.
    pub fn on_resumed(self) -> String {
        format!(
            "iptables -w -D INPUT -d {0} -j DROP; arping -q -A -c 1 -w 1 -I {INTERFACE} {0} >/dev/null 2>&1 &",
            self.0
        )
    }

    /// Destination, migration given up: as if nothing had been.
    pub fn on_aborted(self) -> String {
        format!(
            "iptables -w -D INPUT -d {0} -j DROP 2>/dev/null; ip addr del {0}/32 dev {INTERFACE} 2>/dev/null; true",
            self.0
        )
    }
}
