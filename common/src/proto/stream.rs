//! Reading and writing control messages on a stream: a 32-bit length, then the message.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::ProtoError;
use crate::limits::MAX_CONTROL_BYTES;

/// Writes one control message.
pub async fn send<M: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> Result<(), ProtoError> {
    let mut frame = vec![0; size_of::<u32>()];
    frame = postcard::to_extend(message, frame)?;
    let length = frame.len() - size_of::<u32>();
    check(length)?;
    frame[..size_of::<u32>()].copy_from_slice(&(length as u32).to_le_bytes());
    stream.write_all(&frame).await?;
    stream.flush().await?;
    Ok(())
}

/// Reads one control message. Cancelling it in the middle of a message makes the stream useless.
pub async fn receive<M: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<M, ProtoError> {
    let length = stream.read_u32_le().await? as usize;
    check(length)?;
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame).await?;
    Ok(postcard::from_bytes(&frame)?)
}

fn check(length: usize) -> Result<(), ProtoError> {
    if length > MAX_CONTROL_BYTES {
        return Err(ProtoError::TooLong {
            announced: length as u64,
            limit: MAX_CONTROL_BYTES as u64,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::control::{Abort, ToSource};
    use super::*;
    use crate::session::State;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    fn message() -> ToSource {
        ToSource::Abort(Abort {
            host: "b".into(),
            state: State::Listen,
            text: "no".into(),
            copy_is_dead: true,
        })
    }

    #[test]
    fn a_message_survives_the_way() {
        run(async {
            let mut wire = Vec::new();
            send(&mut wire, &message()).await.expect("fits");
            let back: ToSource = receive(&mut wire.as_slice()).await.expect("decodes");
            assert_eq!(back, message());
        });
    }

    #[test]
    fn truncations_and_forged_lengths_are_errors() {
        run(async {
            let mut wire = Vec::new();
            send(&mut wire, &message()).await.expect("fits");
            for end in 0..wire.len() {
                assert!(receive::<ToSource>(&mut &wire[..end]).await.is_err());
            }
            let forged = u32::MAX.to_le_bytes();
            let error = receive::<ToSource>(&mut forged.as_slice()).await;
            assert!(matches!(error, Err(ProtoError::TooLong { .. })));
        });
    }
}
