//! Demand: request, read, reply. Runs on the fault thread from the socket to the socket.

use std::sync::Arc;

use common::images::ImagePid;
use common::page::PageRange;
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::pages::DemandReply;
use quinn::{ReadExactError, RecvStream, SendStream};

use crate::answers::Answers;
use crate::book::Book;
use crate::memory::PageSource;
use crate::pending::Run;
use crate::transfer::TransferError;

/// Serves one demand stream until the destination finishes it.
pub async fn serve(
    mut replies: SendStream,
    mut requests: RecvStream,
    source: Arc<dyn PageSource>,
    book: Arc<Book>,
    mut answers: Answers,
) -> Result<(), TransferError> {
    let mut frame = [0; DEMAND_FRAME_BYTES];
    loop {
        match requests.read_exact(&mut frame).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        match DemandFrame::decode(&frame)? {
            DemandFrame::Request(pid, pages) => {
                book.demand(pid, pages)?;
                let frame = answers.frame(source.as_ref(), Run { pid, pages })?;
                book.sent(&frame.contents);
                replies.write_chunk(frame.bytes).await?;
            }
            DemandFrame::Discard(pid, pages) => withhold(&mut replies, &book, pid, pages).await?,
        }
    }
}

async fn withhold(
    replies: &mut SendStream,
    book: &Book,
    pid: ImagePid,
    pages: PageRange,
) -> Result<(), TransferError> {
    for withheld in book.discard(pid, pages)? {
        let reply = DemandReply::Withheld(pid, withheld);
        replies.write_all(&reply.encode()).await?;
    }
    Ok(())
}
