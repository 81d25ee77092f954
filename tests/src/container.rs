//! A workload in an OCI container, run by the real `runc`: one bundle on each host, which differ in their cgroup only.
//!
//! Both hosts are one machine, so each has a directory of its own for what its runtime knows.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::host::Host;
use crate::pair::PairPlan;
use crate::rig::Rig;
use crate::shell::run;

/// The container's name, on both hosts.
pub const NAME: &str = "box";

static CONTAINERS_OF_THIS_PROCESS: AtomicU32 = AtomicU32::new(0);

/// One host's part: a bundle, and where the runtime keeps its state.
#[derive(Debug)]
pub struct Place {
    host: Host,
    /// The bundle.
    pub bundle: PathBuf,
    /// The runtime's directory.
    pub root: PathBuf,
}

/// A container on the source that can go to the destination.
#[derive(Debug)]
pub struct Container {
    /// Where it runs first.
    pub source: Place,
    /// Where it goes.
    pub destination: Place,
}

impl Container {
    /// Makes both bundles and runs `arguments` in a container on the source.
    pub fn start(rig: &Rig, arguments: &[&str]) -> Result<Self> {
        let container = Self::prepare(rig, arguments)?;
        container.run()?;
        Ok(container)
    }

    /// Makes both bundles.
    pub fn prepare(rig: &Rig, arguments: &[&str]) -> Result<Self> {
        let number = CONTAINERS_OF_THIS_PROCESS.fetch_add(1, Ordering::Relaxed);
        let cgroup = |side: &str| format!("/postcopy-{}-{number}-{side}", std::process::id());
        Ok(Self {
            source: Place::make(rig, &rig.source, "source", &cgroup("source"), arguments)?,
            destination: Place::make(
                rig,
                &rig.destination,
                "destination",
                &cgroup("destination"),
                arguments,
            )?,
        })
    }

    /// Runs it on the source.
    pub fn run(&self) -> Result<()> {
        let run = ["run", "--detach", "--bundle"];
        self.source.runc(&run, true).map(drop)
    }

    /// The plan of a migration of it.
    pub fn plan(&self, rig: &Rig) -> Result<PairPlan> {
        let mut plan = PairPlan::new(rig)?;
        plan.subject = Some(
            [
                "--runc".into(),
                NAME.into(),
                "--runc-root".into(),
                self.source.root.clone().into(),
            ]
            .into(),
        );
        plan.restorer = self.destination_options();
        Ok(plan)
    }

    fn destination_options(&self) -> Vec<OsString> {
        let place = &self.destination;
        vec![
            "--runc".into(),
            NAME.into(),
            "--runc-root".into(),
            place.root.clone().into(),
            "--bundle".into(),
            place.bundle.clone().into(),
        ]
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for place in [&self.source, &self.destination] {
            // It may never have been here; what matters is that no cgroup stays on the machine.
            let _ = place.runc(&["delete", "--force"], false);
        }
    }
}

impl Place {
    fn make(rig: &Rig, host: &Host, side: &str, cgroup: &str, arguments: &[&str]) -> Result<Self> {
        let bundle = rig.make_folder(&format!("bundle-{side}"))?;
        let root = rig.make_folder(&format!("runc-{side}"))?;
        let rootfs = bundle.join("rootfs");
        for folder in ["usr", "etc", "proc", "dev", "tmp", "run", "var", "root"] {
            fs::create_dir_all(rootfs.join(folder))?;
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{link}"), rootfs.join(link))?;
        }
        let place = Self {
            host: host.clone(),
            bundle,
            root,
        };
        place.write_config(&config(arguments, cgroup))?;
        Ok(place)
    }

    /// `runc` on this host.
    pub fn command(&self) -> Command {
        let mut command = self.host.command("runc");
        command.arg("--root").arg(&self.root);
        command
    }

    /// Runs `runc` with the bundle, if it wants one, and the container's name behind `arguments`.
    pub fn runc(&self, arguments: &[&str], with_bundle: bool) -> Result<String> {
        let mut command = self.command();
        command.args(arguments);
        if with_bundle {
            // The container inherits these, and a pipe of ours would not be in its world.
            command.arg(&self.bundle).arg(NAME);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let status = command.status().context("cannot start runc")?;
            ensure!(status.success(), "runc {arguments:?}: {status}");
            return Ok(String::new());
        }
        run(command.arg(NAME))
    }

    /// What the runtime says of the container; `None` when there is none.
    pub fn state(&self) -> Option<(String, Pid)> {
        let text = self.runc(&["state"], false).ok()?;
        let state: Value = serde_json::from_str(&text).ok()?;
        let pid = i32::try_from(state["pid"].as_i64()?).ok()?;
        Some((state["status"].as_str()?.to_owned(), Pid::from_raw(pid)))
    }

    /// The PID of the running container's init.
    pub fn running(&self) -> Result<Pid> {
        let (status, pid) = self.state().context("there is no container")?;
        ensure!(status == "running", "the container is {status}");
        Ok(pid)
    }

    /// The bundle's configuration.
    pub fn config(&self) -> Result<Value> {
        let text = fs::read_to_string(self.config_file())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Changes it.
    pub fn write_config(&self, config: &Value) -> Result<()> {
        fs::write(self.config_file(), config.to_string())?;
        Ok(())
    }

    /// Gives the container a network namespace of its own, or the one at `path`.
    pub fn isolate(&self, path: Option<&Path>) -> Result<()> {
        let mut config = self.config()?;
        let mut network = json!({"type": "network"});
        if let Some(path) = path {
            network["path"] = json!(path);
        }
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        namespaces.context("a list")?.push(network);
        self.write_config(&config)
    }

    fn config_file(&self) -> PathBuf {
        self.bundle.join("config.json")
    }
}

/// The network is the host's: the service address lies there.
fn config(arguments: &[&str], cgroup: &str) -> Value {
    let bind = |path: &str| json!({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]});
    let tmpfs = |path: &str| json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]});
    let kinds = ["pid", "ipc", "uts", "mount"];
    let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({"type": kind})).collect();
    let capabilities = ["CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "cwd": "/", "args": arguments,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"}, tmpfs("/dev"), tmpfs("/tmp"), bind("/usr"), bind("/etc"),
        ],
        "linux": {"cgroupsPath": cgroup, "namespaces": namespaces},
    })
}
