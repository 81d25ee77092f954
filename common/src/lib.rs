//! What both ends of a post-copy migration must agree on.
//!
//! | module | owns |
//! | --- | --- |
//! | [`page`] | page arithmetic: every conversion between bytes, addresses and pages |
//! | [`page_set`], [`lazy_map`] | the lazy pages of a process as dense slots, and sets of them |
//! | [`limits`] | every bound, with its reason |

pub mod lazy_map;
pub mod limits;
pub mod page;
pub mod page_set;
