//! How the two programs end, and the exit code that says so. `README.md` lists them for operators.

use std::fmt;
use std::process::ExitCode;

use crate::limits::MAX_TEXT_BYTES;
use crate::session::State;

/// What went wrong, as far as a script can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A mistake of ours.
    Internal,
    /// The command line or what it names cannot be used.
    BadInput,
    /// A privilege or kernel feature is missing.
    NotPermitted,
    /// The identity directory cannot be used.
    Identity,
    /// The peer was refused, or refuses us.
    Refused,
    /// The peer cannot be reached or was lost before the point of no return.
    Connection,
    /// The source could not freeze the workload; it runs there as before.
    Freeze,
    /// The destination could not restore the workload; it runs on the source as before.
    Restore,
    /// The other host gave up; its reason is in the message.
    Peer,
    /// Lost after the point of no return: the workload waits, and needs the operator.
    Lost,
    /// A signal asked us to stop, and nothing had been moved yet.
    Interrupted,
}

impl Failure {
    /// The program's exit code.
    pub fn code(self) -> u8 {
        match self {
            Failure::Internal => 1,
            Failure::BadInput => 2,
            Failure::NotPermitted => 3,
            Failure::Identity => 4,
            Failure::Refused => 5,
            Failure::Connection => 6,
            Failure::Freeze => 7,
            Failure::Restore => 8,
            Failure::Peer => 9,
            Failure::Lost => 10,
            Failure::Interrupted => 11,
        }
    }
}

impl From<Failure> for ExitCode {
    fn from(failure: Failure) -> Self {
        ExitCode::from(failure.code())
    }
}

/// A migration that failed on this host.
#[derive(Debug, thiserror::Error)]
#[error("phase {state}: {text}")]
pub struct SessionError {
    /// What kind of failure it is.
    pub failure: Failure,
    /// The phase it happened in.
    pub state: State,
    /// What failed and what to do, for the operator; one line.
    pub text: String,
}

impl SessionError {
    /// A failure in `state`.
    pub fn new(failure: Failure, state: State, text: impl fmt::Display) -> Self {
        SessionError {
            failure,
            state,
            text: one_line(&text.to_string()),
        }
    }
}

/// Makes a text of the peer or of a log one line without control characters.
fn one_line(text: &str) -> String {
    text.chars()
        .take(MAX_TEXT_BYTES)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_names_the_phase() {
        let error = SessionError::new(Failure::Freeze, State::Freeze, "first\nsecond\u{7}");
        assert_eq!(error.to_string(), "phase freeze: first second ");
    }
}
