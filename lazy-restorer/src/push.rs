//! Pushed pages: taken in as they come, with credit sent back as they are installed. Runs on the bulk thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::limits::MAX_FRAME_PAGES;
use common::page::page_in_buffer;
use common::proto::ProtoError;
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader};
use common::proto::credit::{CreditFrame, MAX_WANTED_PIECE, WantedRun};
use quinn::{Connection, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::sync::watch;
use tokio::time::sleep_until;

use crate::fetch::TransferError;
use crate::memory::{Arrival, Memory};
use crate::pacing::Pacing;
use crate::rehearsal::Prelude;
use crate::unpacker::Unpacker;

/// Credit is renewed when this part of the window has been used: often enough that the source never waits for it.
const RENEWALS_PER_WINDOW: u64 = 4;

/// Takes pages in until the source finishes the stream; `installed` counts the bytes.
pub async fn take_in(
    mut stream: RecvStream,
    memory: Arc<Memory>,
    installed: watch::Sender<u64>,
) -> Result<(), TransferError> {
    let mut header = [0; BULK_HEADER_BYTES];
    let mut payload = vec![0; page_in_buffer(MAX_FRAME_PAGES).start];
    let mut unpacker = Unpacker::new().map_err(TransferError::Decompressor)?;
    loop {
        match stream.read_exact(&mut header).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let length = match BulkHeader::decode(&header)? {
            BulkHeader::Data(data) => {
                let payload = &mut payload[..data.payload as usize];
                stream.read_exact(payload).await?;
                memory.receive(&data, payload, Arrival::Pushed)?;
                payload.len()
            }
            BulkHeader::Packed(packed) => {
                let payload = &mut payload[..packed.payload as usize];
                stream.read_exact(payload).await?;
                let pages = unpacker.unpack(&packed, payload)?;
                memory.receive(&packed.unpacked(), pages, Arrival::Pushed)?;
                payload.len()
            }
            BulkHeader::File { .. } | BulkHeader::SkeletonEnd { .. } => {
                return Err(ProtoError::Field("frame after the skeleton").into());
            }
        };
        memory.relieved().await;
        installed.send_modify(|bytes| *bytes += (BULK_HEADER_BYTES + length) as u64);
    }
}

/// Says which pages are wanted first, when it is time to.
pub async fn begin(mut stream: SendStream, prelude: Prelude) -> Result<SendStream, TransferError> {
    sleep_until(prelude.push_at).await;
    for piece in prelude.wanted.chunks(MAX_WANTED_PIECE) {
        let mut bytes = CreditFrame::Wanted(piece.len()).encode().to_vec();
        bytes.extend(piece.iter().flat_map(WantedRun::encode));
        stream.write_all(&bytes).await?;
    }
    Ok(stream)
}

/// Gives credit as bytes are installed. Eager pages come without; the rest waits for the first of it.
pub async fn give_credit(
    mut stream: SendStream,
    connection: Connection,
    mut installed: watch::Receiver<u64>,
) -> Result<(), TransferError> {
    let bytes = *installed.borrow_and_update();
    let mut credit = Credit::new(bytes);
    stream
        .write_all(&CreditFrame::Total(credit.granted).encode())
        .await?;
    while installed.changed().await.is_ok() {
        let bytes = *installed.borrow_and_update();
        if let Some(total) = credit.renew(bytes, connection.rtt()) {
            match stream.write_all(&CreditFrame::Total(total).encode()).await {
                Ok(()) => {}
                // The source has pushed everything and needs no more credit.
                Err(WriteError::Stopped(_)) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// Credit given so far. The source counts from the first byte after the eager pages, so do we.
struct Credit {
    pacing: Pacing,
    started: Instant,
    /// Bytes that had come before any credit was given.
    eager: u64,
    granted: u64,
}

impl Credit {
    fn new(eager: u64) -> Self {
        let pacing = Pacing::default();
        Credit {
            granted: pacing.window(),
            pacing,
            started: Instant::now(),
            eager,
        }
    }

    /// The new total to tell the source when `installed` bytes have come, if there is enough to tell.
    fn renew(&mut self, installed: u64, round_trip: Duration) -> Option<u64> {
        let installed = installed - self.eager;
        self.pacing
            .observe(self.started.elapsed(), installed, round_trip);
        let window = self.pacing.window();
        let total = installed + window;
        if total < self.granted + window / RENEWALS_PER_WINDOW {
            return None;
        }
        self.granted = total;
        Some(total)
    }
}
