//! The rig for end-to-end tests and benchmarks: two hosts and a client on one machine, workloads, and the means to
//! start both programs as an operator would.
//!
//! The programs under test are found on disk and never linked, so the rig knows them only by their command line. Faulty
//! peers speak the protocol, so they use what `common` says of it.

pub mod beating_redis;
pub mod binaries;
pub mod board;
pub mod client_times;
pub mod container;
pub mod criu_baseline;
pub mod crowd;
pub mod dataset;
pub mod echo;
pub mod exit_code;
pub mod external;
pub mod failure;
pub mod fake_criu;
pub mod faulty_peer;
pub mod foreign_runc;
pub mod gate;
pub mod harness;
pub mod host;
pub mod http;
pub mod huge;
pub mod identity;
pub mod images;
pub mod latency;
pub mod leftovers;
pub mod matrix;
pub mod namespace;
pub mod newcomers;
pub mod nginx;
pub mod pair;
pub mod path;
pub mod postgres;
pub mod process;
pub mod pulse;
pub mod python;
pub mod random;
pub mod record;
pub mod redis;
pub mod redis_client;
pub mod relay;
pub mod resp;
pub mod rig;
pub mod rounds;
pub mod runtimes;
pub mod service;
pub mod shared_file;
pub mod shell;
pub mod shuttle;
pub mod siblings;
pub mod sleeper;
pub mod small_disk;
pub mod sockets;
pub mod stop_and_copy;
pub mod sysctl;
pub mod task;
pub mod torture;
pub mod touch;
pub mod wait;
pub mod warm;
pub mod writer;
