//! Faulty peers: a program between the two real ends that does one thing wrong.
//!
//! It holds good identities of both, so to the real destination it is a source and to the real source a destination, and
//! everything else it says is what the other real end says. Each [`Scenario`] is one wrong; what the wrongs are is in
//! `mischief.rs`, and how messages pass in `relay.rs`.

mod claim;
mod message;
mod mischief;
mod relay;

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};

use crate::binaries;
use crate::identity::Identities;
use crate::pair::PORT;
use crate::process::Process;
use crate::rig::Rig;

pub use claim::Claim;
pub use message::Message;
pub use relay::main;

/// The program starts within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// The signal upon which a held message goes on.
const LET_GO: Signal = Signal::SIGUSR1;

/// What is done wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// A source that says nothing more from the skeleton on.
    Stalls,
    /// A source that sends no more pages once the workload runs, until the destination comes again.
    KeepsPages,
    /// A source that sends every pushed page twice.
    Replays,
    /// A source that sends pages of a process nobody dumped.
    SendsUnaskedPages,
    /// A source that sends a page at an address the process had none.
    SendsPagesOutside,
    /// A source whose frame is shorter than its header says.
    SendsWrongLengths,
    /// A source that sends a file whose name is a path.
    NamesAPath,
    /// A source that sends a page with one bit changed, before the workload runs.
    ChangesContent,
    /// A destination that asks for pages outside the frozen pagemap.
    AsksOutside,
    /// A destination that asks for the same page again and again.
    Floods,
    /// A destination that says that its tasks run before it has them.
    SpeaksOutOfTurn,
    /// A destination that is gone in the middle of the restore.
    Vanishes,
    /// A destination that counts other pages than came.
    CountsWrong,
    /// A destination that comes again with another secret, the first time.
    ForgesTheSecret,
    /// A source that answers in a version nobody offered.
    SpeaksAnotherVersion,
    /// A source that says this of its workload or itself.
    Claims(Claim),
    /// A source that, once the workload runs there, sends a page that refers to one that never came.
    RefersToNothing,
    /// A source that, once the workload runs there, sends compressed pages that are none.
    CompressesNonsense,
    /// A source that, once the workload runs there, sends pages of a process nobody dumped.
    SendsUnaskedPagesLate,
    /// A source that, once the workload runs there, says that a page which a thread waits for will never come.
    Withholds,
    /// A source that gives every answer twice.
    AnswersTwice,
    /// A destination that counts more pages than came.
    CountsMore,
    /// Nothing: everything passes.
    Passes,
    /// The first message of this kind stays here until [`FaultyPeer::let_go`].
    Holds(Message),
    /// The path is lost before the first message of this kind passes, and comes back.
    LosesBefore(Message),
    /// The path is lost when the first message of this kind has passed, and comes back.
    LosesAfter(Message),
    /// The path is lost when the question for the cutover has passed, comes back, and is lost again before the first message
    /// of this kind passes.
    LosesAtCutover(Message),
}

impl Scenario {
    const ALL: [(Self, &str); 22] = [
        (Self::ForgesTheSecret, "forges-the-secret"),
        (Self::SpeaksAnotherVersion, "speaks-another-version"),
        (Self::KeepsPages, "keeps-pages"),
        (Self::Passes, "passes"),
        (Self::Stalls, "stalls"),
        (Self::Replays, "replays"),
        (Self::SendsUnaskedPages, "sends-unasked-pages"),
        (Self::SendsPagesOutside, "sends-pages-outside"),
        (Self::SendsWrongLengths, "sends-wrong-lengths"),
        (Self::NamesAPath, "names-a-path"),
        (Self::ChangesContent, "changes-content"),
        (Self::AsksOutside, "asks-outside"),
        (Self::Floods, "floods"),
        (Self::SpeaksOutOfTurn, "speaks-out-of-turn"),
        (Self::Vanishes, "vanishes"),
        (Self::CountsWrong, "counts-wrong"),
        (Self::RefersToNothing, "refers-to-nothing"),
        (Self::CompressesNonsense, "compresses-nonsense"),
        (Self::SendsUnaskedPagesLate, "sends-unasked-pages-late"),
        (Self::Withholds, "withholds"),
        (Self::AnswersTwice, "answers-twice"),
        (Self::CountsMore, "counts-more"),
    ];

    /// Its name on the command line.
    pub fn name(self) -> String {
        match self {
            Self::Holds(message) => format!("holds:{message}"),
            Self::LosesBefore(message) => format!("loses-before:{message}"),
            Self::LosesAfter(message) => format!("loses-after:{message}"),
            Self::Claims(claim) => format!("claims:{claim}"),
            Self::LosesAtCutover(message) => format!("loses-at-cutover:{message}"),
            plain => {
                let found = Self::ALL.iter().find(|(scenario, _)| *scenario == plain);
                found.map_or_else(String::new, |(_, name)| (*name).to_owned())
            }
        }
    }

    /// What takes its place when it has lost the path.
    pub fn next(self) -> Self {
        match self {
            Self::LosesAtCutover(message) => Self::LosesBefore(message),
            _ => Self::Passes,
        }
    }

    /// The scenario of that name.
    pub fn named(name: &str) -> Option<Self> {
        let Some((wrong, message)) = name.split_once(':') else {
            let found = Self::ALL.iter().find(|(_, its_name)| *its_name == name);
            return found.map(|(scenario, _)| *scenario);
        };
        if wrong == "claims" {
            return Claim::named(message).map(Self::Claims);
        }
        let message = Message::named(message)?;
        match wrong {
            "holds" => Some(Self::Holds(message)),
            "loses-before" => Some(Self::LosesBefore(message)),
            "loses-after" => Some(Self::LosesAfter(message)),
            "loses-at-cutover" => Some(Self::LosesAtCutover(message)),
            _ => None,
        }
    }
}

/// A running faulty peer; killed when dropped.
#[derive(Debug)]
pub struct FaultyPeer {
    process: Process,
    address: Ipv4Addr,
}

impl FaultyPeer {
    /// Starts it on the rig's client machine, with both ends' identities.
    pub fn start(rig: &Rig, scenario: Scenario, identities: &Identities) -> Result<Self> {
        let address = rig.client.address();
        let mut command = rig.client.command(binaries::program("faulty-peer")?);
        command
            .arg(scenario.name())
            .arg(format!("{address}:{PORT}"))
            .arg(format!("{}:{PORT}", rig.source.address()))
            .arg(&identities.source)
            .arg(&identities.destination);
        let mut process = Process::start("faulty-peer", &rig.make_folder("logs")?, &mut command)?;
        process.wait_for_output(PATIENCE, "ready")?;
        Ok(Self { process, address })
    }

    /// The address under which it is a source.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Whether it has done its wrong.
    pub fn is_guilty(&self) -> bool {
        self.process.stdout().contains("guilty")
    }

    /// Lets the message go that is held.
    pub fn let_go(&self) -> Result<()> {
        kill(self.process.pid(), LET_GO).context("the peer is gone")
    }
}

/// What the program is told.
#[derive(Debug)]
struct Orders {
    scenario: Scenario,
    listen: std::net::SocketAddr,
    source: std::net::SocketAddr,
    as_source: common::identity::Identity,
    as_destination: common::identity::Identity,
}

impl Orders {
    fn parse(arguments: &[String]) -> Result<Self> {
        let [scenario, listen, source, as_source, as_destination] = arguments else {
            anyhow::bail!("usage: faulty-peer SCENARIO LISTEN SOURCE IDENTITY IDENTITY");
        };
        let identity = |dir: &str| common::identity::Identity::load(Path::new(dir));
        Ok(Self {
            scenario: Scenario::named(scenario)
                .with_context(|| format!("no scenario {scenario:?}"))?,
            listen: listen.parse().context("no address")?,
            source: source.parse().context("no address")?,
            as_source: identity(as_source)?,
            as_destination: identity(as_destination)?,
        })
    }
}
