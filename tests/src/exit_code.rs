//! The documented exit codes of both programs.

/// A migration was completed.
pub const SUCCESS: i32 = 0;
/// The command line or what it names makes no sense.
pub const BAD_INPUT: i32 = 2;
/// The operator or the kernel does not permit it.
pub const NOT_PERMITTED: i32 = 3;
/// An identity is unreadable, expired or not trusted.
pub const IDENTITY: i32 = 4;
/// The peer refused, or speaks no version of ours.
pub const REFUSED: i32 = 5;
/// No connection, or it was lost.
pub const CONNECTION: i32 = 6;
/// The source could not freeze the workload.
pub const FREEZE: i32 = 7;
/// The destination could not restore it.
pub const RESTORE: i32 = 8;
/// The peer gave up.
pub const ABORTED_BY_PEER: i32 = 9;
/// Lost after the point of no return.
pub const LOST: i32 = 10;
/// A signal asked it to stop before anything had been moved.
pub const INTERRUPTED: i32 = 11;
