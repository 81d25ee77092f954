//! What both ends of a post-copy migration must agree on.
//!
//! | module | owns |
//! | --- | --- |
//! | [`page`] | page arithmetic: every conversion between bytes, addresses and pages |
//! | [`page_set`], [`lazy_map`] | the lazy pages of a process as dense slots, and sets of them |
//! | [`images`] | the CRIU image files both ends read |
//! | [`proto`] | messages and their bytes |
//! | [`digest`] | what both ends compare before the original is released |
//! | [`session`] | the states of a migration and the only ways between them |
//! | [`identity`] | who a host is: keys, certificates, and whom it trusts |
//! | [`quic`] | the two QUIC connections: sockets, settings, and what their errors mean |
//! | [`limits`] | every bound, with its reason |

pub mod digest;
pub mod identity;
pub mod images;
pub mod lazy_map;
pub mod limits;
pub mod page;
pub mod page_set;
pub mod proto;
pub mod quic;
pub mod session;
