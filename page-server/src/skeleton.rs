//! The skeleton: CRIU's images of everything but lazy memory, read for what we need and sent to the destination.

use std::fs;
use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use common::images::{DumpedProcess, parse_pagemap};
use common::limits::MAX_SKELETON_CHUNK_BYTES;
use common::page::{PageIndex, PageRange, pages_to_bytes};
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader};
use common::proto::skeleton_name::SkeletonName;
use quinn::SendStream;
use tokio::io::AsyncReadExt;

use crate::pending::Run;

/// Pages above a stack pointer that go along: the frames a thread returns into first.
const STACK_PAGES_ABOVE: u64 = 4;
/// Pages below it: the frames it calls next, as far as they were ever touched.
const STACK_PAGES_BELOW: u64 = 1;

/// Why the skeleton cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SkeletonError {
    /// An image or the directory cannot be read.
    #[error("cannot read the image {name}: {error}")]
    Read {
        /// Which image.
        name: String,
        /// The system's word.
        error: io::Error,
    },
    /// CRIU wrote a file we do not know.
    #[error("CRIU wrote an image we do not know: {0}")]
    UnknownFile(String),
    /// The stream to the destination broke.
    #[error("the connection broke while the skeleton was sent: {0}")]
    Send(#[from] quinn::WriteError),
}

/// Pages that the process's threads touch first when they run again, whether lazy or not; most urgent first.
pub fn eager_runs(process: &DumpedProcess) -> Vec<Run> {
    let threads = &process.threads;
    let stacks = threads.iter().map(|thread| {
        let top = thread.stack_pointer.page();
        let below = STACK_PAGES_BELOW.min(top.0);
        PageRange::new(PageIndex(top.0 - below), below + 1 + STACK_PAGES_ABOVE)
    });
    let locals = threads
        .iter()
        .map(|thread| PageRange::new(thread.thread_local.page(), 1));
    let pointed = threads
        .iter()
        .flat_map(|thread| &thread.others)
        .map(|address| PageRange::new(address.page(), 1));
    let arguments = process.layout.arguments.iter().copied();
    stacks
        .chain(locals)
        .chain(arguments)
        .chain(pointed)
        .filter(|pages| pages.is_addressable())
        .map(|pages| Run {
            pid: process.pid,
            pages,
        })
        .collect()
}

/// Mappings that threads hold pointers into, of all processes, the smallest first: small ones are whole soon, and a
/// large one says little about which of its pages are used.
pub fn hot_runs(processes: &[DumpedProcess]) -> Vec<Run> {
    let mut hot: Vec<Run> = processes
        .iter()
        .flat_map(|process| {
            let lazy = process.layout.vmas.iter().filter(|vma| vma.lazy);
            let pointed = lazy.filter(|vma| points_into(process, vma.pages));
            pointed.map(|vma| Run {
                pid: process.pid,
                pages: vma.pages,
            })
        })
        .collect();
    hot.sort_by_key(|run| run.pages.count);
    hot
}

fn points_into(process: &DumpedProcess, pages: PageRange) -> bool {
    process.threads.iter().any(|thread| {
        let known = [thread.stack_pointer, thread.thread_local];
        let mut pointers = known.iter().chain(&thread.others);
        pointers.any(|address| pages.contains(address.page()))
    })
}

/// Files of a skeleton, in the order they are sent.
pub fn files(images: &Path) -> Result<Vec<SkeletonName>, SkeletonError> {
    let read = |error| SkeletonError::Read {
        name: images.display().to_string(),
        error,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(images).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        let name = name.to_string_lossy().into_owned();
        let name = SkeletonName::parse(&name).ok_or(SkeletonError::UnknownFile(name))?;
        names.push(name);
    }
    names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    Ok(names)
}

/// Bytes of all files of a skeleton.
pub fn bytes(images: &Path) -> u64 {
    let entries = fs::read_dir(images).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

/// Bytes of shared memory whose content is in a skeleton, by its `pagemap-shmem-ID.img`.
pub fn shared_bytes(images: &Path) -> u64 {
    let entries = fs::read_dir(images).into_iter().flatten().flatten();
    let pages = entries.filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("pagemap-shmem-")?;
        let image = fs::read(entry.path()).ok()?;
        Some(parse_pagemap(&image).ok()?.eager_pages)
    });
    pages_to_bytes(pages.sum())
}

/// Sends all files, then the end mark.
pub async fn send(stream: &mut SendStream, images: &Path) -> Result<(), SkeletonError> {
    let names = files(images)?;
    let mut total = 0;
    for name in &names {
        total += send_file(stream, images, name).await?;
    }
    let end = BulkHeader::SkeletonEnd {
        files: names.len() as u32,
        bytes: total,
    };
    stream.write_all(&end.encode()).await?;
    Ok(())
}

async fn send_file(
    stream: &mut SendStream,
    images: &Path,
    name: &SkeletonName,
) -> Result<u64, SkeletonError> {
    let read = |error| SkeletonError::Read {
        name: name.to_string(),
        error,
    };
    let mut file = tokio::fs::File::open(images.join(name.as_str()))
        .await
        .map_err(read)?;
    let mut offset = 0;
    loop {
        let mut chunk = BytesMut::with_capacity(MAX_SKELETON_CHUNK_BYTES);
        while chunk.len() < MAX_SKELETON_CHUNK_BYTES {
            if file.read_buf(&mut chunk).await.map_err(read)? == 0 {
                break;
            }
        }
        // An empty file is one frame without payload; any other ends before its empty chunk.
        if chunk.is_empty() && offset > 0 {
            return Ok(offset);
        }
        let length = chunk.len() as u64;
        stream
            .write_all_chunks(&mut [frame(name, offset, chunk.len()), chunk.freeze()])
            .await?;
        offset += length;
        if length < MAX_SKELETON_CHUNK_BYTES as u64 {
            return Ok(offset);
        }
    }
}

fn frame(name: &SkeletonName, offset: u64, payload: usize) -> Bytes {
    let header = BulkHeader::File {
        name: name.as_str().len() as u8,
        offset,
        payload: payload as u32,
    };
    let mut frame = BytesMut::with_capacity(BULK_HEADER_BYTES + name.as_str().len());
    frame.extend_from_slice(&header.encode());
    frame.extend_from_slice(name.as_str().as_bytes());
    frame.freeze()
}
