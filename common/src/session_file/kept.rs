//! A session's file for as long as a program serves the session.

use super::{SessionFile, Store, StoreError};
use crate::session::State;

/// The file of the session this program serves, once there is something to restart.
#[derive(Debug)]
pub struct Kept {
    store: Store,
    file: Option<SessionFile>,
}

impl Kept {
    /// Nothing is written yet.
    pub fn nothing(store: Store) -> Self {
        Kept { store, file: None }
    }

    /// The session whose file is there already is ours from now on.
    pub fn taken_over(store: Store, file: SessionFile) -> Self {
        Kept {
            store,
            file: Some(file),
        }
    }

    /// Writes the session's file.
    pub fn begin(&mut self, file: SessionFile) -> Result<(), StoreError> {
        self.store.write(&file)?;
        self.file = Some(file);
        Ok(())
    }

    /// The state directory.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The session as it was written last.
    pub fn file(&self) -> Option<&SessionFile> {
        self.file.as_ref()
    }

    /// Writes the file again after a change, if there is one.
    pub fn change(&mut self, change: impl FnOnce(&mut SessionFile)) -> Result<(), StoreError> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let mut changed = file.clone();
        change(&mut changed);
        if changed != *file {
            self.store.write(&changed)?;
            *file = changed;
        }
        Ok(())
    }

    /// The session entered a state. Past the point of no return it does not depend on the file being up to date: all
    /// that a restart must know of it then is that it was passed, and that was written before.
    pub fn enter(&mut self, state: State) {
        if let Err(error) = self.change(|file| file.state = state) {
            tracing::warn!(%error, "the session's file is not up to date");
        }
    }

    /// The session has ended.
    pub fn end(&mut self) {
        if let Some(file) = self.file.take() {
            self.store.remove(&file.id);
        }
    }
}
