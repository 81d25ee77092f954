//! The session's steps. Strictly one after the other; see [`crate::session`] for what may follow what.

use std::fmt;
use std::net::IpAddr;

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::container::ContainerFacts;
use crate::images::{ImagePid, ImagesDigest};
use crate::open_file::OpenFile;
use crate::program_file::ProgramFile;
use crate::proto::files::FilesFacts;
use crate::proto::version::{V1, V3};
use crate::session::State;

/// Identifies one migration in logs, session files and when reconnecting.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl SessionId {
    /// A new name that nobody else has.
    pub fn random() -> Result<Self, NoRandomness> {
        random().map(SessionId)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// The system has no randomness to give.
#[derive(Debug, thiserror::Error)]
#[error("the system's random number generator does not work")]
pub struct NoRandomness;

fn random<const BYTES: usize>() -> Result<[u8; BYTES], NoRandomness> {
    let mut bytes = [0; BYTES];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| NoRandomness)?;
    Ok(bytes)
}

/// A secret of 256 bits that proves to be the peer of this very migration. Never logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// A new secret.
    pub fn random() -> Result<Self, NoRandomness> {
        random().map(Secret)
    }

    /// Compares in a time that does not depend on where the secrets differ.
    pub fn matches(&self, other: &Secret) -> bool {
        self.0
            .iter()
            .zip(&other.0)
            .fold(0, |differences, (a, b)| differences | (a ^ b))
            == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Messages of the destination to the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// Opens a session.
    Hello(Hello),
    /// All checks passed: freeze now.
    Ready,
    /// The whole skeleton has arrived; the restore starts.
    Staged,
    /// The tasks are rebuilt and wait. The source must give the workload away before they may run.
    CutoverRequest,
    /// The workload runs.
    Resumed,
    /// Nothing is owed any more.
    Drained(Tally),
    /// The destination gives up.
    Abort(Abort),
    /// Opens a new connection of a session whose link was lost.
    Resume(Resume),
    /// Part of what the destination holds of one process, after [`Resume`].
    Present(Present),
    /// The whole present map was sent.
    PresentEnd,
    /// Part of what of one process was confirmed never to come, after [`Resume`]; the words of a bitmap too. From
    /// [`V3`] on.
    Withheld(Present),
    /// All checks passed, and the images of this dump are here already: only memory is needed. In place of `Ready`. From
    /// [`V3`] on.
    ReadyWithImages(ImagesDigest),
}

impl ToSource {
    /// The version of the protocol that has this message.
    pub fn since(&self) -> u16 {
        match self {
            ToSource::Withheld(_) | ToSource::ReadyWithImages(_) => V3,
            ToSource::Hello(_)
            | ToSource::Ready
            | ToSource::Staged
            | ToSource::CutoverRequest
            | ToSource::Resumed
            | ToSource::Drained(_)
            | ToSource::Abort(_)
            | ToSource::Resume(_)
            | ToSource::Present(_)
            | ToSource::PresentEnd => V1,
        }
    }
}

/// Messages of the source to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// Accepts the session.
    Welcome(Welcome),
    /// What is going to move.
    Advise(WorkloadFacts),
    /// The freeze begins.
    Freezing,
    /// The skeleton is complete and the operator's `--on-frozen` command has ended: the service address is free.
    Frozen,
    /// The workload is the destination's now; the source will never run it again by itself.
    CutoverGranted,
    /// The source agrees with the tally; the frozen original is being released.
    Complete,
    /// The source gives up.
    Abort(Abort),
    /// Takes the destination back; the bulk connection is to come on this UDP port.
    WelcomeBack {
        /// The port.
        bulk_port: u16,
    },
    /// Huge pages of one process, before [`Complete`](Self::Complete); from version 3 on.
    Huge(HugeAreas),
    /// More of what is going to move, directly after `Advise`. From [`V3`] on.
    AdviseMore(MoreFacts),
}

/// Anonymous memory that lay on huge pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugeAreas {
    /// The process.
    pub pid: ImagePid,
    /// First page and number of pages, at most [`MAX_HUGE_PIECE`](crate::limits::MAX_HUGE_PIECE) times.
    pub areas: Vec<(u64, u64)>,
}

/// Proves to be the destination of a session that lost its link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The version the session speaks.
    pub version: u16,
    /// The session.
    pub session: SessionId,
    /// Its secret from [`Welcome`].
    pub secret: Secret,
}

/// Words of a process's bitmap of received pages; see [`crate::page_set::PageSet::words`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Present {
    /// The process.
    pub pid: ImagePid,
    /// Where in the bitmap these words belong; messages of one process come in order.
    pub first_word: u64,
    /// At most [`MAX_PRESENT_WORDS`](crate::limits::MAX_PRESENT_WORDS) of them.
    pub words: Vec<u64>,
}

/// First message of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol versions the destination speaks.
    pub versions: Vec<u16>,
    /// The one-time token the operator gave to both ends, if any.
    pub token: Option<Secret>,
    /// The destination host's name, for messages.
    pub host: String,
}

/// The source's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version both ends speak from here on.
    pub version: u16,
    /// Name of this migration.
    pub session: SessionId,
    /// Proves on the bulk connection, and when reconnecting, that the same destination speaks.
    pub secret: Secret,
    /// UDP port of the bulk connection.
    pub bulk_port: u16,
    /// The source host's name, for messages.
    pub host: String,
}

/// What the destination must know to say "this cannot work" before anything is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadFacts {
    /// `uname -m` of the source.
    pub architecture: String,
    /// `uname -r` of the source.
    pub kernel: String,
    /// Page size of the source in bytes.
    pub page_size: u64,
    /// CRIU's version on the source.
    pub criu: String,
    /// CPU feature flags of the source as `/proc/cpuinfo` lists them.
    pub cpu_features: Vec<String>,
    /// PIDs and thread IDs the restored tree will need, in its PID namespace.
    pub pids: Vec<u32>,
    /// Name of the root task.
    pub name: String,
    /// Resident memory of the tree in pages.
    pub resident_pages: u64,
    /// Established TCP connections move too.
    pub tcp_established: bool,
    /// The workload belongs to a shell's session.
    pub shell_job: bool,
    /// What the first version does not tell.
    #[serde(skip)]
    pub more: MoreFacts,
}

/// What a destination is told besides [`WorkloadFacts`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoreFacts {
    /// What the container is made of, when the workload is one.
    pub container: Option<Box<ContainerFacts>>,
    /// What the workload has mapped executable.
    pub programs: Vec<ProgramFile>,
    /// Service addresses that the source takes off, and the destination must add.
    pub addresses: Vec<IpAddr>,
    /// What the workload has open that the destination must have too.
    pub open_files: Vec<OpenFile>,
    /// Files that come along.
    pub files: FilesFacts,
}

/// What one end counted, for the comparison at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Lazy pages that crossed the wire, each counted once.
    pub pages: u64,
    /// Sum of the hashes of those pages; see [`crate::digest`].
    pub digest: u64,
    /// Lazy pages that never crossed because the workload removed them first.
    pub discarded: u64,
}

/// Why an end gives up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// Host that gives up.
    pub host: String,
    /// State it was in.
    pub state: State,
    /// What failed and what to do, for the operator.
    pub text: String,
    /// Said by a destination only: whatever it restored is certainly dead and never ran.
    pub copy_is_dead: bool,
}

/// Bulk connection's first message: which session it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkHello {
    /// The session.
    pub session: SessionId,
    /// Its secret from [`Welcome`].
    pub secret: Secret,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A destination of the first version reads these bytes; they do not change.
    #[test]
    fn the_first_version_is_told_what_it_knows() {
        let facts = WorkloadFacts {
            architecture: String::from("a"),
            kernel: String::from("k"),
            page_size: 4096,
            criu: String::from("4"),
            cpu_features: vec![String::from("f")],
            pids: vec![7],
            name: String::from("n"),
            resident_pages: 1,
            tcp_established: true,
            shell_job: false,
            more: MoreFacts {
                container: None,
                programs: vec![ProgramFile {
                    path: String::from("/p"),
                    bytes: 1,
                    digest: 2,
                }],
                addresses: Vec::new(),
                open_files: Vec::new(),
                files: FilesFacts::default(),
            },
        };
        let bytes = postcard::to_extend(&ToDestination::Advise(facts), Vec::new());
        let expected = b"\x01\x01a\x01k\x80\x20\x014\x01\x01f\x01\x07\x01n\x01\x01\x00";
        assert_eq!(bytes.expect("small"), expected);
    }

    #[test]
    fn secrets_compare_and_do_not_print() {
        let mut other = [7; 32];
        let secret = Secret([7; 32]);
        assert!(secret.matches(&Secret(other)));
        other[31] ^= 1;
        assert!(!secret.matches(&Secret(other)));
        assert!(!format!("{secret:?}").contains('7'));
    }
}
