//! The functions.

use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::images::ImagePid;
use common::images::{
    parse_core, parse_mm, parse_pagemap, parse_pstree, parse_stored_pages, run_id,
    without_lazy_content, without_network_lock,
};
use common::lazy_map::LazyMap;
use common::limits::{MAX_FRAME_BYTES, MAX_FRAME_PAGES, MAX_LAZY_PAGES, MAX_SKELETON_CHUNK_BYTES};
use common::page::{PageIndex, PageRange, pages_to_bytes};
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader, MAX_NAME_BYTES};
use common::proto::control::{BulkHello, ToDestination, ToSource};
use common::proto::credit::{CREDIT_BYTES, CreditFrame, WANTED_BYTES, WantedRun};
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::files::{Changes, FilesRequest, MappedFiles};
use common::proto::packed::PackedHeader;
use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};
use common::proto::skeleton_name::SkeletonName;
use common::proto::stream;
use common::session_file::{decode, encode};
use lazy_restorer::journal::Journal;
use lazy_restorer::resolver::Family;
use lazy_restorer::skeleton::{Folder, stage};
use lazy_restorer::touches::Touches;
use lazy_restorer::unpacker::Unpacker;
use nix::sys::memfd::{MFdFlags, memfd_create};
use page_server::destination::PresentMap;
use page_server::frame;
use page_server::memory::{MemoryError, PageSource};
use page_server::pending::Pending;
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

use crate::{sockets, texts};

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, also that of its program under libFuzzer.
    pub name: &'static str,
    /// Feeds it bytes; whether it took any of them.
    pub run: fn(&[u8]) -> bool,
    /// It goes through sockets, and needs as long for one input as others for some twenty.
    pub is_slow: bool,
}

impl Target {
    const fn new(name: &'static str, run: fn(&[u8]) -> bool) -> Self {
        Target {
            name,
            run,
            is_slow: false,
        }
    }

    const fn slow(name: &'static str, run: fn(&[u8]) -> bool) -> Self {
        Target {
            is_slow: true,
            ..Target::new(name, run)
        }
    }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target::new("control_to_source", control::<ToSource>),
    Target::new("control_to_destination", control::<ToDestination>),
    Target::new("bulk_hello", control::<BulkHello>),
    Target::new("files_request", control::<FilesRequest>),
    Target::new("files_changes", control::<Changes>),
    Target::new("files_mapped", control::<MappedFiles>),
    Target::new("demand", demand),
    Target::new("replies", replies),
    Target::new("bulk", bulk),
    Target::new("credit", credit),
    Target::new("skeleton_name", skeleton_name),
    Target::new("image_pagemap", image_pagemap),
    Target::new("image_mm", image_mm),
    Target::new("image_core", image_core),
    Target::new("image_pstree", image_pstree),
    Target::new("image_inventory", image_inventory),
    Target::new("image_stored_pages", image_stored_pages),
    Target::new("session_file", session_file),
    Target::new("packed", packed),
    Target::new("skeleton", skeleton),
    Target::new("present_map", present_map),
    Target::new("journal", journal),
    Target::new("touches", touches),
    Target::new("rsync_arguments", texts::rsync_arguments),
    Target::new("container", texts::container),
    Target::new("operator_words", texts::operator_words),
    Target::new("proc_mounts", texts::proc_mounts),
    Target::new("proc_tasks", texts::proc_tasks),
    Target::new("proc_sockets", texts::proc_sockets),
    Target::new("tool_words", texts::tool_words),
    Target::new("certificate", texts::certificate),
    Target::slow("handover", sockets::handover),
    Target::slow("inheritance", sockets::inheritance),
    Target::slow("remote_shell", sockets::remote_shell),
];

/// What stands before the body of a session file: magic, version, length of the body, its hash.
const SESSION_FILE_HEADER: Range<usize> = 0..22;

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(future)
}

/// A stream of control messages: what is understood says the same when it is sent again.
fn control<M>(mut bytes: &[u8]) -> bool
where
    M: Debug + PartialEq + Serialize + DeserializeOwned,
{
    wait(async {
        let mut taken = false;
        while let Ok(message) = stream::receive::<M>(&mut bytes).await {
            let mut again = Vec::new();
            if stream::send(&mut again, &message).await.is_ok() {
                let back = stream::receive::<M>(&mut again.as_slice()).await;
                assert_eq!(back.ok(), Some(message));
            }
            taken = true;
        }
        taken
    })
}

fn demand(bytes: &[u8]) -> bool {
    let mut taken = false;
    for frame in bytes.as_chunks::<DEMAND_FRAME_BYTES>().0 {
        if let Ok(decoded) = DemandFrame::decode(frame) {
            let (DemandFrame::Request(_, pages) | DemandFrame::Discard(_, pages)) = decoded;
            assert!(pages.count > 0 && pages.is_addressable());
            assert_eq!(DemandFrame::decode(&decoded.encode()).ok(), Some(decoded));
            taken = true;
        }
    }
    taken
}

fn replies(bytes: &[u8]) -> bool {
    let mut taken = false;
    for header in bytes.as_chunks::<DATA_HEADER_BYTES>().0 {
        let Ok(decoded) = DemandReply::decode(header) else {
            continue;
        };
        assert_eq!(DemandReply::decode(&decoded.encode()).ok(), Some(decoded));
        if let DemandReply::Data(data) = decoded {
            assert!(data.pages.count <= MAX_FRAME_PAGES as u64);
            assert!(data.payload as usize <= MAX_FRAME_BYTES);
        }
        taken = true;
    }
    taken
}

fn bulk(bytes: &[u8]) -> bool {
    let mut taken = false;
    for header in bytes.as_chunks::<BULK_HEADER_BYTES>().0 {
        let Ok(decoded) = BulkHeader::decode(header) else {
            continue;
        };
        assert_eq!(BulkHeader::decode(&decoded.encode()).ok(), Some(decoded));
        if let BulkHeader::File { name, payload, .. } = decoded {
            assert!((1..=MAX_NAME_BYTES).contains(&usize::from(name)));
            assert!(payload as usize <= MAX_SKELETON_CHUNK_BYTES);
        }
        taken = true;
    }
    taken
}

/// Credit, and runs that are wanted first.
fn credit(bytes: &[u8]) -> bool {
    let mut taken = false;
    for frame in bytes.as_chunks::<CREDIT_BYTES>().0 {
        if let Ok(decoded) = CreditFrame::decode(*frame) {
            assert_eq!(decoded.encode(), *frame);
            taken = true;
        }
    }
    for run in bytes.as_chunks::<WANTED_BYTES>().0 {
        if let Ok(decoded) = WantedRun::decode(run) {
            assert!(decoded.pages().is_addressable());
            assert_eq!(decoded.encode(), *run);
        }
    }
    taken
}

/// Whatever is accepted is a name and no path.
fn skeleton_name(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Some(name) = SkeletonName::parse(&text) else {
        return false;
    };
    let name = name.as_str();
    assert_eq!(name, text);
    assert!(!name.is_empty() && name.len() <= MAX_NAME_BYTES, "{name:?}");
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
    assert!(name.bytes().all(harmless), "{name:?}");
    assert!(!name.starts_with('.') && !name.contains(".."), "{name:?}");
    true
}

fn image_pagemap(bytes: &[u8]) -> bool {
    let Ok(pagemap) = parse_pagemap(bytes) else {
        return false;
    };
    let lazy = &pagemap.lazy;
    assert!(lazy.slots() as u64 <= MAX_LAZY_PAGES);
    for pages in lazy.ranges() {
        assert!(pages.is_addressable());
        let slots = lazy.slots_of(pages).expect("it is all lazy");
        assert_eq!(lazy.page(slots.start), pages.start);
    }
    true
}

fn image_mm(bytes: &[u8]) -> bool {
    parse_mm(bytes).is_ok()
}

fn image_core(bytes: &[u8]) -> bool {
    parse_core(bytes).is_ok_and(|registers| registers.is_some())
}

fn image_pstree(bytes: &[u8]) -> bool {
    let tree = parse_pstree(bytes);
    tree.is_ok_and(|tree| {
        assert!(!tree.is_empty());
        true
    })
}

/// The inventory stays one, and saying the same again changes nothing but its length.
fn image_inventory(bytes: &[u8]) -> bool {
    let Ok(changed) = without_network_lock(bytes) else {
        return false;
    };
    assert!(changed.len() > bytes.len());
    assert!(without_network_lock(&changed).is_ok());
    if let Ok(id) = run_id(bytes) {
        assert_eq!(run_id(&changed).ok(), Some(id));
    }
    true
}

/// What is made of a full dump's pagemap says the same of its lazy pages.
fn image_stored_pages(bytes: &[u8]) -> bool {
    if let Ok(changed) = without_lazy_content(bytes) {
        let lazy = |file| parse_pagemap(file).ok().map(|pagemap| pagemap.lazy);
        assert_eq!(lazy(&changed), lazy(bytes));
    }
    parse_stored_pages(bytes).is_ok()
}

/// As it is, and once more with length and checksum that fit, which no fuzzer finds by itself.
fn session_file(bytes: &[u8]) -> bool {
    let taken = decode(bytes).is_ok_and(|file| {
        let again = encode(&file).expect("it fitted before");
        assert_eq!(decode(&again).ok(), Some(file));
        true
    });
    if let Some(body) = bytes.get(SESSION_FILE_HEADER.end..) {
        let mut sealed = bytes.to_vec();
        sealed[10..14].copy_from_slice(&(body.len() as u32).to_le_bytes());
        sealed[14..22].copy_from_slice(&xxh3_64(body).to_le_bytes());
        let _ = decode(&sealed);
    }
    taken
}

/// Packed frames one after the other, as on a bulk stream: decompressed and referred to.
fn packed(mut bytes: &[u8]) -> bool {
    let mut unpacker = Unpacker::new().expect("memory");
    let mut taken = false;
    while let Some((header, rest)) = bytes.split_first_chunk::<DATA_HEADER_BYTES>() {
        let Ok(header) = PackedHeader::decode(header) else {
            break;
        };
        let Some((payload, rest)) = rest.split_at_checked(header.payload as usize) else {
            break;
        };
        let Ok(pages) = unpacker.unpack(&header, payload) else {
            break;
        };
        let there = header.pages.count - u64::from(header.zero.count_ones());
        assert_eq!(pages.len() as u64, pages_to_bytes(there));
        (taken, bytes) = (true, rest);
    }
    taken
}

/// A whole skeleton: whatever comes, files are made in its directory only, with names of the closed set.
fn skeleton(bytes: &[u8]) -> bool {
    let parent = tempfile::tempdir_in("/dev/shm").expect("a tmpfs");
    let directory = parent.path().join("images");
    std::fs::create_dir(&directory).expect("a new directory");
    let folder = Folder::open(directory.clone()).expect("it was just made");
    let staged = wait(stage(bytes, folder));
    let names = |path: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(path).expect("it is there").flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.collect()
    };
    assert_eq!(names(parent.path()), ["images"]);
    let staged_names = names(&directory);
    assert!(
        staged_names
            .iter()
            .all(|name| SkeletonName::parse(name).is_some())
    );
    if staged.is_ok() {
        let _ = lazy_restorer::skeleton::processes(&directory);
    }
    staged.is_ok()
}

/// What a destination that came again claims, before and after it is believed: the books stay balanced.
fn present_map(bytes: &[u8]) -> bool {
    [false, true].map(|forgotten| claims(bytes, forgotten)) == [true; 2]
}

/// Memory without content.
struct Zeros;

impl PageSource for Zeros {
    fn read(&self, _: ImagePid, _: PageRange, buffer: &mut [u8]) -> Result<(), MemoryError> {
        buffer.fill(0);
        Ok(())
    }
}

fn claims(mut bytes: &[u8], forgotten: bool) -> bool {
    let pids = [ImagePid(100), ImagePid(101)];
    let lazy = || LazyMap::new([PageRange::new(PageIndex(0x7f00_0000), 200)]).expect("one range");
    let mut pending = Pending::new(pids.map(|pid| (pid, lazy())));
    match forgotten {
        true => pending.forget(),
        false => {
            let run = pending.take(pids[0], 0..64, 16).expect("all is owed");
            let frame = frame::read(&Zeros, run).expect("zeros");
            pending.count(&frame.contents);
        }
    }
    let slots = || pids.map(|pid| (pid, 200)).into();
    let mut map = PresentMap::of(slots());
    let mut taken = true;
    wait(async {
        while let Ok(message) = stream::receive::<ToSource>(&mut bytes).await {
            taken &= match message {
                ToSource::Present(part) => map.receive(part).is_ok(),
                ToSource::Withheld(part) => map.withhold(part).is_ok(),
                _ => {
                    let map = std::mem::replace(&mut map, PresentMap::of(slots()));
                    believe(&mut pending, map)
                }
            };
        }
    });
    taken && believe(&mut pending, map)
}

fn believe(pending: &mut Pending, map: PresentMap) -> bool {
    let recovery = pending.recovery(map.said);
    let is_believed = recovery.is_some();
    recovery
        .into_iter()
        .for_each(|recovery| pending.recover(recovery, 0, 0));
    let tally = pending.tally();
    assert_eq!(
        tally.pages + tally.discarded + pending.owed(),
        pending.lazy_pages()
    );
    is_believed
}

/// A journal of another program, and what it says done again.
fn journal(bytes: &[u8]) -> bool {
    let file = memfd_create("postcopy-journal-7", MFdFlags::MFD_CLOEXEC).expect("memory");
    let file = File::from(file);
    // As long as a journal without a checkpoint.
    file.set_len(1 << 20).expect("memory");
    file.write_all_at(bytes, 0).expect("memory");
    let Ok(recovered) = Journal::recover(file.into()) else {
        return false;
    };
    let lazy = LazyMap::new([PageRange::new(PageIndex(0x1000), 64)]).expect("one range");
    let mut family = Family::new(ImagePid(7), Arc::new(lazy));
    recovered
        .notes
        .iter()
        .all(|note| family.apply(note.change, &[]))
}

/// A record of first touches; once more with a checksum that fits.
fn touches(bytes: &[u8]) -> bool {
    let taken = Touches::decode(bytes).is_ok_and(|touches| {
        assert!(Touches::decode(&touches.encode()).is_ok());
        true
    });
    if let Some((body, _)) = bytes.split_last_chunk::<8>() {
        let sealed = [body, &xxh3_64(body).to_le_bytes()].concat();
        let _ = Touches::decode(&sealed);
    }
    taken
}
