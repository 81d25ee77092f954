//! What a restarted program must know to go on with a session: one small file for each, in the state directory.
//!
//! A file is written beside the old one, synced and renamed over it, so a reader finds either wholly. It holds the
//! session's secret: the directory and the files are for their owner alone.

mod codec;
mod kept;
mod listing;
mod store;
mod task;
mod whole;

use std::net::SocketAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use self::codec::{DecodeError, decode, encode};
pub use self::kept::Kept;
pub use self::listing::Listed;
pub use self::store::{DEFAULT_DIRECTORY, Entry, Store, StoreError};
pub use self::task::{AtRest, Task, boot_id};
pub use self::whole::{Runs, Whole, WholeProcess};
use crate::address::MovingAddress;
use crate::proto::control::{Secret, SessionId};
use crate::session::State;

/// One end's session, as far as a restart needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionFile {
    /// The session.
    pub id: SessionId,
    /// Where it stood when the file was written.
    pub state: State,
    /// `/proc/sys/kernel/random/boot_id` of this host: no PID means anything after another boot.
    pub boot: String,
    /// The program that serves the session.
    pub program: Task,
    /// The migration's directory; images are in `images` below it.
    pub directory: String,
    /// Directory of this host's identity.
    pub identity: String,
    /// Certificate fingerprints to accept; empty for any of the CA.
    pub accept: Vec<String>,
    /// Largest UDP payload to send, in bytes.
    pub mtu: Option<u16>,
    /// Proves to be a peer of this session.
    pub secret: Secret,
    /// The other host's name.
    pub peer_host: String,
    /// What only this end has.
    pub side: Side,
}

/// What of a program's command line a restart must know.
#[derive(Clone, Debug)]
pub struct Remembered {
    /// Where sessions are kept.
    pub store: Store,
    /// Directory of our identity.
    pub identity: std::path::PathBuf,
    /// Certificates to accept.
    pub accept: Vec<String>,
}

/// What only one end has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// `page-server`'s.
    Source(SourceSide),
    /// `lazy-restorer`'s.
    Destination(DestinationSide),
}

/// Where a source's memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Original {
    /// In tasks that a CRIU of ours holds.
    Frozen(FrozenTasks),
    /// In tasks that a CRIU of somebody else holds, whose images are in this directory.
    Foreign(FrozenTasks, String),
    /// In the images of a full dump in this directory. Other sessions of the same program may be served from them too.
    Images(String),
}

/// A frozen tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenTasks {
    /// Its root.
    pub root: Task,
    /// All of its processes.
    pub tasks: Vec<Task>,
    /// What tells whether one of them ran since; nothing when somebody else holds them.
    pub at_rest: Vec<AtRest>,
    /// The CRIU that holds it.
    pub criu: Task,
    /// The container it is, if it is one.
    pub container: Option<ContainerName>,
}

/// How a container is known to its runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerName {
    /// Its name.
    pub id: String,
    /// The runtime's program.
    pub runtime: String,
    /// The runtime's directory, when it is not its own choice.
    pub root: Option<String>,
}

/// The source's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceSide {
    /// What is served.
    pub original: Original,
    /// The protocol version of the session.
    pub version: u16,
    /// Our CRIU's program; empty when another program ran CRIU.
    pub criu_program: String,
    /// Where the destination looks for the fault port.
    pub fault: SocketAddr,
    /// The bulk port.
    pub bulk: SocketAddr,
    /// The operator's command for a rollback.
    pub on_thawed: Option<String>,
    /// The original becomes more than one copy: no session decides about it alone, and who resumes them lets it run on
    /// in the end.
    pub makes_clones: bool,
}

/// The restored copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationSide {
    /// The source's fault port.
    pub source: SocketAddr,
    /// The source's bulk port.
    pub bulk_port: u16,
    /// The protocol version of the session.
    pub version: u16,
    /// The process that holds the page fault descriptors.
    pub keeper: Task,
    /// Whose tree the copy is: CRIU, or the init of the copy's PID namespace.
    pub anchor: Option<Task>,
    /// That one puts the copy away by itself when what is below it is killed.
    pub anchor_puts_away: bool,
    /// The copy may have been let run. Written before it is; as long as it is false the copy never ran.
    pub may_run: bool,
    /// The restored root.
    pub root: Option<Task>,
    /// All restored processes.
    pub tasks: Vec<Task>,
    /// Service addresses that came along.
    pub addresses: Vec<MovingAddress>,
    /// Where the PID of the root goes.
    pub pidfile: Option<String>,
    /// The operator's command for when the copy runs, until it has been run.
    pub on_resumed: Option<String>,
    /// The container it is, if it is one.
    pub container: Option<ContainerName>,
    /// The copy has every page and needs nobody any more; only the source is still to be told so.
    pub whole: Option<Whole>,
}

/// Whether a session may be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Its program runs.
    Served,
    /// Its program is gone, and what it served is still there.
    Orphaned,
    /// It means nothing any more; never acted on.
    Stale(Staleness),
}

/// Why a session means nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Staleness {
    /// The host was booted since.
    OtherBoot,
    /// The processes have ended; their PIDs may be others' by now.
    TasksGone,
    /// The program was killed before the point of no return: there is nothing to go on with.
    NotGivenAway,
}

impl Original {
    /// The frozen tree, when there is one.
    pub fn frozen(&self) -> Option<&FrozenTasks> {
        match self {
            Original::Frozen(frozen) | Original::Foreign(frozen, _) => Some(frozen),
            Original::Images(_) => None,
        }
    }

    fn is_there(&self) -> bool {
        match self {
            Original::Frozen(frozen) | Original::Foreign(frozen, _) => {
                let mut tasks = frozen.tasks.iter().chain([&frozen.root]);
                tasks.any(|task| task.is_alive())
            }
            Original::Images(directory) => Path::new(directory).is_dir(),
        }
    }
}

impl SessionFile {
    /// Looks at this host: may the session be gone on with?
    pub fn standing(&self) -> Standing {
        if boot_id().as_deref() != Some(self.boot.as_str()) {
            return Standing::Stale(Staleness::OtherBoot);
        }
        if self.program.is_alive() {
            return Standing::Served;
        }
        let held = match &self.side {
            Side::Source(source) => source.original.is_there(),
            // That the copy is dead, or whole, is worth telling the source.
            Side::Destination(destination) => {
                !destination.may_run || destination.whole.is_some() || destination.keeper.is_alive()
            }
        };
        if !held {
            return Standing::Stale(Staleness::TasksGone);
        }
        // A destination that asked for the point of no return may have been granted it.
        if self.state.source_may_thaw() {
            return Standing::Stale(Staleness::NotGivenAway);
        }
        Standing::Orphaned
    }

    /// The source's part.
    pub fn source(&self) -> Option<&SourceSide> {
        match &self.side {
            Side::Source(source) => Some(source),
            Side::Destination(_) => None,
        }
    }

    /// The destination's part.
    pub fn destination(&self) -> Option<&DestinationSide> {
        match &self.side {
            Side::Destination(destination) => Some(destination),
            Side::Source(_) => None,
        }
    }
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Standing::Served => "served",
            Standing::Orphaned => "orphaned",
            Standing::Stale(Staleness::OtherBoot) => "stale: the host was booted since",
            Standing::Stale(Staleness::TasksGone) => "stale: its processes have ended",
            Standing::Stale(Staleness::NotGivenAway) => "stale: nothing was given away",
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn source_file() -> SessionFile {
        let task = Task::find(std::process::id() as i32).expect("we run");
        SessionFile {
            id: SessionId([7; 16]),
            state: State::Cutover,
            boot: boot_id().expect("linux has one"),
            program: Task { pid: 1, start: 0 },
            directory: "/run/postcopy-x".into(),
            identity: "/etc/postcopy".into(),
            accept: vec!["ab".into()],
            mtu: Some(1400),
            secret: Secret([9; 32]),
            peer_host: "b".into(),
            side: Side::Source(SourceSide {
                original: Original::Frozen(FrozenTasks {
                    root: task,
                    tasks: vec![task],
                    at_rest: vec![AtRest {
                        task,
                        threads: 2,
                        sleeps: 3,
                    }],
                    criu: task,
                    container: None,
                }),
                version: 3,
                criu_program: "/usr/sbin/criu".into(),
                fault: "10.0.0.1:7000".parse().expect("an address"),
                bulk: "10.0.0.1:7001".parse().expect("an address"),
                on_thawed: None,
                makes_clones: false,
            }),
        }
    }

    #[test]
    fn what_is_left_of_it_decides() {
        let mut file = source_file();
        assert_eq!(file.standing(), Standing::Orphaned);
        file.state = State::Listen;
        assert_eq!(file.standing(), Standing::Stale(Staleness::NotGivenAway));
        file.state = State::Paused;
        let frozen = |file: &mut SessionFile, change: fn(&mut FrozenTasks)| match &mut file.side {
            Side::Source(source) => match &mut source.original {
                Original::Frozen(frozen) => change(frozen),
                other => unreachable!("{other:?}"),
            },
            other => unreachable!("{other:?}"),
        };
        frozen(&mut file, |frozen| frozen.root.start += 1);
        assert_eq!(file.standing(), Standing::Orphaned, "others are left");
        frozen(&mut file, |frozen| frozen.tasks[0].start += 1);
        assert_eq!(file.standing(), Standing::Stale(Staleness::TasksGone));
        file.program = Task::find(std::process::id() as i32).expect("we run");
        assert_eq!(file.standing(), Standing::Served);
        file.boot.push('x');
        assert_eq!(file.standing(), Standing::Stale(Staleness::OtherBoot));
    }
}
