//! How the two programs end, and the exit code that says so. `README.md` lists them for operators.

use std::process::ExitCode;

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
