//! The command line of `lazy-restorer`.

mod resume;

use std::env;
use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use common::address::{self, AddressError, Prefixed};
use common::container::{ContainerError, Runtime};
use common::criu::{CRIU_VARIABLE, Criu};
use common::exit::{Failure, SessionError};
use common::identity::{Fingerprint, Identity, Trust};
use common::lost::{
    FREEZE_LIMIT, Limit, LostPlan, MAX_DURATION_SECONDS, OnLost, parse_duration, parse_limit,
};
use common::proto::version;
use common::quic::PathProfile;
use common::session::State;
use common::session_file::{DEFAULT_DIRECTORY, Remembered, Store};
use common::token;

pub use self::resume::Resume;
use crate::advise::{self, Leniency};
use crate::connect::ConnectPlan;
use crate::engine::{Container, Engine};
use crate::external::ExternalPlan;
use crate::files::Files;
use crate::ready::Ready;
use crate::rehearsal::RehearsalPlan;
use crate::session::MigratePlan;
use crate::touches::Touches;

/// For tests of the negotiation only: versions to offer instead of our own, separated by commas.
const VERSIONS_VARIABLE: &str = "POSTCOPY_OFFER_VERSIONS";

/// Destination host of a post-copy migration: restores a workload at once and fetches its memory while it runs.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 110)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// Log more; may be given several times (RUST_LOG overrides it)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring the workload that a page-server offers to this host
    #[command(after_help = RESTORE_HELP)]
    Restore(Box<Restore>),
    /// Go on with a session whose lazy-restorer was killed after the cutover
    Resume(Resume),
    /// List the sessions of this host: served, orphaned (`resume` goes on with them) or stale
    Sessions(Sessions),
    /// Stand in the place of `criu lazy-pages` for a restore that another program runs
    #[command(after_help = LAZY_PAGES_HELP)]
    LazyPages(Box<LazyPages>),
    /// Used by lazy-restorer itself: a PID namespace for the restored workload
    #[command(hide = true)]
    Nursery {
        /// This is PID 1 of the namespace
        #[arg(long)]
        init: bool,
        /// The command to run in it
        #[arg(last = true)]
        command: Vec<OsString>,
    },
}

const RESTORE_HELP: &str = "\
Exits 0 when every page is here and both hosts agree on it; the workload runs on without lazy-restorer.

Commands run by `sh -c` with POSTCOPY_PHASE, POSTCOPY_SESSION, POSTCOPY_PID and POSTCOPY_PEER in the environment.

Example: take redis and its service address over
  lazy-restorer restore --from 10.0.0.1:7000 --identity /etc/postcopy \\
      --move-address 10.0.0.100/32 --dev eth0";

/// What is done about a source that cannot be reached.
#[derive(Debug, Args)]
struct Lost {
    /// Give a lost source up after this time, such as 90s, 5m or 2h [default: try for ever]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    give_up_after: Option<Duration>,
    /// What to do then: keep-paused (say so, and go on trying), kill (the copy here), or thaw-source (kill the copy here
    /// and try to tell the source, which then lets the original run as it was when it was frozen)
    #[arg(long, value_name = "WHAT", default_value = "keep-paused")]
    on_lost: OnLost,
}

impl Lost {
    fn plan(&self) -> LostPlan {
        LostPlan {
            give_up_after: self.give_up_after,
            on_lost: self.on_lost,
        }
    }
}

/// Where sessions are kept.
#[derive(Debug, Args)]
pub struct StateDirectory {
    /// Directory of session files, for a restart after a program was killed
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DIRECTORY)]
    state_dir: PathBuf,
}

impl StateDirectory {
    /// The destination's sessions.
    pub fn store(&self) -> Store {
        Store::of_destination(&self.state_dir)
    }
}

/// Options of `sessions`.
#[derive(Debug, Args)]
pub struct Sessions {
    /// Where they are.
    #[command(flatten)]
    pub state: StateDirectory,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

fn trust(fingerprints: &[Fingerprint]) -> Trust {
    match fingerprints {
        [] => Trust::Ca,
        fingerprints => Trust::Fingerprints(fingerprints.to_vec()),
    }
}

/// Options of `restore`.
#[derive(Debug, Args)]
pub struct Restore {
    /// Address and UDP port of the waiting page-server
    #[arg(long, value_name = "ADDR:PORT")]
    from: String,
    /// Directory of this host's identity (`page-server identity issue`)
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// Accept only a source with this certificate fingerprint; may be given several times
    #[arg(long, value_name = "SHA256")]
    accept: Vec<Fingerprint>,
    /// The token that page-server wrote with --token-file
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Make this directory equal to the source's, as it is at the freeze; may be given several times. What is only here
    /// is deleted. page-server must be given the same
    #[arg(long, value_name = "PATH")]
    sync: Vec<PathBuf>,
    /// Both hosts have the same files: there is nothing to bring
    #[arg(long, conflicts_with = "sync")]
    shared_fs: bool,
    /// Restore into a new PID namespace, for when the workload's PIDs are taken here; an init of ours stays with it
    #[arg(long)]
    pidns: bool,
    /// Restore into this host's PID namespace (the default)
    #[arg(long, conflicts_with = "pidns")]
    detach: bool,
    /// Restore a container with this name
    #[arg(long, value_name = "ID", requires = "bundle", conflicts_with_all = ["pidns", "detach"])]
    runc: Option<String>,
    /// The container's bundle
    #[arg(long, value_name = "DIR", requires = "runc")]
    bundle: Option<PathBuf>,
    /// Directory of the container runtime's state [default: the runtime's own]
    #[arg(long, value_name = "DIR", requires = "runc")]
    runc_root: Option<PathBuf>,
    /// The container runtime to use [default: runc from the search path]
    #[arg(long, value_name = "PATH", requires = "runc")]
    runtime: Option<PathBuf>,
    /// One more argument for `runc restore`; may be given several times
    #[arg(
        long,
        value_name = "ARG",
        requires = "runc",
        allow_hyphen_values = true
    )]
    runc_arg: Vec<String>,
    /// Do not refuse a workload of a CPU with more features than this host's
    #[arg(long)]
    ignore_cpu_features: bool,
    /// Do not compare the programs and libraries the workload has mapped with this host's
    #[arg(long)]
    ignore_programs: bool,
    /// Do not look for the files the workload has open on this host
    #[arg(long)]
    ignore_open_files: bool,
    /// The CRIU to use [default: criu from the search path]
    #[arg(long, value_name = "PATH", env = CRIU_VARIABLE)]
    criu: Option<PathBuf>,
    /// One more argument for `criu restore`; may be given several times
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    criu_arg: Vec<String>,
    /// A service address that moves with the workload: added here before the restore, closed to packets until the
    /// workload's sockets are there, and then announced; may be given several times. page-server must be given the same
    #[arg(long, value_name = "ADDR/PREFIX", requires = "dev")]
    move_address: Vec<Prefixed>,
    /// The network device for --move-address: one for all, or one for each in the same order
    #[arg(long, value_name = "IF", requires = "move_address")]
    dev: Vec<String>,
    /// Command to run before the restore: add the workload's service address here, without announcing it yet
    #[arg(long, value_name = "CMD")]
    before_restore: Option<String>,
    /// Command to run the moment the workload is let run here, its sockets being there: announce its service address
    #[arg(long, value_name = "CMD")]
    on_resumed: Option<String>,
    /// Command to run when the migration failed after --before-restore: take the service address away again
    #[arg(long, value_name = "CMD")]
    on_aborted: Option<String>,
    /// For measurements: fetch nothing but what the workload touches
    #[arg(long, hide = true)]
    no_push: bool,
    /// Leave transparent huge pages as the small pages they arrive as
    #[arg(long)]
    small_pages: bool,
    /// Record the order in which the workload first touches its memory to this file, for --replay; for a while nothing
    /// is pushed then, so the workload is slower
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// How long --record keeps the source from pushing, from the moment the workload runs here
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(..=MAX_DURATION_SECONDS),
        requires = "record"
    )]
    record_for: u64,
    /// Have pages pushed in the order that an earlier migration of the same workload recorded with --record
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Write the PID of the restored root process, as this host numbers it, to this file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Directory for images, best on a tmpfs [default: /run, /dev/shm or /tmp, the first that is a tmpfs]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Give up when the workload has stood still for this long before the cutover, such as 90s or 5m; 0 for no limit
    #[arg(long, value_name = "DURATION", default_value = FREEZE_LIMIT, value_parser = parse_limit)]
    freeze_limit: Limit,
    #[command(flatten)]
    lost: Lost,
    #[command(flatten)]
    state: StateDirectory,
    /// Largest UDP payload to send [default: found out by probing, up to 1452]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
    /// Write a record of the migration to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

const LAZY_PAGES_HELP: &str = "\
Says `ready` when `criu restore --lazy-pages` may begin, and exits 0 when every page is here and both hosts agree on \
it. The images must be those of the dump that page-server offers.

Example:
  lazy-restorer lazy-pages -D /var/tmp/images --from 10.0.0.1:7000 --identity /etc/postcopy --daemon
  criu restore --images-dir /var/tmp/images --lazy-pages --restore-detached";

/// Options of `lazy-pages`.
#[derive(Debug, Args)]
pub struct LazyPages {
    /// Directory of the images that CRIU restores
    #[arg(short = 'D', long, value_name = "DIR")]
    images_dir: PathBuf,
    /// CRIU's work directory, where it looks for lazy-pages.socket [default: the images' directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Address and UDP port of the waiting page-server
    #[arg(long, value_name = "ADDR:PORT", required_unless_present = "port")]
    from: Option<String>,
    /// As CRIU spells --from: its address
    #[arg(long, value_name = "ADDR", requires = "port", conflicts_with = "from")]
    address: Option<String>,
    /// As CRIU spells --from: its UDP port
    #[arg(
        long,
        value_name = "PORT",
        requires = "address",
        conflicts_with = "from"
    )]
    port: Option<u16>,
    /// As CRIU has it; there is no other way here
    #[arg(long, hide = true)]
    page_server: bool,
    /// Directory of this host's identity (`page-server identity issue`)
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// Accept only a source with this certificate fingerprint; may be given several times
    #[arg(long, value_name = "SHA256")]
    accept: Vec<Fingerprint>,
    /// The token that page-server wrote with --token-file
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Return when ready, and go on in the background
    #[arg(short, long)]
    pub daemon: bool,
    /// Write one zero byte to this descriptor when ready, and close it
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Write our PID to this file when ready; it must not exist, and is relative to CRIU's work directory
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Write the log to this file, which is relative to CRIU's work directory
    #[arg(short = 'o', long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// For tests: fetch nothing but what the workload touches
    #[arg(long, hide = true)]
    no_push: bool,
    #[command(flatten)]
    lost: Lost,
    #[command(flatten)]
    state: StateDirectory,
    /// Largest UDP payload to send [default: found out by probing, up to 1452]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
    /// Write a record of the migration to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl LazyPages {
    /// Checks everything that can be checked before the source is asked.
    pub fn plan(&self) -> Result<ExternalPlan, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Hello, error)
        };
        advise::check_host().map_err(|error| fail(Failure::NotPermitted, &error))?;
        let pidfile = self.pidfile.as_ref().map(|file| self.work().join(file));
        if let Some(file) = pidfile.as_ref().filter(|file| file.exists()) {
            let text = format!("--pidfile {} exists", file.display());
            return Err(fail(Failure::BadInput, &text));
        }
        let from = self.from();
        let connect = ConnectOptions {
            from: &from,
            identity: &self.identity,
            accept: &self.accept,
            token_file: self.token_file.as_deref(),
            mtu: self.mtu,
        };
        Ok(ExternalPlan {
            connect: connect.plan()?,
            images: self.images_dir.clone(),
            push: !self.no_push,
            work: self.work().to_owned(),
            ready: Ready {
                status_fd: self.status_fd,
                pidfile,
            },
            lost: self.lost.plan(),
            remembered: remembered(&self.state, &self.identity, &self.accept),
        })
    }

    /// CRIU's work directory; files that CRIU writes are relative to it.
    fn work(&self) -> &Path {
        self.work_dir.as_deref().unwrap_or(&self.images_dir)
    }

    /// Where the log goes instead of to standard error.
    pub fn log_file(&self) -> Option<PathBuf> {
        self.log_file.as_ref().map(|file| self.work().join(file))
    }

    fn from(&self) -> String {
        match (&self.from, &self.address, self.port) {
            (None, Some(address), Some(port)) => match address.parse() {
                Ok(IpAddr::V6(address)) => format!("[{address}]:{port}"),
                _ => format!("{address}:{port}"),
            },
            (from, ..) => from.clone().unwrap_or_default(),
        }
    }
}

/// The command line with CRIU's `-vN` as we spell it, for `lazy-pages`: somebody may have written it for `criu`.
pub fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let given: Vec<OsString> = given.collect();
    if given.get(1).is_none_or(|action| action != "lazy-pages") {
        return given;
    }
    let spelled = |argument: OsString| match criu_log_level(&argument) {
        // CRIU's 2 are warnings, the least of ours.
        Some(level) => vec!["-v".into(); level.saturating_sub(2).into()],
        None => vec![argument],
    };
    given.into_iter().flat_map(spelled).collect()
}

fn criu_log_level(argument: &OsStr) -> Option<u8> {
    argument.to_str()?.strip_prefix("-v")?.parse().ok()
}

fn remembered(state: &StateDirectory, identity: &Path, accept: &[Fingerprint]) -> Remembered {
    Remembered {
        store: state.store(),
        // A restart may have another working directory.
        identity: std::path::absolute(identity).unwrap_or_else(|_| identity.to_owned()),
        accept: accept.iter().map(ToString::to_string).collect(),
    }
}

/// How to reach the source, as every subcommand that does says it.
struct ConnectOptions<'a> {
    from: &'a str,
    identity: &'a Path,
    accept: &'a [Fingerprint],
    token_file: Option<&'a Path>,
    mtu: Option<u16>,
}

impl ConnectOptions<'_> {
    fn plan(&self) -> Result<ConnectPlan, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Hello, error)
        };
        let identity =
            Identity::load(self.identity).map_err(|error| fail(Failure::Identity, &error))?;
        let token = self.token_file.map(token::read).transpose();
        Ok(ConnectPlan {
            source: self
                .source()
                .map_err(|error| fail(Failure::BadInput, &error))?,
            identity,
            trust: trust(self.accept),
            path: PathProfile { mtu: self.mtu },
            versions: offered_versions(),
            token: token.map_err(|error| fail(Failure::BadInput, &error))?,
        })
    }

    fn source(&self) -> Result<SocketAddr, String> {
        let mut addresses = self
            .from
            .to_socket_addrs()
            .map_err(|error| format!("--from {}: {error}", self.from))?;
        addresses
            .next()
            .ok_or_else(|| format!("--from {}: this name has no address", self.from))
    }
}

impl Restore {
    fn engine(&self, files: &Files) -> Result<Engine, ContainerError> {
        let (Some(id), Some(bundle)) = (&self.runc, &self.bundle) else {
            return Ok(if self.pidns {
                Engine::Nursery
            } else {
                Engine::Criu
            });
        };
        let runtime = Runtime::find(self.runtime.as_deref(), self.runc_root.as_deref())?;
        let container = Container::plan(runtime, id, bundle, files, self.runc_arg.clone())?;
        Ok(Engine::Runc(Box::new(container)))
    }

    fn rehearsal(&self) -> Result<RehearsalPlan, String> {
        let read = |file: &PathBuf| {
            Touches::read(file).map_err(|error| format!("--replay {}: {error}", file.display()))
        };
        Ok(RehearsalPlan {
            record: self.record.clone(),
            hold: Duration::from_secs(self.record_for),
            replay: self.replay.as_ref().map(read).transpose()?,
        })
    }

    /// Checks everything that can be checked before the source is asked.
    pub fn plan(&self) -> Result<MigratePlan, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Hello, error)
        };
        advise::check_host().map_err(|error| fail(Failure::NotPermitted, &error))?;
        let criu =
            Criu::find(self.criu.as_deref()).map_err(|error| fail(Failure::BadInput, &error))?;
        let addresses = address::pair(&self.move_address, &self.dev)
            .and_then(|addresses| address::check_destination(&addresses).map(|()| addresses))
            .map_err(|error| match &error {
                AddressError::Capability(_) | AddressError::Kernel(_) => {
                    fail(Failure::NotPermitted, &error)
                }
                _ => fail(Failure::BadInput, &error),
            })?;
        let connect = ConnectOptions {
            from: &self.from,
            identity: &self.identity,
            accept: &self.accept,
            token_file: self.token_file.as_deref(),
            mtu: self.mtu,
        };
        let files = Files::new(&self.sync, self.shared_fs)
            .map_err(|error| fail(Failure::BadInput, &error))?;
        Ok(MigratePlan {
            connect: connect.plan()?,
            criu: Some(criu),
            criu_args: self.criu_arg.clone(),
            engine: self
                .engine(&files)
                .map_err(|error| fail(Failure::BadInput, &error))?,
            leniency: Leniency {
                cpu_features: self.ignore_cpu_features,
                programs: self.ignore_programs,
                open_files: self.ignore_open_files,
            },
            push: !self.no_push,
            huge_pages: !self.small_pages,
            rehearsal: self
                .rehearsal()
                .map_err(|error| fail(Failure::BadInput, &error))?,
            addresses,
            files,
            work_dir: self.work_dir.clone(),
            pidfile: self.pidfile.clone(),
            before_restore: self.before_restore.clone(),
            on_resumed: self.on_resumed.clone(),
            on_aborted: self.on_aborted.clone(),
            freeze_limit: self.freeze_limit,
            lost: self.lost.plan(),
            remembered: remembered(&self.state, &self.identity, &self.accept),
        })
    }
}

fn offered_versions() -> Vec<u16> {
    let offered = env::var(VERSIONS_VARIABLE).unwrap_or_default();
    let versions: Vec<u16> = offered.split(',').filter_map(|v| v.parse().ok()).collect();
    if versions.is_empty() {
        return version::SUPPORTED.to_vec();
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(arguments(line.split(' ').map(OsString::from)))
    }

    #[test]
    fn a_command_line_for_criu_is_understood() {
        let line = "lazy-restorer lazy-pages --page-server --address ::1 --port 7000 -D images -W work -o lazy.log -v4 \
                    --status-fd 3 --daemon --pidfile lazy.pid --identity id";
        let cli = parsed(line).expect("understood");
        assert_eq!(cli.verbose, 2);
        let Command::LazyPages(lazy_pages) = cli.command else {
            panic!("another command");
        };
        assert_eq!(lazy_pages.from(), "[::1]:7000");
        assert_eq!(lazy_pages.log_file(), Some(PathBuf::from("work/lazy.log")));
    }

    #[test]
    fn the_source_is_named_once() {
        for where_it_is in ["", " --address a", " --port 7", " --from a:7 --port 7"] {
            let line = format!("lazy-restorer lazy-pages -D images --identity id{where_it_is}");
            assert!(parsed(&line).is_err(), "{line}");
        }
    }

    #[test]
    fn no_time_is_longer_than_clocks_count() {
        for option in ["--record-for", "--give-up-after", "--freeze-limit"] {
            let line = |time| {
                format!("lazy-restorer restore --from a:7 --identity id --record r {option} {time}")
            };
            assert!(parsed(&line("3153600000")).is_ok(), "{option}");
            assert!(parsed(&line("18446744073709551615")).is_err(), "{option}");
        }
    }

    #[test]
    fn what_is_for_another_program_is_left_alone() {
        let line = "lazy-restorer restore --criu-arg -v4";
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        assert_eq!(arguments(words.clone().into_iter()), words);
    }
}
