//! Source host of a post-copy migration.
pub mod book;
pub mod frame;
pub mod freeze;
pub mod hook;
pub mod memory;
pub mod pending;
pub mod push;
pub mod push_order;
pub mod serve;
pub mod skeleton;
pub mod workload;
