//! Whole migrations on a simulated clock and network: thousands of seeded schedules in some seconds.
//!
//! What is real: the session table, the book of owed pages with the order of push, frames and their digests on the
//! source; the memory with its resolver, and the pacing of credit, on the destination; every message and frame on the
//! wire. What is simulated: the clock, two connections with their streams, the kernel (`tests/model-kernel`), and the
//! order in which each end's tasks come to run. The ends' shells, `page-server/src/session.rs` and
//! `lazy-restorer/src/session.rs`, are asynchronous code around sockets; [`source`] and [`destination`] follow them
//! step by step without.
//!
//! | module | owns |
//! | --- | --- |
//! | [`world`] | the clock: what happens next |
//! | [`trouble`] | what goes wrong, and what of it did |
//! | [`network`] | messages on their way, and what a cut takes with it |
//! | [`source`], [`destination`] | one end each |
//! | [`notes`] | what a killed destination leaves to its successor |
//! | [`workload`] | what the restored processes do to their memory |
//! | [`uffd`], [`frozen`] | the kernel's side of memory, and what the frozen pages hold |
//! | [`invariants`] | what must hold after every step and at the end |

pub mod destination;
pub mod frozen;
pub mod invariants;
pub mod network;
pub mod notes;
pub mod source;
pub mod trouble;
pub mod uffd;
pub mod workload;
pub mod world;
