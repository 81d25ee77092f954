//! Background push: in our own order, as far as the destination's credit reaches. Runs on the bulk thread.

use std::path::Path;
use std::sync::Arc;

use common::proto::bulk::CREDIT_BYTES;
use quinn::{ReadExactError, RecvStream, SendStream};

use crate::book::Book;
use crate::frame;
use crate::memory::PageSource;
use crate::pending::Run;
use crate::skeleton;
use crate::transfer::TransferError;

/// The source's end of the bulk stream.
#[derive(Debug)]
pub struct Push {
    stream: SendStream,
    source: Arc<dyn PageSource>,
    book: Arc<Book>,
}

impl std::fmt::Debug for dyn PageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageSource")
    }
}

impl Push {
    /// Pushes on `stream`.
    pub fn new(stream: SendStream, source: Arc<dyn PageSource>, book: Arc<Book>) -> Self {
        Push {
            stream,
            source,
            book,
        }
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

    /// Pushes until nothing is owed. `credits` carries the total of payload bytes allowed so far, again and again.
    pub async fn all(mut self, credits: Option<RecvStream>) -> Result<(), TransferError> {
        let Some(mut credits) = credits else {
            return Ok(());
        };
        let mut allowed = 0;
        let mut sent = 0;
        while self.book.owed() > 0 {
            while sent >= allowed {
                match next_credit(&mut credits).await? {
                    Some(credit) => allowed = credit,
                    None => return Ok(()),
                }
            }
            let Some(run) = self.book.next() else { break };
            sent += self.send(run).await?;
        }
        Ok(())
    }

    async fn send(&mut self, run: Run) -> Result<u64, TransferError> {
        let new = (1 << run.pages.count) - 1;
        let frame = frame::read(self.source.as_ref(), run, new)?;
        self.book.sent(frame.digest, frame.zero_pages);
        let length = frame.bytes.len() as u64;
        self.stream.write_chunk(frame.bytes).await?;
        Ok(length)
    }
}

/// The next total, or `None` when the destination has finished the stream.
async fn next_credit(credits: &mut RecvStream) -> Result<Option<u64>, TransferError> {
    let mut credit = [0; CREDIT_BYTES];
    match credits.read_exact(&mut credit).await {
        Ok(()) => Ok(Some(u64::from_le_bytes(credit))),
        Err(ReadExactError::FinishedEarly(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
