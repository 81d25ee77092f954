//! The faulty path: a relay on a third host that passes the UDP packets of a migration on, and not always well.
//!
//! It drops, delays, reorders, duplicates and corrupts packets, changes its own port as a NAT does, and goes dark for a
//! while. What happens to a packet follows from the seed and the packet's number alone ([`Fate`]), so a run can be
//! repeated with the seed it printed. Outages begin when the relay is told to, with [`Relay::GO_DARK`].

mod fate;
mod flow;
mod outage;
mod run;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::binaries;
use crate::host::Host;
use crate::pair::PORT;
use crate::process::Process;
use crate::rig::Rig;
use crate::shared_file::{self, Counters};

pub use fate::{Fate, Lane};
pub use outage::Outages;
pub use run::run;

/// The relay starts within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// Chances are counted in packets of ten thousand.
pub const CERTAIN: u64 = 10_000;

/// How badly packets are treated. Chances are in [`CERTAIN`]ths, each drawn for itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Faults {
    /// Determines the fate of every packet.
    pub seed: u64,
    /// Chance to vanish.
    pub drop: u64,
    /// Chance to come twice.
    pub duplicate: u64,
    /// Chance to come with one bit flipped.
    pub corrupt: u64,
    /// Chance to be overtaken by those that follow within [`reorder_us`](Self::reorder_us).
    pub reorder: u64,
    /// How much later such a packet comes, in microseconds, at most.
    pub reorder_us: u64,
    /// How late every packet is, in microseconds.
    pub delay_us: u64,
    /// Packets of a flow to the source after which the relay sends from another port; 0 for never.
    pub rebind_every: u64,
}

/// What the relay is to do, as its program gets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayPlan {
    /// Addresses to listen on, and where each one's packets go.
    pub ports: Vec<(SocketAddrV4, SocketAddrV4)>,
    /// What happens to packets.
    pub faults: Faults,
    /// When the path goes dark.
    pub darkness: Darkness,
}

/// When the path, or a part of it, goes dark.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Darkness {
    /// Milliseconds of darkness and of light, in turns, once the relay was told.
    pub stretches_ms: Vec<u64>,
    /// The only port that goes dark, by index; all of them when not given.
    pub port: Option<usize>,
}

impl Darkness {
    /// On the whole path.
    pub fn of(stretches_ms: &[u64]) -> Self {
        Self {
            stretches_ms: stretches_ms.to_vec(),
            port: None,
        }
    }
}

/// What the relay did to how many packets.
#[derive(Debug, Default)]
#[repr(C)]
pub struct RelayCounters {
    /// Passed on, whatever else happened to them.
    pub passed: AtomicU64,
    /// Dropped by chance.
    pub dropped: AtomicU64,
    /// Sent twice.
    pub duplicated: AtomicU64,
    /// Changed.
    pub corrupted: AtomicU64,
    /// Held back so that others overtook them.
    pub reordered: AtomicU64,
    /// Dropped because the relay was dark.
    pub swallowed: AtomicU64,
    /// Changes of port.
    pub rebound: AtomicU64,
    /// Outages that have ended.
    pub outages: AtomicU64,
}

// SAFETY: nothing but atomic integers.
unsafe impl Counters for RelayCounters {}

/// A running relay; killed when dropped.
#[derive(Debug)]
pub struct Relay {
    process: Process,
    host: Host,
    /// What it did so far.
    pub counters: &'static RelayCounters,
}

impl Relay {
    /// The signal upon which the outages begin.
    pub const GO_DARK: Signal = Signal::SIGUSR1;

    /// Starts a relay to the source's two ports on the rig's client machine.
    pub fn start(rig: &Rig, faults: Faults, darkness: Darkness) -> Result<Self> {
        let host = rig.client.clone();
        let at = SocketAddrV4::new;
        let both = [PORT, PORT + 1];
        let plan = RelayPlan {
            ports: both
                .map(|port| (at(host.address(), port), at(rig.source.address(), port)))
                .to_vec(),
            faults,
            darkness,
        };
        let file = rig.make_folder("relay")?.join("counters");
        let counters = shared_file::map(&file)?;
        let mut command = host.command(binaries::program("udp-relay")?);
        command.arg(file).arg(serde_json::to_string(&plan)?);
        let mut process = Process::start("udp-relay", &rig.make_folder("logs")?, &mut command)?;
        process.wait_for_output(PATIENCE, "ready")?;
        Ok(Self {
            process,
            host,
            counters,
        })
    }

    /// The address under which a destination reaches the source.
    pub fn address(&self) -> Ipv4Addr {
        self.host.address()
    }

    /// A line of shell that begins the outages.
    pub fn go_dark(&self) -> String {
        format!("kill -{} {}", Self::GO_DARK as i32, self.process.pid())
    }

    /// Everything it did, for messages.
    pub fn report(&self) -> String {
        let counters = self.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        format!(
            "relay: {} passed, {} dropped, {} duplicated, {} corrupted, {} reordered, {} swallowed in {} outages, {} new ports",
            load(&counters.passed),
            load(&counters.dropped),
            load(&counters.duplicated),
            load(&counters.corrupted),
            load(&counters.reordered),
            load(&counters.swallowed),
            load(&counters.outages),
            load(&counters.rebound),
        )
    }
}

/// The relay's program: `udp-relay COUNTERS PLAN`.
pub fn main(arguments: &[String]) -> Result<()> {
    let [counters, plan] = arguments else {
        anyhow::bail!("usage: udp-relay COUNTERS PLAN");
    };
    let plan: RelayPlan = serde_json::from_str(plan).context("the plan is no JSON")?;
    let counters = shared_file::map(Path::new(counters))?;
    run(&plan, counters)
}
