//! Source host of a post-copy migration: freezes a workload and serves its memory.
//!
//! | module | owns |
//! | --- | --- |
//! | [`session`] | the phases in order |
//! | `parting` | the last word, until it is heard |
//! | [`workload`], [`engine`], [`freeze`], [`frozen`], [`hook`], [`freezer`], [`network_lock`] | who is moved, and CRIU's hold on them |
//! | [`guard`], [`rescue`] | what is done when we or CRIU are killed |
//! | [`external`], [`visit`] | the phases when somebody else made the dump, for one or several destinations |
//! | [`offer`], [`thin`], [`image_pages`], [`attach`] | that dump: its images, its pages, and the CRIU that may hold it |
//! | [`adopt`], [`session_command`] | taking over what a killed `page-server` left frozen |
//! | [`listen`], [`destination`] | the two ports, and the one destination that was let in |
//! | [`skeleton`] | CRIU's images on their way |
//! | [`pending`], [`push_order`], [`book`] | what is owed, and in which order it is pushed |
//! | [`memory`], [`frame`] | frozen pages, and the frames that carry them |
//! | [`framer`], [`compression`], [`repeats`] | frames of pushed pages: whether to compress, and which pages are repeats |
//! | [`serve`], [`push`], [`transfer`] | demand, background push, and the tasks that do them |
//! | [`privileges`] | what is given up after set-up |
//! | [`cli`], [`identity_command`], [`report`] | what the operator says and is told |

pub mod adopt;
pub mod answers;
pub mod attach;
pub mod backlog;
pub mod book;
pub mod cli;
pub mod compression;
pub mod destination;
pub mod engine;
pub mod external;
pub mod files;
pub mod frame;
pub mod framer;
pub mod freeze;
pub mod freezer;
pub mod frozen;
mod ghosts;
pub mod guard;
pub mod hook;
mod huge;
pub mod identity_command;
pub mod image_pages;
mod iptables_lock;
pub mod listen;
pub mod mapped;
pub mod memory;
pub mod mounts_below;
pub mod names;
pub mod network_lock;
pub mod offer;
mod open_files;
pub mod packer;
mod parting;
pub mod pending;
pub mod privileges;
pub mod push;
pub mod push_order;
pub mod repeats;
pub mod report;
pub mod rescue;
pub mod serve;
pub mod session;
pub mod session_command;
pub mod skeleton;
mod sockets;
pub mod survey;
pub mod thin;
pub mod transfer;
pub mod visit;
pub mod watch;
pub mod workload;
pub mod writers;
