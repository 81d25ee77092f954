//! Demand: faults out, pages in. All of it runs on the fault thread.

use std::sync::Arc;
use std::time::Duration;

use common::limits::MAX_FRAME_PAGES;
use common::page::page_in_buffer;
use common::proto::ProtoError;
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::memory::{Arrival, MemberKey, Memory, MemoryError, Order};
use crate::rehearsal::Recorder;
use crate::uffd::UserFault;
use crate::unpacker::Unpacker;

/// Requests written with one call.
const BATCH: usize = 64;

/// Time between looks whether a silent process still lives.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Pause before what found no memory is tried again.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(20);
/// Time without any want after which it is over.
const ENOUGH: Duration = Duration::from_secs(1);

/// Why memory stops moving.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The connection broke; the control stream says of what.
    #[error("the connection broke")]
    Link,
    /// The source broke the protocol.
    #[error("the source broke the protocol: {0}")]
    Proto(#[from] ProtoError),
    /// Memory cannot be changed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No memory for a decompressor.
    #[error("cannot decompress: {0}")]
    Decompressor(std::io::Error),
    /// A descriptor cannot be watched.
    #[error("cannot watch for page faults: {0}")]
    Watch(std::io::Error),
}

impl TransferError {
    /// Whether the source did something wrong; else this host cannot go on.
    pub fn is_of_source(&self) -> bool {
        match self {
            TransferError::Link | TransferError::Proto(_) => true,
            TransferError::Memory(error) => error.is_of_source(),
            TransferError::Decompressor(_) | TransferError::Watch(_) => false,
        }
    }
}

impl From<ReadExactError> for TransferError {
    fn from(_: ReadExactError) -> Self {
        TransferError::Link
    }
}

impl From<ReadError> for TransferError {
    fn from(_: ReadError) -> Self {
        TransferError::Link
    }
}

impl From<WriteError> for TransferError {
    fn from(_: WriteError) -> Self {
        TransferError::Link
    }
}

/// What the memory asks for, and who does it.
#[derive(Debug)]
pub struct Orders {
    /// The orders.
    pub orders: mpsc::UnboundedReceiver<Order>,
    /// Streams to send requests on; each replaces the one before.
    pub links: mpsc::UnboundedReceiver<SendStream>,
    /// Notes requests.
    pub recorder: Option<Recorder>,
    /// Where watchers report.
    pub failures: mpsc::Sender<TransferError>,
}

impl Orders {
    /// Carries orders out for as long as the memory lives: watches descriptors and sends requests, many with one
    /// write. Requests without a link are dropped: a new link asks for everything again.
    pub async fn carry_out(mut self, memory: Arc<Memory>) -> Result<(), TransferError> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut link: Option<SendStream> = None;
        loop {
            tokio::select! {
                biased;
                new = self.links.recv() => match new {
                    Some(new) => link = Some(new),
                    None => return Ok(()),
                },
                count = self.orders.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        return Ok(());
                    }
                    let requests = self.sort(&mut batch, &memory);
                    link = send(link, &requests).await;
                }
            }
        }
    }

    /// Begins to watch what is to be watched; returns the requests as bytes.
    fn sort(&self, batch: &mut Vec<Order>, memory: &Arc<Memory>) -> Vec<u8> {
        let mut requests = Vec::with_capacity(batch.len() * DEMAND_FRAME_BYTES);
        for order in batch.drain(..) {
            match order {
                Order::Demand(frame) => {
                    if let (Some(recorder), DemandFrame::Request(pid, pages)) =
                        (&self.recorder, frame)
                    {
                        recorder.note(pid, pages);
                    }
                    requests.extend_from_slice(&DemandFrame::encode(frame));
                }
                Order::Watch(key, uffd) => self.watch(key, uffd, memory),
                Order::Relieve => report(relieve(memory.clone()), self.failures.clone()),
            }
        }
        requests
    }

    fn watch(&self, key: MemberKey, uffd: Arc<UserFault>, memory: &Arc<Memory>) {
        report(watch(key, uffd, memory.clone()), self.failures.clone());
    }
}

/// Sends requests; a link that fails is given up. What it failed of shows on its other streams.
async fn send(link: Option<SendStream>, requests: &[u8]) -> Option<SendStream> {
    let mut link = link?;
    if !requests.is_empty() && link.write_all(requests).await.is_err() {
        return None;
    }
    Some(link)
}

/// Runs a task here and reports its failure.
fn report(
    task: impl Future<Output = Result<(), TransferError>> + Send + 'static,
    failures: mpsc::Sender<TransferError>,
) {
    tokio::spawn(async move {
        if let Err(error) = task.await {
            // Nobody listens when the session has ended.
            let _ = failures.send(error).await;
        }
    });
}

/// Tries again what found no memory, for as long as there is any of it.
async fn relieve(memory: Arc<Memory>) -> Result<(), TransferError> {
    while !memory.relieve()? {
        sleep(NO_MEMORY_PAUSE).await;
    }
    let falls = memory.wants().falls();
    sleep(ENOUGH).await;
    memory.wants().settle(falls);
    Ok(())
}

/// Handles a descriptor's events as they come.
async fn watch(
    key: MemberKey,
    uffd: Arc<UserFault>,
    memory: Arc<Memory>,
) -> Result<(), TransferError> {
    let uffd = UserFault::watched(uffd).map_err(TransferError::Watch)?;
    loop {
        // The kernel does not report the end of a process; of a child forked here nobody else does either.
        let Ok(ready) = timeout(CHECK_INTERVAL, uffd.readable()).await else {
            if !memory.check(key) {
                return Ok(());
            }
            continue;
        };
        let mut ready = ready.map_err(TransferError::Watch)?;
        // Cleared first: what comes while we drain wakes us again.
        ready.clear_ready();
        if !memory.drain(key)? {
            return Ok(());
        }
    }
}

/// Takes in the source's answers.
pub async fn take_in(mut replies: RecvStream, memory: Arc<Memory>) -> Result<(), TransferError> {
    let mut header = [0; DATA_HEADER_BYTES];
    let mut payload = vec![0; page_in_buffer(MAX_FRAME_PAGES).start];
    let mut unpacker = Unpacker::new().map_err(TransferError::Decompressor)?;
    loop {
        match replies.read_exact(&mut header).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        match DemandReply::decode(&header)? {
            DemandReply::Data(data) => {
                let payload = &mut payload[..data.payload as usize];
                replies.read_exact(payload).await?;
                memory.receive(&data, payload, Arrival::Demanded)?;
            }
            DemandReply::Packed(packed) => {
                let payload = &mut payload[..packed.payload as usize];
                replies.read_exact(payload).await?;
                let pages = unpacker.unpack(&packed, payload)?;
                memory.receive(&packed.unpacked(), pages, Arrival::Demanded)?;
            }
            DemandReply::Withheld(pid, pages) => memory.withheld(pid, pages)?,
        }
        memory.relieved().await;
    }
}
