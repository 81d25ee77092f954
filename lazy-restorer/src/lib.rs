//! Destination host of a post-copy migration.
pub mod blocktime;
pub mod memory;
pub mod resolver;
pub mod uffd;
