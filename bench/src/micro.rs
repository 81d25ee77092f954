//! `bench micro`: the hot pieces by themselves, on one core, without a network.

mod install;

use std::hint::black_box;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use common::digest::page_hash;
use common::images::ImagePid;
use common::lazy_map::LazyMap;
use common::page::{PAGE_SIZE, PageIndex, PageRange, VirtAddr, is_zero};
use common::proto::demand::DemandFrame;
use common::proto::pages::DataHeader;
use lazy_restorer::resolver::{Family, Fault};
use nix::unistd::Pid;
use page_server::memory::{FrozenProcesses, PageSource};
use serde::Serialize;

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
    /// Bytes moved or looked at each time.
    bytes: usize,
}

/// Measures, prints and writes.
pub fn run(options: &MicroOptions) -> Result<()> {
    let mut pieces = vec![resolver_step(), demand_frame(), data_header()];
    pieces.extend(content());
    pieces.extend(reads()?);
    pieces.extend(install::pieces()?);
    print!("{}", render(&pieces));
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| crate::write_json(path, &pieces))
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
    let none = Summary {
        median: 0.0,
        min: 0.0,
        max: 0.0,
    };
    Piece {
        name: name.to_owned(),
        ns: Summary::of(samples).unwrap_or(none),
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
