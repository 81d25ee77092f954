//! Destination host of a post-copy migration: restores a workload and resolves its page faults.
//!
//! | module | owns |
//! | --- | --- |
//! | [`session`] | the phases in order |
//! | [`external`] | the phases in the place of `criu lazy-pages`, for a restore that somebody else runs |
//! | [`connect`], [`advise`] | reaching the source, and saying early what cannot work |
//! | [`skeleton`], [`restore`], [`gate`], [`nursery`] | staging the images, CRIU, and holding it at the point of no return |
//! | [`handover`], [`keeper`], [`exits`] | userfault descriptors and processes as they come and go |
//! | [`copy`] | the processes of the copy: named for good, and killed |
//! | [`journal`] | what a successor must know, in memory that outlives us |
//! | [`session_command`] | which sessions there are |
//! | [`privileges`] | what is given up after set-up |
//! | [`resident`] | the restored workload while it becomes whole |
//! | [`resolver`] | what happens to every page: pure |
//! | [`memory`], [`uffd`] | carrying that out under one lock |
//! | [`fetch`], [`push`], [`pacing`] | demand, pushed pages, and the credit for them |
//! | [`touches`], [`rehearsal`] | the order of first touches: recorded, and wanted the next time |
//! | [`unpacker`] | pushed pages that were made shorter, as they were |
//! | [`blocktime`], [`progress`], [`report`], [`cli`] | what is measured, and what the operator says and is told |

pub mod advise;
pub mod blocktime;
pub mod cli;
pub mod connect;
pub mod copy;
pub mod engine;
pub mod exits;
pub mod external;
pub mod fetch;
pub mod files;
pub mod gate;
pub mod handover;
pub mod huge;
pub mod journal;
pub mod keeper;
pub mod memory;
pub mod nursery;
mod outage;
pub mod pacing;
pub mod privileges;
pub mod progress;
pub mod push;
pub mod ready;
pub mod rehearsal;
pub mod remote_shell;
pub mod report;
pub mod resident;
pub mod resolver;
pub mod restore;
pub mod session;
pub mod session_command;
pub mod skeleton;
pub mod touches;
pub mod uffd;
pub mod unpacker;
