//! Service addresses: those that belong to a workload rather than to a host, and move with it.
//!
//! The source *takes* them off its device and notes in the migration's directory what they were, so that whoever lets
//! the workload run there again can put them back. The destination *adds* them behind a shut [`Door`], and *announces*
//! them when the door opens.

mod announce;
mod door;
mod netlink;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::SockProtocol;
use serde::{Deserialize, Serialize};

pub use self::door::{Door, Doorway, Shut};
use self::netlink::{ACK, CREATE, Message, Netlink, REPLACE, REQUEST, attribute, find_attribute};
use crate::host::{self, CAP_NET_ADMIN, CAP_NET_RAW, OldKernel, has_capability};

/// `RTM_NEWADDR`, `RTM_DELADDR` and `RTM_GETADDR`.
const NEW: u16 = 20;
const DELETE: u16 = 21;
const GET: u16 = 22;
/// Bytes of `struct ifaddrmsg`: family, length of the prefix, flags, scope, index of the device.
const HEADER_BYTES: usize = 8;
/// `IFA_ADDRESS`: the peer's on a point-to-point device, else the address.
const ADDRESS: u16 = 1;
/// `IFA_LOCAL`.
const LOCAL: u16 = 2;
/// `IFA_FLAGS`.
const FLAGS: u16 = 8;
/// `IFA_F_SECONDARY`.
const SECONDARY: u32 = 0x01;
/// `IFA_F_NODAD`: usable at once. Nobody else has the address; it comes from the source.
const NO_DAD: u32 = 0x02;
/// The first kernel whose nf_tables know an owner (`NFT_TABLE_F_OWNER`), without which the door would stay shut for ever
/// when its program is killed.
const OLDEST_KERNEL: (u32, u32) = (5, 12);
/// In the migration's directory: what was taken.
const NOTE: &str = "addresses";
/// Addresses of one migration, at most.
pub const MAX_ADDRESSES: usize = 64;

/// An address and the device it is on, on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovingAddress {
    /// The address.
    pub ip: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The device's name.
    pub device: String,
}

/// `ADDR/PREFIX` as an operator writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixed {
    ip: IpAddr,
    prefix: u8,
}

/// Why addresses cannot move.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// No such text.
    #[error("give the address as ADDR/PREFIX, such as 10.0.0.100/32")]
    Syntax,
    /// A prefix that is too long.
    #[error("{0} has no prefix of {1} bits")]
    Prefix(IpAddr, u8),
    /// Which one is on which?
    #[error(
        "--move-address is given {addresses} times and --dev {devices} times; give --dev once for all, or once for each"
    )]
    Devices {
        /// Addresses.
        addresses: usize,
        /// Devices.
        devices: usize,
    },
    /// More than anybody has.
    #[error("more than {MAX_ADDRESSES} addresses")]
    TooMany,
    /// No permission.
    #[error("{0} is missing, without which --move-address cannot work: run as root")]
    Capability(&'static str),
    /// No tables with an owner.
    #[error(transparent)]
    Kernel(#[from] OldKernel),
    /// Not on this host.
    #[error("there is no network device {0} on this host")]
    NoDevice(String),
    /// It would be of no use.
    #[error("the network device {0} is down")]
    DeviceDown(String),
    /// On the source.
    #[error("{ip}/{prefix} is not an address of {device}{elsewhere}")]
    Absent {
        /// The address.
        ip: IpAddr,
        /// Its prefix.
        prefix: u8,
        /// Where it was looked for.
        device: String,
        /// What there is instead.
        elsewhere: String,
    },
    /// On the destination.
    #[error("{0} is an address of this host already; take it away first")]
    Present(IpAddr),
    /// Removing it would remove others.
    #[error(
        "{0} is the first address of its network on {1}, and the kernel would remove the others with it; set net.ipv4.conf.{1}.promote_secondaries=1, or move it with prefix 32"
    )]
    Primary(IpAddr, String),
    /// The system's word.
    #[error("{what}: {error}")]
    System {
        /// What was being done.
        what: String,
        /// Why not.
        error: io::Error,
    },
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> AddressError {
    let what = what.into();
    move |error| AddressError::System { what, error }
}

impl FromStr for Prefixed {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (ip, prefix) = text.split_once('/').ok_or(AddressError::Syntax)?;
        let ip: IpAddr = ip.parse().map_err(|_| AddressError::Syntax)?;
        let prefix: u8 = prefix.parse().map_err(|_| AddressError::Syntax)?;
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        if prefix == 0 || prefix > bits {
            return Err(AddressError::Prefix(ip, prefix));
        }
        Ok(Prefixed { ip, prefix })
    }
}

/// Which address is on which device: one device for all, or one for each.
pub fn pair(
    addresses: &[Prefixed],
    devices: &[String],
) -> Result<Vec<MovingAddress>, AddressError> {
    if addresses.len() > MAX_ADDRESSES {
        return Err(AddressError::TooMany);
    }
    if devices.len() != addresses.len() && devices.len() != 1 {
        return Err(AddressError::Devices {
            addresses: addresses.len(),
            devices: devices.len(),
        });
    }
    let devices = devices.iter().cycle();
    let paired = addresses.iter().zip(devices);
    Ok(paired
        .map(|(address, device)| MovingAddress {
            ip: address.ip,
            prefix: address.prefix,
            device: device.clone(),
        })
        .collect())
}

/// An address as the kernel has it: its `ifaddrmsg` with attributes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Configured {
    ip: IpAddr,
    prefix: u8,
    device: u32,
    flags: u32,
    message: Vec<u8>,
}

impl Configured {
    fn read(message: Vec<u8>) -> Option<Self> {
        let (header, attributes) = message.split_first_chunk::<HEADER_BYTES>()?;
        let value =
            find_attribute(attributes, LOCAL).or_else(|| find_attribute(attributes, ADDRESS))?;
        let ip = match (i32::from(header[0]), value.len()) {
            (libc::AF_INET, 4) => IpAddr::from(*value.first_chunk::<4>()?),
            (libc::AF_INET6, 16) => IpAddr::from(*value.first_chunk::<16>()?),
            _ => return None,
        };
        let flags = find_attribute(attributes, FLAGS).and_then(|value| netlink::u32_at(value, 0));
        Some(Configured {
            ip,
            prefix: header[1],
            device: netlink::u32_at(header, 4)?,
            flags: flags.unwrap_or(u32::from(header[2])),
            message,
        })
    }

    fn is_of_network(&self, other: &Configured) -> bool {
        let (IpAddr::V4(a), IpAddr::V4(b)) = (self.ip, other.ip) else {
            return false;
        };
        let differ = a.to_bits() ^ b.to_bits();
        self.device == other.device
            && self.prefix == other.prefix
            && differ.leading_zeros() >= u32::from(self.prefix)
    }
}

fn route() -> Result<Netlink, AddressError> {
    Netlink::open(SockProtocol::NetlinkRoute).map_err(system("netlink"))
}

fn configured() -> Result<Vec<Configured>, AddressError> {
    let any = vec![0; HEADER_BYTES];
    let entries = route()?
        .list(GET, any)
        .map_err(system("listing addresses"))?;
    Ok(entries.into_iter().filter_map(Configured::read).collect())
}

fn index_of(device: &str) -> Result<u32, AddressError> {
    if_nametoindex(device).map_err(|_| AddressError::NoDevice(device.to_owned()))
}

fn change(message: Message, what: impl Into<String>) -> Result<(), AddressError> {
    route()?.ask(&[message]).map_err(system(what))
}

fn check_host() -> Result<(), AddressError> {
    host::check_kernel(&host::kernel(), OLDEST_KERNEL, " for --move-address")?;
    for (number, name) in [
        (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
        (CAP_NET_RAW, "CAP_NET_RAW"),
    ] {
        if !has_capability(number) {
            return Err(AddressError::Capability(name));
        }
    }
    Ok(())
}

/// On the source: every address is there and can be taken.
pub fn check_source(addresses: &[MovingAddress]) -> Result<(), AddressError> {
    if addresses.is_empty() {
        return Ok(());
    }
    check_host()?;
    let configured = configured()?;
    for address in addresses {
        let found = address.find(&configured)?;
        let has_followers = configured
            .iter()
            .any(|other| other.flags & SECONDARY != 0 && other.is_of_network(found));
        if found.flags & SECONDARY == 0 && has_followers && !promotes(&address.device) {
            return Err(AddressError::Primary(address.ip, address.device.clone()));
        }
    }
    Ok(())
}

/// Whether the kernel keeps the other addresses of a network when the first one goes.
fn promotes(device: &str) -> bool {
    let is_set = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries");
        fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
    };
    is_set("all") || is_set(device)
}

/// On the destination: every device is ready and no address is there.
pub fn check_destination(addresses: &[MovingAddress]) -> Result<(), AddressError> {
    if addresses.is_empty() {
        return Ok(());
    }
    check_host()?;
    let configured = configured()?;
    for address in addresses {
        index_of(&address.device)?;
        if !is_up(&address.device)? {
            return Err(AddressError::DeviceDown(address.device.clone()));
        }
        if configured.iter().any(|other| other.ip == address.ip) {
            return Err(AddressError::Present(address.ip));
        }
    }
    Ok(())
}

fn is_up(device: &str) -> Result<bool, AddressError> {
    let entries = getifaddrs().map_err(|errno| system("listing devices")(errno.into()))?;
    let mut entries = entries.filter(|entry| entry.interface_name == device);
    Ok(entries.any(|entry| entry.flags.contains(InterfaceFlags::IFF_UP)))
}

impl MovingAddress {
    fn find<'a>(&self, configured: &'a [Configured]) -> Result<&'a Configured, AddressError> {
        let device = index_of(&self.device)?;
        let mut of_ip = configured.iter().filter(|other| other.ip == self.ip);
        let exact = of_ip
            .clone()
            .find(|other| other.device == device && other.prefix == self.prefix);
        exact.ok_or_else(|| AddressError::Absent {
            ip: self.ip,
            prefix: self.prefix,
            device: self.device.clone(),
            elsewhere: of_ip
                .next()
                .map(|other| {
                    format!(
                        "; this host has {}/{} on {}",
                        other.ip,
                        other.prefix,
                        name_of(other.device)
                    )
                })
                .unwrap_or_default(),
        })
    }

    /// The kernel's message for this address.
    fn message(&self) -> Result<Vec<u8>, AddressError> {
        let (family, octets) = match self.ip {
            IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
        };
        let mut body = vec![family as u8, self.prefix, 0, 0];
        body.extend(index_of(&self.device)?.to_ne_bytes());
        attribute(&mut body, LOCAL, &octets);
        attribute(&mut body, ADDRESS, &octets);
        if self.ip.is_ipv6() {
            attribute(&mut body, FLAGS, &NO_DAD.to_ne_bytes());
        }
        Ok(body)
    }
}

fn name_of(device: u32) -> String {
    let name = nix::net::if_::if_indextoname(device);
    name.map_or_else(
        |_| format!("device {device}"),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Takes the addresses off this host. What they were is noted in `directory` first.
pub fn take(addresses: &[MovingAddress], directory: &Path) -> Result<(), AddressError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let configured = configured()?;
    let found: Vec<&Configured> = addresses
        .iter()
        .map(|address| address.find(&configured))
        .collect::<Result<_, _>>()?;
    let note = postcard::to_extend(&found, Vec::new())
        .map_err(|error| system("noting addresses")(io::Error::other(error)))?;
    fs::write(directory.join(NOTE), note).map_err(system("noting addresses"))?;
    for address in found {
        let message = Message {
            kind: DELETE,
            flags: REQUEST | ACK,
            body: address.message.clone(),
        };
        change(message, format!("removing {}", address.ip))?;
    }
    Ok(())
}

/// Puts back and announces what was taken and noted in `directory`; without a note there is nothing to do.
///
/// May be called again, by whoever else lets the workload run.
pub fn put_back(directory: &Path) -> Result<(), AddressError> {
    let path = directory.join(NOTE);
    let note = match fs::read(&path) {
        Ok(note) => note,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("reading the note of addresses")(error)),
    };
    let taken: Vec<Configured> = postcard::from_bytes(&note)
        .map_err(|error| system("reading the note of addresses")(io::Error::other(error)))?;
    for address in &taken {
        let mut body = address.message.clone();
        if address.ip.is_ipv6() {
            body = without_dad(&address.message);
        }
        let message = Message {
            kind: NEW,
            flags: REQUEST | ACK | CREATE | REPLACE,
            body,
        };
        change(message, format!("putting {} back", address.ip))?;
    }
    for address in &taken {
        announce(&[MovingAddress {
            ip: address.ip,
            prefix: address.prefix,
            device: name_of(address.device),
        }]);
    }
    fs::remove_file(&path).map_err(system("removing the note of addresses"))
}

/// The same message with [`NO_DAD`].
fn without_dad(message: &[u8]) -> Vec<u8> {
    let (header, attributes) = message.split_at(HEADER_BYTES.min(message.len()));
    let mut body = header.to_vec();
    for kind in [ADDRESS, LOCAL] {
        if let Some(value) = find_attribute(attributes, kind) {
            attribute(&mut body, kind, value);
        }
    }
    attribute(&mut body, FLAGS, &NO_DAD.to_ne_bytes());
    body
}

/// Adds the addresses to this host, without a word to anybody.
pub fn add(addresses: &[MovingAddress]) -> Result<(), AddressError> {
    for address in addresses {
        let message = Message {
            kind: NEW,
            flags: REQUEST | ACK | CREATE | REPLACE,
            body: address.message()?,
        };
        change(message, format!("adding {}", address.ip))?;
    }
    Ok(())
}

/// Removes the addresses from this host, as far as they are there.
pub fn remove(addresses: &[MovingAddress]) -> Result<(), AddressError> {
    let mut result = Ok(());
    for address in addresses {
        let message = Message {
            kind: DELETE,
            flags: REQUEST | ACK,
            body: address.message()?,
        };
        match change(message, format!("removing {}", address.ip)) {
            Err(AddressError::System { error, .. })
                if error.raw_os_error() == Some(Errno::EADDRNOTAVAIL as i32) => {}
            Err(error) => result = Err(error),
            Ok(()) => {}
        }
    }
    result
}

/// Tells the neighbours that the addresses are here.
pub fn announce(addresses: &[MovingAddress]) {
    for address in addresses {
        if let Err(error) = announce::announce(address) {
            tracing::warn!(%error, ip = %address.ip, "neighbours will learn late where it is");
        }
    }
}
