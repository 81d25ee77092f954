//! The functions.

use std::fmt::Debug;
use std::ops::Range;

use common::images::{
    parse_core, parse_mm, parse_pagemap, parse_pstree, parse_stored_pages, run_id,
    without_lazy_content, without_network_lock,
};
use common::limits::{MAX_FRAME_BYTES, MAX_FRAME_PAGES, MAX_LAZY_PAGES, MAX_SKELETON_CHUNK_BYTES};
use common::proto::bulk::{BULK_HEADER_BYTES, BulkHeader, MAX_NAME_BYTES};
use common::proto::control::{BulkHello, ToDestination, ToSource};
use common::proto::demand::{DEMAND_FRAME_BYTES, DemandFrame};
use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};
use common::proto::skeleton_name::SkeletonName;
use common::proto::stream;
use common::session_file::{decode, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_64;

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, also that of its program under libFuzzer.
    pub name: &'static str,
    /// Feeds it bytes; whether it took any of them.
    pub run: fn(&[u8]) -> bool,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "control_to_source",
        run: control::<ToSource>,
    },
    Target {
        name: "control_to_destination",
        run: control::<ToDestination>,
    },
    Target {
        name: "bulk_hello",
        run: control::<BulkHello>,
    },
    Target {
        name: "demand",
        run: demand,
    },
    Target {
        name: "replies",
        run: replies,
    },
    Target {
        name: "bulk",
        run: bulk,
    },
    Target {
        name: "skeleton_name",
        run: skeleton_name,
    },
    Target {
        name: "image_pagemap",
        run: image_pagemap,
    },
    Target {
        name: "image_mm",
        run: image_mm,
    },
    Target {
        name: "image_core",
        run: image_core,
    },
    Target {
        name: "image_pstree",
        run: image_pstree,
    },
    Target {
        name: "image_inventory",
        run: image_inventory,
    },
    Target {
        name: "image_stored_pages",
        run: image_stored_pages,
    },
    Target {
        name: "session_file",
        run: session_file,
    },
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
