//! Sessions as the operator is shown them: everything but the secret.

use serde::Serialize;

use super::{Entry, SessionFile, Side, Standing};

/// One line of `sessions`.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// The file.
    pub path: String,
    /// The session; empty when the file cannot be read.
    pub session: String,
    /// The state it was in when it was written last.
    pub state: Option<&'static str>,
    /// Whether it can be gone on with.
    pub standing: Option<Standing>,
    /// Why the file cannot be read.
    pub error: Option<String>,
    /// PID of the program that serves it, or did.
    pub program: Option<i32>,
    /// PID of the workload's root on this host.
    pub root: Option<i32>,
    /// The other host.
    pub peer: Option<String>,
}

impl Listed {
    /// What is shown of an entry.
    pub fn of(entry: &Entry) -> Self {
        let path = entry.path.display().to_string();
        match &entry.file {
            Ok(file) => Listed {
                path,
                session: file.id.to_string(),
                state: Some(file.state.name()),
                standing: Some(file.standing()),
                error: None,
                program: Some(file.program.pid),
                root: root(file),
                peer: Some(file.peer_host.clone()),
            },
            Err(error) => Listed {
                path,
                session: String::new(),
                state: None,
                standing: None,
                error: Some(error.to_string()),
                program: None,
                root: None,
                peer: None,
            },
        }
    }
}

fn root(file: &SessionFile) -> Option<i32> {
    match &file.side {
        Side::Source(source) => Some(source.original.frozen()?.root.pid),
        Side::Destination(destination) => Some(destination.root?.pid),
    }
}

impl std::fmt::Display for Listed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(error) = &self.error {
            return write!(f, "unreadable: {error}");
        }
        let standing = self.standing.map(|standing| standing.to_string());
        write!(
            f,
            "{}  {:<9}  root {:<8}  peer {:<16}  {}",
            self.session,
            self.state.unwrap_or_default(),
            self.root
                .map_or_else(|| String::from("-"), |pid| pid.to_string()),
            self.peer.as_deref().unwrap_or_default(),
            standing.unwrap_or_default(),
        )
    }
}
