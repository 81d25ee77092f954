//! The command line of `page-server`.

mod resume;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use common::address::{self, AddressError, Prefixed};
use common::container::{ContainerError, Runtime};
use common::criu::{CRIU_VARIABLE, Criu};
use common::exit::{Failure, SessionError};
use common::identity::{Fingerprint, Identity, Trust};
use common::lost::{FREEZE_LIMIT, Limit, LostPlan, OnLost, parse_duration, parse_limit};
use common::proto::control::Secret;
use common::quic::PathProfile;
use common::session::State;
use common::session_file::{DEFAULT_DIRECTORY, Remembered, Store};
use common::token;
use nix::unistd::Pid;

pub use self::resume::{Resume, Resumption};
use crate::compression::Mode;
use crate::engine::{Container, Engine};
use crate::external::ExternalPlan;
use crate::files::Files;
use crate::identity_command::IdentityCommand;
use crate::listen::ListenPlan;
use crate::offer::Dumped;
use crate::privileges::check_host;
use crate::session::ServePlan;
use crate::workload::Workload;

/// Source host of a post-copy migration: freezes a process tree and serves its memory to the host it moves to.
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
    /// Make and show the identities by which hosts recognise each other
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Move a running process tree to the host that asks for it
    #[command(after_help = SERVE_HELP)]
    Serve(Box<Serve>),
    /// Serve the memory of a workload that another program froze by `criu dump --lazy-pages`
    #[command(after_help = ATTACH_HELP)]
    Attach(Box<Attach>),
    /// Go on with a session whose page-server was killed after the cutover
    Resume(Resume),
    /// List the sessions of this host: served, orphaned (`resume` goes on with them) or stale
    Sessions(Sessions),
    /// Let the frozen original of a session run again
    Thaw(Thaw),
    /// Kill the frozen original of a session whose copy has every page, when the destination cannot say so itself
    Release(Release),
    /// Used by page-server itself: cleans up should it be killed
    #[command(hide = true)]
    Guard {
        /// The workload's root
        #[arg(long)]
        pid: i32,
        /// The migration's directory
        #[arg(long)]
        directory: PathBuf,
    },
}

const SERVE_HELP: &str = "\
The workload runs on until a destination has connected, was authenticated and has passed its checks. Whatever fails \
before the cutover leaves it running here.

Commands run by `sh -c` with POSTCOPY_PHASE, POSTCOPY_SESSION, POSTCOPY_PID and POSTCOPY_PEER in the environment.

Example: move redis and its service address
  page-server serve --pid $(pidof redis-server) --listen 10.0.0.1:7000 --identity /etc/postcopy \\
      --tcp-established --move-address 10.0.0.100/32 --dev eth0";

const ATTACH_HELP: &str = "\
Waits until the dump is complete and CRIU waits for its lazy-pages daemon, whose place this pair takes: nobody else may \
connect to CRIU's port. When every page has arrived CRIU kills the frozen workload; whatever fails before the cutover \
leaves it running here, and CRIU ends with an error.

Example:
  criu dump --tree $PID --images-dir /var/tmp/images --lazy-pages --address 127.0.0.1 --port 27000 &
  page-server attach --images /var/tmp/images --pid $PID --listen 10.0.0.1:7000 --identity /etc/postcopy";

/// Options of `serve`.
#[derive(Debug, Args)]
pub struct Serve {
    /// PID of the workload's root process; its descendants move along
    #[arg(long, required_unless_present_any = ["images", "runc"], conflicts_with_all = ["images", "runc"])]
    pid: Option<i32>,
    /// Serve a full dump that lies in this directory, in place of a running workload
    #[arg(long, value_name = "DIR", conflicts_with = "runc")]
    images: Option<PathBuf>,
    /// Serve the images to this many destinations, at the same time or one after the other
    #[arg(long, value_name = "N", default_value = "1", requires = "images",
        value_parser = clap::value_parser!(u16).range(1..))]
    fan_out: u16,
    /// Move the running container with this name instead
    #[arg(long, value_name = "ID")]
    runc: Option<String>,
    /// Directory of the container runtime's state [default: the runtime's own]
    #[arg(long, value_name = "DIR", requires = "runc")]
    runc_root: Option<PathBuf>,
    /// The container runtime to use [default: runc from the search path]
    #[arg(long, value_name = "PATH", requires = "runc")]
    runtime: Option<PathBuf>,
    /// One more argument for `runc checkpoint`; may be given several times
    #[arg(
        long,
        value_name = "ARG",
        requires = "runc",
        allow_hyphen_values = true
    )]
    runc_arg: Vec<String>,
    /// Address and UDP port to wait for the destination on
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// UDP port for bulk data at the same address [default: the port after --listen's]
    #[arg(long, value_name = "PORT")]
    bulk_port: Option<u16>,
    /// Directory of this host's identity (`page-server identity init`)
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// Accept only a destination with this certificate fingerprint; may be given several times
    #[arg(long, value_name = "SHA256")]
    accept: Vec<Fingerprint>,
    /// Write a one-time token to this file and require it of the destination
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Give up when no destination has come within this time [default: wait until stopped]
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    /// Send this directory along, as it is at the freeze; may be given several times. lazy-restorer must be given the
    /// same, and makes its own directory equal to it: what is only there is deleted
    #[arg(long, value_name = "PATH", conflicts_with = "images")]
    sync: Vec<PathBuf>,
    /// Both hosts have the same files: there is nothing to send
    #[arg(long, conflicts_with = "sync")]
    shared_fs: bool,
    /// Move established TCP connections too
    #[arg(long)]
    tcp_established: bool,
    /// The workload belongs to a shell's session (its session leader is not part of it)
    #[arg(long)]
    shell_job: bool,
    /// The CRIU to use [default: criu from the search path]
    #[arg(long, value_name = "PATH", env = CRIU_VARIABLE)]
    criu: Option<PathBuf>,
    /// One more argument for `criu dump`; may be given several times
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    criu_arg: Vec<String>,
    /// A service address that moves with the workload: taken off this host while the workload is frozen, and put back if
    /// it runs on here; may be given several times. lazy-restorer must be given the same
    #[arg(
        long,
        value_name = "ADDR/PREFIX",
        requires = "dev",
        conflicts_with = "images"
    )]
    move_address: Vec<Prefixed>,
    /// The network device of --move-address: one for all, or one for each in the same order
    #[arg(long, value_name = "IF", requires = "move_address")]
    dev: Vec<String>,
    /// Command to run when the workload is frozen and its network locked: take its service address away here
    #[arg(long, value_name = "CMD")]
    on_frozen: Option<String>,
    /// Command to run when the migration failed, before the workload runs on: put its service address back
    #[arg(long, value_name = "CMD")]
    on_thawed: Option<String>,
    /// Directory for images, best on a tmpfs [default: /run, /dev/shm or /tmp, the first that is a tmpfs]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Let the workload run on when it has stood still for this long before the cutover, such as 90s or 5m; 0 for no limit
    #[arg(long, value_name = "DURATION", default_value = FREEZE_LIMIT, value_parser = parse_limit)]
    freeze_limit: Limit,
    #[command(flatten)]
    lost: Lost,
    #[command(flatten)]
    state: StateDirectory,
    /// Largest UDP payload to send [default: found out by probing, up to 1452]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
    /// Compress pushed pages: when it makes the push faster, always, or never
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    compress: Mode,
    /// Write a record of the migration to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What is done about a destination that does not come back.
#[derive(Debug, Args)]
struct Lost {
    /// Give a lost destination up after this time, such as 90s, 5m or 2h [default: wait for ever]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    give_up_after: Option<Duration>,
    /// What to do then: keep-paused (say so, and keep the original frozen), kill (the original), or thaw-source (let it
    /// run as soon as the destination has said that its copy is dead; until then as keep-paused)
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
    /// The source's sessions.
    pub fn store(&self) -> Store {
        Store::of_source(&self.state_dir)
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

/// Options of `thaw`.
#[derive(Debug, Args)]
pub struct Thaw {
    /// Where sessions are.
    #[command(flatten)]
    pub state: StateDirectory,
    /// The session, or how its name begins
    #[arg(long, value_name = "ID")]
    pub session: String,
    /// After the cutover: the destination's copy does not run any more, and never will. If it does, two copies of the
    /// workload run, and what either does cannot be undone
    #[arg(long)]
    pub i_know_the_copy_is_dead: bool,
}

/// Options of `release`.
#[derive(Debug, Args)]
pub struct Release {
    /// Where sessions are.
    #[command(flatten)]
    pub state: StateDirectory,
    /// The session, or how its name begins
    #[arg(long, value_name = "ID")]
    pub session: String,
    /// The destination's copy has every page: its lazy-restorer said so. If it has not, what is missing is lost, and the
    /// copy waits for it for ever
    #[arg(long)]
    pub i_know_the_copy_is_whole: bool,
}

impl Serve {
    /// The plan for serving images, when that is what is asked for.
    pub fn images_plan(&self) -> Result<Option<ExternalPlan>, SessionError> {
        let Some(images) = &self.images else {
            return Ok(None);
        };
        let listen = ListenOptions {
            listen: self.listen,
            bulk_port: self.bulk_port,
            identity: &self.identity,
            accept: &self.accept,
            mtu: self.mtu,
        };
        Ok(Some(ExternalPlan {
            images: images.clone(),
            attach_to: None,
            dumped: Dumped {
                tcp_established: self.tcp_established,
                shell_job: self.shell_job,
            },
            fan_out: self.fan_out.into(),
            keep_original: false,
            listen: listen.plan()?,
            wait: self.wait.map(Duration::from_secs),
            token: self.token_file.as_deref().map(new_token).transpose()?,
            work_dir: self.work_dir.clone(),
            ready: |address| println!("listening on {address}"),
            lost: self.lost.plan(),
            remembered: self.remembered(),
            left: Vec::new(),
        }))
    }

    fn remembered(&self) -> Remembered {
        remembered(&self.state, &self.identity, &self.accept)
    }

    /// Checks everything that can be checked before anyone connects.
    pub fn plan(&self) -> Result<ServePlan, SessionError> {
        let fail = |failure, error: &dyn std::fmt::Display| {
            SessionError::new(failure, State::Hello, error)
        };
        check_host()?;
        let listen = ListenOptions {
            listen: self.listen,
            bulk_port: self.bulk_port,
            identity: &self.identity,
            accept: &self.accept,
            mtu: self.mtu,
        };
        let listen = listen.plan()?;
        let engine = self
            .engine()
            .map_err(|error| fail(Failure::BadInput, &error))?;
        let root = match &engine {
            Engine::Runc(container) => container.init(),
            Engine::Criu => Pid::from_raw(self.pid.unwrap_or_default()),
        };
        let workload = Workload::find(root).map_err(|error| fail(Failure::BadInput, &error))?;
        let criu =
            Criu::find(self.criu.as_deref()).map_err(|error| fail(Failure::BadInput, &error))?;
        let addresses = address::pair(&self.move_address, &self.dev)
            .and_then(|addresses| address::check_source(&addresses).map(|()| addresses))
            .map_err(|error| match &error {
                AddressError::Capability(_) | AddressError::Kernel(_) => {
                    fail(Failure::NotPermitted, &error)
                }
                _ => fail(Failure::BadInput, &error),
            })?;
        let token = self.token_file.as_deref().map(new_token).transpose()?;
        let files = Files::offer(workload.root(), &self.sync, self.shared_fs)
            .map_err(|error| fail(Failure::BadInput, &error))?;
        Ok(ServePlan {
            engine,
            workload,
            listen,
            criu,
            criu_args: self.criu_arg.clone(),
            tcp_established: self.tcp_established,
            shell_job: self.shell_job,
            wait: self.wait.map(Duration::from_secs),
            token,
            compress: self.compress,
            files,
            addresses,
            work_dir: self.work_dir.clone(),
            on_frozen: self.on_frozen.clone(),
            on_thawed: self.on_thawed.clone(),
            freeze_limit: self.freeze_limit,
            lost: self.lost.plan(),
            remembered: self.remembered(),
        })
    }

    fn engine(&self) -> Result<Engine, ContainerError> {
        let Some(id) = &self.runc else {
            return Ok(Engine::Criu);
        };
        let runtime = Runtime::find(self.runtime.as_deref(), self.runc_root.as_deref())?;
        Container::find(runtime, id, self.runc_arg.clone()).map(Engine::Runc)
    }
}

/// Options of `attach`.
#[derive(Debug, Args)]
pub struct Attach {
    /// Directory of the dump's images
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// PID of the root process that is being dumped
    #[arg(long)]
    pid: i32,
    /// Make this many clones of it, at the same time or one after the other. The original is killed when all of them are
    /// whole, and runs on when any of them fails
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    fan_out: u16,
    /// The original runs on in any case
    #[arg(long)]
    keep_original: bool,
    /// Address and UDP port to wait for the destination on
    #[arg(long, value_name = "ADDR:PORT")]
    listen: SocketAddr,
    /// UDP port for bulk data at the same address [default: the port after --listen's]
    #[arg(long, value_name = "PORT")]
    bulk_port: Option<u16>,
    /// Directory of this host's identity (`page-server identity init`)
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// Accept only a destination with this certificate fingerprint; may be given several times
    #[arg(long, value_name = "SHA256")]
    accept: Vec<Fingerprint>,
    /// Write a one-time token to this file and require it of the destination
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Give up when no destination has come within this time [default: wait until stopped]
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    /// The dump was made with --tcp-established
    #[arg(long)]
    tcp_established: bool,
    /// The dump was made with --shell-job
    #[arg(long)]
    shell_job: bool,
    /// Directory for the skeleton's links [default: /run, /dev/shm or /tmp, the first that is a tmpfs]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
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

impl Attach {
    /// Checks everything that can be checked before anyone connects.
    pub fn plan(&self) -> Result<ExternalPlan, SessionError> {
        check_host()?;
        if self.tcp_established && (self.fan_out > 1 || self.keep_original) {
            return Err(SessionError::new(
                Failure::BadInput,
                State::Hello,
                "a connection cannot have two ends of one kind: leave --tcp-established out for clones",
            ));
        }
        let listen = ListenOptions {
            listen: self.listen,
            bulk_port: self.bulk_port,
            identity: &self.identity,
            accept: &self.accept,
            mtu: self.mtu,
        };
        Ok(ExternalPlan {
            images: self.images.clone(),
            attach_to: Some(Pid::from_raw(self.pid)),
            dumped: Dumped {
                tcp_established: self.tcp_established,
                shell_job: self.shell_job,
            },
            fan_out: self.fan_out.into(),
            keep_original: self.keep_original,
            listen: listen.plan()?,
            wait: self.wait.map(Duration::from_secs),
            token: self.token_file.as_deref().map(new_token).transpose()?,
            work_dir: self.work_dir.clone(),
            ready: |address| println!("listening on {address}"),
            lost: self.lost.plan(),
            remembered: remembered(&self.state, &self.identity, &self.accept),
            left: Vec::new(),
        })
    }
}

fn remembered(state: &StateDirectory, identity: &Path, accept: &[Fingerprint]) -> Remembered {
    Remembered {
        store: state.store(),
        identity: absolute(identity),
        accept: accept.iter().map(ToString::to_string).collect(),
    }
}

/// Where and for whom to listen, as every subcommand that serves says it.
struct ListenOptions<'a> {
    listen: SocketAddr,
    bulk_port: Option<u16>,
    identity: &'a Path,
    accept: &'a [Fingerprint],
    mtu: Option<u16>,
}

impl ListenOptions<'_> {
    fn plan(&self) -> Result<ListenPlan, SessionError> {
        let identity = Identity::load(self.identity)
            .map_err(|error| SessionError::new(Failure::Identity, State::Hello, error))?;
        Ok(ListenPlan {
            fault: self.listen,
            bulk: SocketAddr::new(self.listen.ip(), self.bulk_port()),
            identity,
            trust: trust(self.accept),
            path: PathProfile { mtu: self.mtu },
        })
    }

    fn bulk_port(&self) -> u16 {
        // Port 0 asks the system for any port, for bulk as well; so does the port after the last one.
        let next = match self.listen.port() {
            0 => 0,
            port => port.wrapping_add(1),
        };
        self.bulk_port.unwrap_or(next)
    }
}

/// A restart may have another working directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn trust(fingerprints: &[Fingerprint]) -> Trust {
    if fingerprints.is_empty() {
        Trust::Ca
    } else {
        Trust::Fingerprints(fingerprints.to_vec())
    }
}

fn new_token(path: &Path) -> Result<Secret, SessionError> {
    token::create(path).map_err(|error| SessionError::new(Failure::BadInput, State::Hello, error))
}
