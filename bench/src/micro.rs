//! `bench micro`: the hot pieces by themselves, on one core, without a network.

mod install;

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use common::compression::{Compressor, Decompressor};
use common::digest::page_hash;
use common::images::ImagePid;
use common::lazy_map::LazyMap;
use common::page::{PAGE_SIZE, PageIndex, PageRange, VirtAddr, is_zero};
use common::proto::demand::DemandFrame;
use common::proto::pages::DataHeader;
use lazy_restorer::journal::Journal;
use lazy_restorer::resolver::{Change, Family, Fault};
use nix::unistd::Pid;
use page_server::memory::{FrozenProcesses, PageSource};
use serde::Serialize;
use tests::dataset::Dataset;

use crate::stats::Summary;
use crate::table::Table;

/// Samples of each piece; the median counts.
const SAMPLES: usize = 15;
/// One sample takes about this long.
const SAMPLE: Duration = Duration::from_millis(20);
/// Pages the pieces work on: more than the caches hold.
const PAGES: usize = 16 * 1024;
/// Pages of a full frame.
const FRAME: usize = 16;

/// What to measure.
#[derive(Debug, Clone, Args)]
pub struct MicroOptions {
    /// All of it so often; the samples of all rounds count together.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Writes what the table shows to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One piece.
#[derive(Debug, Serialize)]
pub(crate) struct Piece {
    name: String,
    /// Nanoseconds each time.
    ns: Summary,
    #[serde(skip)]
    samples: Vec<f64>,
    /// Bytes moved or looked at each time.
    bytes: usize,
}

/// Measures, prints and writes.
pub fn run(options: &MicroOptions) -> Result<()> {
    let mut pieces = Vec::new();
    for _ in 0..options.repeat.max(1) {
        for piece in once()? {
            merge(&mut pieces, piece);
        }
    }
    print!("{}", render(&pieces));
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| crate::write_json(path, &pieces))
}

fn once() -> Result<Vec<Piece>> {
    let mut pieces = vec![resolver_step(), demand_frame(), data_header(), journal()?];
    pieces.extend(content());
    pieces.extend(compression()?);
    pieces.extend(reads()?);
    pieces.extend(install::pieces()?);
    Ok(pieces)
}

/// The samples of a piece that was measured before are put together with the new ones.
fn merge(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.iter_mut().find(|known| known.name == piece.name) {
        None => pieces.push(piece),
        Some(known) => {
            known.samples.extend(piece.samples);
            known.ns = Summary::of(&known.samples).unwrap_or(known.ns);
        }
    }
}

/// Times `step`, which is told how often it was called before.
fn time(name: &str, bytes: usize, mut step: impl FnMut(usize)) -> Piece {
    let began = Instant::now();
    let mut calls = 0;
    while began.elapsed() < SAMPLE {
        step(calls);
        calls += 1;
    }
    let per_sample = calls;
    let samples: Vec<f64> = (0..SAMPLES)
        .map(|_| {
            let began = Instant::now();
            for _ in 0..per_sample {
                step(calls);
                calls += 1;
            }
            began.elapsed().as_nanos() as f64 / per_sample as f64
        })
        .collect();
    piece(name, bytes, &samples)
}

fn piece(name: &str, bytes: usize, samples: &[f64]) -> Piece {
    let none = Summary::single(0.0);
    Piece {
        name: name.to_owned(),
        ns: Summary::of(samples).unwrap_or(none),
        samples: samples.to_vec(),
        bytes,
    }
}

/// A fault, the arrival of its page, and where to put it.
fn resolver_step() -> Piece {
    let pages = PageRange::new(PageIndex(0x1000), PAGES as u64);
    let lazy = std::sync::Arc::new(LazyMap::new([pages]).expect("one range is in order"));
    let fresh = || {
        let mut family = Family::new(ImagePid(1), lazy.clone());
        let member = family.attach(&[]);
        (family, member)
    };
    let (mut family, mut member) = fresh();
    time("resolver: fault, arrival, install", 0, |call| {
        if call % PAGES == 0 {
            (family, member) = fresh();
        }
        // Odd, so that every page has its turn.
        let slot = call.wrapping_mul(7_919) % PAGES;
        let fault = family.fault(member, pages.start.forward(slot as u64));
        if let Fault::Request { slot, .. } | Fault::Waiting { slot } = fault {
            family.receive(slot);
            for install in family.installs(slot..slot + 1) {
                family.installed(install.member, slot..slot + 1);
            }
        }
    })
}

fn demand_frame() -> Piece {
    time("demand frame: encode, decode", 0, |call| {
        let pages = PageRange::new(PageIndex(call as u64), 1);
        let bytes = DemandFrame::Request(ImagePid(1), pages).encode();
        let _ = black_box(DemandFrame::decode(black_box(&bytes)));
    })
}

fn data_header() -> Piece {
    time("data header: encode, decode", 0, |call| {
        let pages = PageRange::new(PageIndex(call as u64), FRAME as u64);
        let bytes = DataHeader::raw(ImagePid(1), pages, 5).encode();
        let _ = black_box(DataHeader::decode(black_box(&bytes)));
    })
}

/// The note of a frame that came, and the checkpoint when there is no more room.
fn journal() -> Result<Piece> {
    let mut journal = Journal::new(ImagePid(1)).context("no journal")?;
    let state = [0; 1024];
    let mut whole = Ok(());
    let piece = time("journal: note, checkpoint when full", 0, |call| {
        if journal.room() == 0 && whole.is_ok() {
            whole = journal.checkpoint(&state);
        }
        if journal.room() > 0 {
            journal.note(Change::Received(call * FRAME, u16::MAX).into());
        }
    });
    whole.context("no checkpoint")?;
    Ok(piece)
}

/// A full frame of values as redis holds them, there and back.
fn compression() -> Result<Vec<Piece>> {
    let (dataset, mut value, mut pages) = (Dataset::new(1), Vec::new(), Vec::new());
    for number in 0.. {
        dataset.value(number, 0, &mut value);
        pages.extend_from_slice(&value);
        if pages.len() >= FRAME * PAGE_SIZE {
            break;
        }
    }
    pages.truncate(FRAME * PAGE_SIZE);
    let mut room = vec![0; pages.len()];
    let mut compressor = Compressor::new()?;
    let length = compressor.compress(&pages, &mut room);
    let bytes = room[..length.context("the values do not shrink")?].to_vec();
    let mut decompressor = Decompressor::new()?;
    let mut back = vec![0; pages.len()];
    decompressor.decompress(&bytes, &mut back)?;
    ensure!(back == pages, "other pages came back");
    let percent = bytes.len() * 100 / pages.len();
    let name = format!("Zstandard: compress {FRAME} pages to {percent} %");
    Ok(vec![
        time(&name, pages.len(), |_| {
            black_box(compressor.compress(black_box(&pages), &mut room));
        }),
        time("Zstandard: decompress them", pages.len(), |_| {
            let done = decompressor.decompress(black_box(&bytes), &mut back);
            black_box(done.is_ok());
        }),
    ])
}

/// What every page goes through at both ends.
fn content() -> Vec<Piece> {
    let memory = filled();
    let page = |call: usize| &memory[call % PAGES * PAGE_SIZE..][..PAGE_SIZE];
    vec![
        time("page: hash", PAGE_SIZE, |call| {
            black_box(page_hash(ImagePid(1), PageIndex(call as u64), page(call)));
        }),
        time("page: is it zero (no)", PAGE_SIZE, |call| {
            black_box(is_zero(page(call)));
        }),
    ]
}

fn filled() -> Vec<u8> {
    let words = (0..PAGES * PAGE_SIZE / 8).map(|word| (word as u64).wrapping_mul(0x9e37_79b9));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Reading from a process, here this one.
fn reads() -> Result<Vec<Piece>> {
    let memory = filled();
    let first = VirtAddr((memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64)).page();
    let source = FrozenProcesses::open([(ImagePid(1), Pid::this())])?;
    let read = |count: usize| -> Result<Piece> {
        let mut buffer = vec![0; count * PAGE_SIZE];
        let frames = PAGES / count - 1;
        let pages = |call: usize| {
            let start = first.forward((call % frames * count) as u64);
            PageRange::new(start, count as u64)
        };
        source
            .read(ImagePid(1), pages(0), &mut buffer)
            .context("cannot read this process")?;
        let name = format!("source: read {count} page(s)");
        Ok(time(&name, buffer.len(), |call| {
            let done = source.read(ImagePid(1), pages(call), &mut buffer);
            black_box(done.is_ok());
        }))
    };
    Ok(vec![read(1)?, read(FRAME)?])
}

fn render(pieces: &[Piece]) -> String {
    let mut table = Table::default();
    table.row(["", "ns", "least", "most", "GiB/s"]);
    for piece in pieces {
        let rate = piece.bytes as f64 / piece.ns.median * 1e9 / f64::from(1 << 30);
        table.row([
            &piece.name,
            &format!("{:.0}", piece.ns.median),
            &format!("{:.0}", piece.ns.min),
            &format!("{:.0}", piece.ns.max),
            &match piece.bytes {
                0 => "-".to_owned(),
                _ => format!("{rate:.2}"),
            },
        ]);
    }
    table.render()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn samples_of_all_rounds_count_together() {
        let mut pieces = Vec::new();
        for samples in [[3.0, 1.0], [2.0, 9.0]] {
            merge(&mut pieces, piece("a", 0, &samples));
        }
        let ns = pieces[0].ns;
        assert_eq!((pieces.len(), ns.median, ns.max), (1, 2.5, 9.0));
    }
}
