//! What travels between the two ends. `docs/protocol.md` describes every message in prose.
//!
//! | stream | carries | module |
//! | --- | --- | --- |
//! | control, on the fault connection | the session's steps, one message at a time | [`control`] |
//! | demand, on the fault connection | page requests one way, pages the other | [`demand`], [`pages`] |
//! | bulk, on the bulk connection | skeleton and pushed pages one way, credit the other | [`bulk`], [`pages`], [`packed`], [`credit`] |

pub mod bulk;
pub mod control;
pub mod credit;
pub mod demand;
pub mod packed;
pub mod pages;
pub mod skeleton_name;
pub mod stream;
pub mod version;

/// Why bytes of the peer could not be understood. The peer is not trusted: none of these is our bug.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    /// The stream ended or broke.
    #[error("the stream of the peer ended: {0}")]
    Stream(#[from] std::io::Error),
    /// A length is over its limit.
    #[error("the peer announces {announced} bytes where at most {limit} are allowed")]
    TooLong {
        /// What the peer announced.
        announced: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A tag that no frame has.
    #[error("unknown frame tag {0:#04x}")]
    UnknownTag(u8),
    /// A field's value makes no sense.
    #[error("frame with an impossible {0}")]
    Field(&'static str),
    /// A control message does not decode.
    #[error("malformed control message: {0}")]
    Malformed(#[from] postcard::Error),
}
