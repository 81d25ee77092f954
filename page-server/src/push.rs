//! Background push: in our own order, as far as the destination's credit reaches. Runs on the bulk thread.

use std::path::Path;
use std::sync::Arc;

use common::limits::MAX_WANTED_RUNS;
use common::proto::ProtoError;
use common::proto::credit::{CREDIT_BYTES, CreditFrame, WANTED_BYTES, WantedRun};
use quinn::{ReadExactError, RecvStream, SendStream};

use crate::book::Book;
use crate::framer::{Form, Framer};
use crate::memory::PageSource;
use crate::pending::Run;
use crate::skeleton;
use crate::transfer::TransferError;

/// Plain frames are read one after the other up to so many bytes before the connection has a turn: what is sent then leaves
/// in fewer system calls, and is heard of in fewer.
const TURN_BYTES: u64 = 256 << 10;

/// The source's end of the bulk stream.
#[derive(Debug)]
pub struct Push {
    stream: SendStream,
    source: Arc<dyn PageSource>,
    book: Arc<Book>,
    framer: Framer,
}

impl std::fmt::Debug for dyn PageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageSource")
    }
}

impl Push {
    /// Pushes on a new `stream`.
    pub fn new(
        stream: SendStream,
        source: Arc<dyn PageSource>,
        book: Arc<Book>,
        form: Form,
    ) -> Result<Self, TransferError> {
        Ok(Push {
            stream,
            source,
            book,
            framer: Framer::new(form).map_err(TransferError::Compressor)?,
        })
    }

    /// Sends the skeleton.
    pub async fn skeleton(mut self, images: &Path) -> Result<Self, TransferError> {
        skeleton::send(&mut self.stream, images).await?;
        Ok(self)
    }

    /// Sends what threads touch first. It needs no credit: the destination keeps it until the processes are there.
    pub async fn eager(mut self) -> Result<Self, TransferError> {
        while let Some(run) = self.book.next_eager() {
            self.send(run).await?;
        }
        Ok(self)
    }

    /// A byte is expected to take so many nanoseconds on the path.
    pub fn expect(&mut self, nanoseconds: f64) {
        self.framer.expect(nanoseconds);
    }

    /// Pushes until nothing is owed. `credits` carries what the destination wants first, and then the total of bytes
    /// allowed so far, again and again.
    pub async fn all(mut self, credits: Option<RecvStream>) -> Result<(), TransferError> {
        let Some(mut credits) = credits else {
            return Ok(());
        };
        self.framer.paused();
        let mut allowed = 0;
        let mut sent = 0;
        let mut turn = Turn::default();
        let mut wanted_runs = 0;
        loop {
            while sent >= allowed {
                if self.book.owed() == 0 {
                    return Ok(());
                }
                match next_credit(&mut credits).await? {
                    Some(CreditFrame::Total(credit)) => allowed = credit,
                    Some(CreditFrame::Wanted(count)) => {
                        wanted_runs += count;
                        if wanted_runs > MAX_WANTED_RUNS {
                            return Err(ProtoError::Field("number of wanted runs").into());
                        }
                        self.book.want(&wanted(&mut credits, count).await?);
                    }
                    None => return Ok(()),
                }
            }
            let Some(run) = self.book.next() else {
                return Ok(());
            };
            let frame = self.send(run).await?;
            sent += frame.bytes;
            // The connection's own task has its turn, which sends what is there and hears what has arrived: else all the
            // credit there is would be read and compressed first, and the path be idle meanwhile.
            if turn.is_over(frame) {
                tokio::task::yield_now().await;
            }
        }
    }

    async fn send(&mut self, run: Run) -> Result<SentFrame, TransferError> {
        let mut pushed = self.framer.frame(self.source.as_ref(), run)?;
        self.book.pushed(&pushed);
        let frame = SentFrame {
            bytes: pushed.frame.bytes.len() as u64,
            compressed: pushed.compressed,
        };
        let bytes = std::mem::take(&mut pushed.frame.bytes);
        self.stream.write_chunk(bytes).await?;
        self.framer.sent(&pushed);
        Ok(frame)
    }
}

/// What a frame took.
#[derive(Clone, Copy, Debug)]
struct SentFrame {
    /// Its length.
    bytes: u64,
    /// It was compressed, which takes as long as reading many.
    compressed: bool,
}

/// Since the connection last had a turn.
#[derive(Debug, Default)]
struct Turn {
    bytes: u64,
}

impl Turn {
    /// Whether the connection's turn has come, after `frame`.
    fn is_over(&mut self, frame: SentFrame) -> bool {
        self.bytes += frame.bytes;
        let is_over = frame.compressed || self.bytes >= TURN_BYTES;
        if is_over {
            self.bytes = 0;
        }
        is_over
    }
}

/// The next frame, or `None` when the destination has finished the stream.
async fn next_credit(credits: &mut RecvStream) -> Result<Option<CreditFrame>, TransferError> {
    let mut credit = [0; CREDIT_BYTES];
    match credits.read_exact(&mut credit).await {
        Ok(()) => Ok(Some(CreditFrame::decode(credit)?)),
        Err(ReadExactError::FinishedEarly(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads a piece of the order the destination wants.
async fn wanted(credits: &mut RecvStream, count: usize) -> Result<Vec<Run>, TransferError> {
    let mut bytes = vec![0; count * WANTED_BYTES];
    credits.read_exact(&mut bytes).await?;
    let runs = bytes.as_chunks().0.iter().map(|bytes| {
        let wanted = WantedRun::decode(bytes)?;
        Ok(Run {
            pid: wanted.pid,
            pages: wanted.pages(),
        })
    });
    runs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_has_a_turn_after_much_that_was_read_and_after_anything_that_was_compressed() {
        let bytes = 64 << 10;
        let frame = |compressed| SentFrame { bytes, compressed };
        let mut turn = Turn::default();
        let plain = TURN_BYTES / bytes;
        for _ in 0..2 {
            let over: Vec<_> = (0..plain).map(|_| turn.is_over(frame(false))).collect();
            assert_eq!(over.iter().filter(|over| **over).count(), 1, "{over:?}");
            assert!(over.ends_with(&[true]));
        }
        turn.is_over(frame(false));
        assert!(turn.is_over(frame(true)));
        assert!(!turn.is_over(frame(false)), "it begins anew");
    }
}
