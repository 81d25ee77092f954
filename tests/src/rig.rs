//! The rig: a switch, two hosts and a client machine, each a network namespace on this machine.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::host::Host;
use crate::namespace;
use crate::service::ServiceAddress;
use crate::shell::run_line;

/// Ends every process of the rig's namespaces and removes them, once the rig's end of its standard input closes.
///
/// A process of its own, so that it also happens when the test or the benchmark is killed.
const WARDEN: &str = r#"
read -r _
for round in $(seq 200); do
  pids=$(for name in "$@"; do ip netns pids "$name"; done)
  [ -n "$pids" ] || break
  kill -9 $pids 2>/dev/null
done
for name in "$@"; do ip netns del "$name"; done
"#;

static RIGS_OF_THIS_PROCESS: AtomicU32 = AtomicU32::new(0);

/// Two hosts and a client on one switch; everything is gone when it is dropped.
#[derive(Debug)]
pub struct Rig {
    /// Where workloads start.
    pub source: Host,
    /// Where they go.
    pub destination: Host,
    /// Where their clients are.
    pub client: Host,
    /// The address that moves with the workload; given to the source to begin with.
    pub service: ServiceAddress,
    switch: String,
    warden: Child,
    folder: TempDir,
}

impl Rig {
    /// Builds the rig. Call it from the thread that starts the processes: mounts are private to that thread.
    pub fn new() -> Result<Self> {
        namespace::make_mounts_private()?;
        let number = RIGS_OF_THIS_PROCESS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("pc{}-{number}", std::process::id());
        let names = ["sw", "src", "dst", "cli"].map(|role| format!("{prefix}-{role}"));
        let warden = start_warden(&names)?;
        let [switch, source, destination, client] = &names;
        namespace::add(switch)?;
        run_line(&format!("ip -n {switch} link add br0 type bridge"))?;
        run_line(&format!("ip -n {switch} link set br0 up"))?;
        let plug_in = |name: &str, number: u8| {
            Host::plug_in(
                name,
                switch,
                &format!("port{number}"),
                Ipv4Addr::new(10, 77, 0, number),
            )
        };
        let rig = Self {
            source: plug_in(source, 1)?,
            destination: plug_in(destination, 2)?,
            client: plug_in(client, 3)?,
            service: ServiceAddress(Ipv4Addr::new(10, 77, 0, 100)),
            switch: switch.clone(),
            warden,
            folder: tempfile::Builder::new()
                .prefix("postcopy-rig-")
                .tempdir()
                .context("no temporary directory")?,
        };
        rig.source.shell(&rig.service.put())?;
        Ok(rig)
    }

    /// The destination becomes the source, and the source the destination.
    pub fn turn_round(&mut self) {
        std::mem::swap(&mut self.source, &mut self.destination);
    }

    /// Makes one more network namespace, with an address of its own on the switch.
    pub fn plug_in(&self, role: &str, number: u8) -> Result<Host> {
        let name = format!("{}-{role}", self.switch);
        let address = Ipv4Addr::new(10, 77, 0, number);
        Host::plug_in(&name, &self.switch, role, address)
    }

    /// The line of shell that sets the switch's port of such a namespace `up` or `down`.
    pub fn set_port(&self, role: &str, state: &str) -> String {
        format!("ip -n {} link set {role} {state}", self.switch)
    }

    /// A directory for files of this run, which goes with the rig.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Makes a directory in the rig's own.
    pub fn make_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder().join(name);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.warden.stdin.take());
        if let Err(error) = self.warden.wait() {
            eprintln!("rig: the warden did not end: {error}");
        }
    }
}

fn start_warden(names: &[String]) -> Result<Child> {
    Command::new("setsid")
        .args(["sh", "-c", WARDEN, "warden"])
        .args(names)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the warden")
}
