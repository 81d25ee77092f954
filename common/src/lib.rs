//! What both ends of a post-copy migration must agree on.
//!
//! | module | owns |
//! | --- | --- |
//! | [`page`] | page arithmetic: every conversion between bytes, addresses and pages |
//! | [`page_set`], [`lazy_map`] | the lazy pages of a process as dense slots, and sets of them |
//! | [`images`] | the CRIU image files both ends read |
//! | [`proto`] | messages and their bytes |
//! | [`control`], [`mod@record`] | the control stream, and what a program reports of its migration |
//! | [`compression`], [`recent`] | how pushed pages are made shorter |
//! | [`digest`] | what both ends compare before the original is released |
//! | [`session`] | the states of a migration and the only ways between them |
//! | [`session_file`] | what a restarted program must know to go on with a session |
//! | [`criu`], [`host`], [`mounts`], [`operator`] | the CRIU program, this host, the operator's commands |
//! | [`proc_text`] | what the kernel writes about processes and mounts |
//! | [`address`] | service addresses that move with a workload |
//! | [`container`], [`program_file`], [`open_file`] | OCI containers and bundles; the programs and files both hosts must have |
//! | [`lost`] | what is done about a link that stays lost |
//! | [`io_thread`], [`priority_lock`], [`privileges`] | threads with a network runtime of their own, the lock between them, and what they may still do after set-up |
//! | [`exit`], [`logging`], [`stop`] | how a program fails, what it logs, and how it is asked to stop |
//! | [`identity`] | who a host is: keys, certificates, and whom it trusts |
//! | [`quic`] | the two QUIC connections: sockets, settings, and what their errors mean |
//! | [`pacing`] | how many bulk bytes may be on the path |
//! | [`token`] | the one-time token of a migration |
//! | [`limits`] | every bound, with its reason |

pub mod address;
pub mod compression;
pub mod container;
pub mod control;
pub mod criu;
pub mod digest;
pub mod exit;
pub mod host;
pub mod identity;
pub mod images;
pub mod io_thread;
pub mod lazy_map;
pub mod limits;
pub mod logging;
pub mod lost;
pub mod mounts;
pub mod open_file;
pub mod open_files;
pub mod operator;
pub mod pacing;
pub mod page;
pub mod page_set;
pub mod priority_lock;
pub mod privileges;
pub mod proc_text;
pub mod program_file;
pub mod proto;
pub mod quic;
pub mod recent;
pub mod record;
pub mod session;
pub mod session_file;
pub mod stop;
pub mod token;
