//! Source host of a post-copy migration.
pub mod hook;
pub mod memory;
pub mod pending;
pub mod push_order;
pub mod workload;
