//! `lazy-restorer sessions`.

use common::exit::{Failure, SessionError};
use common::session::State;
use common::session_file::Listed;

use crate::cli::Sessions;

/// Lists the sessions of this host.
pub fn list(command: &Sessions) -> Result<(), SessionError> {
    let fail =
        |failure, error: &dyn std::fmt::Display| SessionError::new(failure, State::Paused, error);
    let entries = command.state.store().list();
    let entries = entries.map_err(|error| fail(Failure::BadInput, &error))?;
    let listed: Vec<Listed> = entries.iter().map(Listed::of).collect();
    if command.json {
        let text = serde_json::to_string(&listed);
        println!("{}", text.map_err(|error| fail(Failure::Internal, &error))?);
        return Ok(());
    }
    for session in listed {
        println!("{session}");
    }
    Ok(())
}
