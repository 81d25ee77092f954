//! OCI containers: what the runtime says of one, and what a bundle says it is made of.
//!
//! Shapes are those of the OCI runtime specification 1.0: `state` prints one JSON object, and `config.json` describes
//! a bundle. Only the fields that decide whether a container can move are read.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::session_file::ContainerName;

/// The runtime that is used when the operator names none.
const DEFAULT_RUNTIME: &str = "runc";
/// Bytes of a `config.json` that are read: a large one has a few tens of KiB.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A container runtime that can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    program: PathBuf,
    root: Option<PathBuf>,
}

/// What the runtime says of a container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ContainerState {
    /// `running`, `paused`, `created` or `stopped`.
    pub status: String,
    /// The container's init as this host numbers it; 0 when it has none.
    #[serde(default)]
    pub pid: i32,
    /// Where its bundle is.
    pub bundle: PathBuf,
}

/// What a container is made of, as far as both hosts must agree on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// Namespaces of its own, sorted; one that is joined by path has `=path` behind its name.
    pub namespaces: Vec<String>,
    /// Where something is mounted in it, and after a colon what (`bind`, or a type of file system), sorted.
    pub mounts: Vec<String>,
    /// It has a terminal.
    pub terminal: bool,
}

/// Why a container cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The runtime cannot be run.
    #[error("cannot run {program}: {error}; install runc, or name it with --runtime")]
    NoRuntime {
        /// What was tried.
        program: String,
        /// The system's word.
        error: io::Error,
    },
    /// The runtime has no lazy checkpoint.
    #[error("{0} cannot checkpoint and restore with --lazy-pages; runc can")]
    NotLazy(String),
    /// The runtime failed.
    #[error("{program} says: {text}")]
    Runtime {
        /// The runtime.
        program: String,
        /// Its last line.
        text: String,
    },
    /// Nobody has this name.
    #[error("there is no container called {id}{}; `{program} list` shows them", within(.root))]
    NoSuchContainer {
        /// The name.
        id: String,
        /// The runtime's directory.
        root: Option<PathBuf>,
        /// The runtime.
        program: String,
    },
    /// The container does not run.
    #[error("container {id} is {status}, not running; only a running container can move")]
    NotRunning {
        /// The name.
        id: String,
        /// Its state.
        status: String,
    },
    /// Another container has the name by now.
    #[error(
        "container {0} is another one than page-server was started for; start page-server again"
    )]
    Replaced(String),
    /// The name is in use.
    #[error("there is already a container called {0} here; choose another name with --runc")]
    NameTaken(String),
    /// A bundle without a usable `config.json` or root filesystem.
    #[error("cannot use the bundle: {path}: {reason}")]
    Bundle {
        /// What is wrong with it.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// A network namespace that the runtime made.
    #[error(
        "container {0} has a network namespace that the runtime made, and runc restores such a one empty, with not even lo up; make the namespace beforehand on both hosts and name its path in the bundles, or share the host's"
    )]
    OwnNetwork(String),
    /// A terminal.
    #[error("container {0} has a terminal, which cannot move; run it without one")]
    Terminal(String),
}

fn within(root: &Option<PathBuf>) -> String {
    root.as_ref()
        .map_or_else(String::new, |root| format!(" in {}", root.display()))
}

impl Runtime {
    /// The runtime `program`, else `runc`, that keeps its containers in `root`, else where it does by itself.
    pub fn find(program: Option<&Path>, root: Option<&Path>) -> Result<Self, ContainerError> {
        let runtime = Runtime {
            program: program.unwrap_or(Path::new(DEFAULT_RUNTIME)).to_owned(),
            root: root.map(Path::to_owned),
        };
        for action in ["checkpoint", "restore"] {
            let help = runtime.ask(&[action, "--help"])?;
            if !String::from_utf8_lossy(&help.stdout).contains("--lazy-pages") {
                return Err(ContainerError::NotLazy(runtime.shown()));
            }
        }
        Ok(runtime)
    }

    /// The program to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Arguments that every command of this runtime begins with; its log goes to `log`.
    pub fn arguments(&self, log: &Path) -> Vec<OsString> {
        let mut arguments = vec![OsString::from("--log"), log.into()];
        if let Some(root) = &self.root {
            arguments.extend([OsString::from("--root"), root.into()]);
        }
        arguments
    }

    /// The runtime's directory, when the operator named one.
    pub fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// Where the runtime keeps what it knows of the container `id`.
    pub fn directory_of(&self, id: &str) -> PathBuf {
        let root = self.root.clone();
        root.unwrap_or_else(|| PathBuf::from("/run/runc")).join(id)
    }

    /// The container `id`, if there is one.
    pub fn state(&self, id: &str) -> Result<Option<ContainerState>, ContainerError> {
        let output = self.ask(&["state", id])?;
        if output.status.success() {
            let state = serde_json::from_slice(&output.stdout);
            return state
                .map(Some)
                .map_err(|error| self.failed(error.to_string()));
        }
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if text.contains("does not exist") {
            return Ok(None);
        }
        Err(self.failed(last_line(&text)))
    }

    /// The container `id`, which must run.
    pub fn running(&self, id: &str) -> Result<ContainerState, ContainerError> {
        let state = self.state(id)?;
        let state = state.ok_or_else(|| ContainerError::NoSuchContainer {
            id: id.to_owned(),
            root: self.root.clone(),
            program: self.shown(),
        })?;
        if state.status != "running" {
            return Err(ContainerError::NotRunning {
                id: id.to_owned(),
                status: state.status,
            });
        }
        Ok(state)
    }

    /// Makes sure that no container is called `id`.
    pub fn check_free(&self, id: &str) -> Result<(), ContainerError> {
        match self.state(id)? {
            None => Ok(()),
            Some(_) => Err(ContainerError::NameTaken(id.to_owned())),
        }
    }

    /// Removes what is left of the container `id`; its processes are killed.
    pub fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let output = self.ask(&["delete", "--force", id])?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(self.failed(last_line(&text)))
    }

    /// What somebody else needs to know to find the container `id`.
    pub fn name_of(&self, id: &str) -> ContainerName {
        ContainerName {
            id: id.to_owned(),
            runtime: self.shown(),
            root: self.root().map(|root| root.display().to_string()),
        }
    }

    fn ask(&self, arguments: &[&str]) -> Result<std::process::Output, ContainerError> {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        let output = command.args(arguments).stdin(Stdio::null()).output();
        output.map_err(|error| ContainerError::NoRuntime {
            program: self.shown(),
            error,
        })
    }

    fn shown(&self) -> String {
        self.program.display().to_string()
    }

    fn failed(&self, text: String) -> ContainerError {
        ContainerError::Runtime {
            program: self.shown(),
            text,
        }
    }
}

/// A container's tasks were killed, and not by its runtime, which must hear of it.
pub fn forget(name: &ContainerName) {
    let root = name.root.as_deref().map(Path::new);
    let runtime = Runtime::find(Some(Path::new(&name.runtime)), root);
    if let Err(error) = runtime.and_then(|runtime| runtime.delete(&name.id)) {
        tracing::warn!(%error, "the container is gone, but the runtime still lists it");
    }
}

fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or("nothing").to_owned()
}

/// The last error in a runtime's log, for an operator's error message.
pub fn quote_runtime(log: &Path) -> Option<String> {
    last_error(&String::from_utf8_lossy(&fs::read(log).ok()?))
}

/// The last error in the text of a runtime's log.
pub fn last_error(log: &str) -> Option<String> {
    let mut lines = log.lines().rev();
    let line = lines.find(|line| line.contains("level=error"))?;
    let message = line.split_once("msg=").map_or(line, |(_, message)| message);
    Some(format!("the runtime says {message}"))
}

/// A directory with a `config.json` and a root filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    directory: PathBuf,
    root: PathBuf,
    mounts: Vec<Mount>,
    facts: ContainerFacts,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    process: Process,
    root: Root,
    #[serde(default)]
    mounts: Vec<Mount>,
    #[serde(default)]
    linux: Linux,
}

#[derive(Default, Deserialize)]
struct Process {
    #[serde(default)]
    terminal: bool,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Mount {
    destination: PathBuf,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    source: PathBuf,
    #[serde(default)]
    options: Vec<String>,
}

#[derive(Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Bundle {
    /// Reads the bundle in `directory`.
    pub fn read(directory: &Path) -> Result<Self, ContainerError> {
        let bundle = Self::read_config(directory)?;
        bundle.check_root()?;
        Ok(bundle)
    }

    /// Reads the bundle in `directory`, whose root filesystem may still have to come.
    pub fn read_config(directory: &Path) -> Result<Self, ContainerError> {
        let config = directory.join("config.json");
        let text = read_limited(&config).map_err(|error| unusable(&config, error.to_string()))?;
        let parsed = Self::parse(directory, &text);
        let parsed = parsed.map_err(|error| unusable(&config, error.to_string()))?;
        let directory =
            fs::canonicalize(directory).map_err(|error| unusable(directory, error.to_string()))?;
        Ok(Bundle {
            directory,
            ..parsed
        })
    }

    /// The bundle in `directory` that has this `config.json`.
    pub fn parse(directory: &Path, config: &[u8]) -> Result<Self, serde_json::Error> {
        let config: Config = serde_json::from_slice(config)?;
        Ok(Bundle {
            directory: directory.to_owned(),
            // A relative path is relative to the bundle; `join` takes an absolute one as it is.
            root: directory.join(&config.root.path),
            facts: facts(&config),
            mounts: config.mounts,
        })
    }

    /// Makes sure that the root filesystem is there.
    pub fn check_root(&self) -> Result<(), ContainerError> {
        match self.root.is_dir() {
            true => Ok(()),
            false => Err(unusable(
                &self.root,
                String::from("there is no root filesystem"),
            )),
        }
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its root filesystem is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What the container is made of.
    pub fn facts(&self) -> &ContainerFacts {
        &self.facts
    }

    /// Where a file of the container is on this host: in its root filesystem, or where a bind mount takes it from.
    pub fn locate(&self, inside: &Path) -> PathBuf {
        let covering = self
            .mounts
            .iter()
            .filter(|mount| mount.is_bind() && inside.starts_with(&mount.destination))
            .max_by_key(|mount| mount.destination.components().count());
        let (base, below) = match covering {
            Some(mount) => (&mount.source, &mount.destination),
            None => (&self.root, &PathBuf::from("/")),
        };
        match inside.strip_prefix(below) {
            // Joining nothing would add a slash, and a file is not a directory.
            Ok(rest) if rest.as_os_str().is_empty() => base.clone(),
            Ok(rest) => base.join(rest),
            Err(_) => base.join(inside),
        }
    }
}

impl Mount {
    /// However the bundle spells it.
    fn kind(&self) -> &str {
        if self.is_bind() { "bind" } else { &self.kind }
    }

    fn is_bind(&self) -> bool {
        self.kind == "bind" || self.options.iter().any(|o| o == "bind" || o == "rbind")
    }
}

fn unusable(path: &Path, reason: String) -> ContainerError {
    ContainerError::Bundle {
        path: path.to_owned(),
        reason,
    }
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > MAX_CONFIG_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too large"));
    }
    fs::read(path)
}

fn facts(config: &Config) -> ContainerFacts {
    let name = |namespace: &Namespace| match namespace.path.is_empty() {
        true => namespace.kind.clone(),
        false => format!("{}=path", namespace.kind),
    };
    let mut namespaces: Vec<String> = config.linux.namespaces.iter().map(name).collect();
    let mut mounts: Vec<String> = config
        .mounts
        .iter()
        .map(|mount| format!("{}:{}", mount.destination.display(), mount.kind()))
        .collect();
    namespaces.sort();
    mounts.sort();
    ContainerFacts {
        namespaces,
        mounts,
        terminal: config.process.terminal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"ociVersion": "1.0.2", "process": {"terminal": false, "args": ["sh"]},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/usr", "type": "bind", "source": "/srv/usr", "options": ["ro"]},
                   {"destination": "/usr/share", "source": "/srv/share", "options": ["rbind"]},
                   {"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}]}}"#;

    fn bundle(config: &str) -> (tempfile::TempDir, Result<Bundle, ContainerError>) {
        let dir = tempfile::tempdir().expect("a directory");
        fs::create_dir(dir.path().join("rootfs")).expect("made");
        fs::write(dir.path().join("config.json"), config).expect("written");
        let bundle = Bundle::read(dir.path());
        (dir, bundle)
    }

    #[test]
    fn a_bundle_says_what_the_container_is_made_of() {
        let (_dir, bundle) = bundle(CONFIG);
        let bundle = bundle.expect("a bundle");
        assert_eq!(bundle.facts().namespaces, ["network=path", "pid"]);
        let mounts = ["/proc:proc", "/usr/share:bind", "/usr:bind"];
        assert_eq!(bundle.facts().mounts, mounts);
    }

    #[test]
    fn files_are_found_below_the_innermost_bind_mount() {
        let (_dir, bundle) = bundle(CONFIG);
        let bundle = bundle.expect("a bundle");
        let locate = |inside: &str| bundle.locate(Path::new(inside));
        assert_eq!(locate("/usr/bin/sh"), Path::new("/srv/usr/bin/sh"));
        assert_eq!(locate("/usr/share/x"), Path::new("/srv/share/x"));
        assert_eq!(locate("/etc/x"), bundle.root.join("etc/x"));
    }

    #[test]
    fn what_is_no_bundle_is_refused_with_its_path() {
        let missing = Bundle::read(Path::new("/nonexistent")).expect_err("no bundle");
        assert!(missing.to_string().contains("/nonexistent/config.json"));
        let (_dir, broken) = bundle("{");
        assert!(matches!(broken, Err(ContainerError::Bundle { .. })));
        let (_dir, rootless) = bundle(r#"{"root": {"path": "elsewhere"}}"#);
        let text = rootless.expect_err("no root filesystem").to_string();
        assert!(text.contains("no root filesystem"), "{text}");
    }

    #[test]
    fn a_missing_runtime_says_what_to_do() {
        let error = Runtime::find(Some(Path::new("/nonexistent/runc")), None).expect_err("none");
        assert!(error.to_string().contains("--runtime"));
    }

    #[test]
    fn the_last_error_of_a_log_is_quoted() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        fs::write(
            &log,
            "time=\"x\" level=warning msg=\"no\"\ntime=\"x\" level=error msg=\"container gone\"\n",
        )
        .expect("written");
        assert_eq!(
            quote_runtime(&log).as_deref(),
            Some("the runtime says \"container gone\"")
        );
        assert_eq!(quote_runtime(&dir.path().join("none")), None);
    }
}
