//! Good inputs, made by our own encoders: what a fuzzer starts from.

use common::address::MovingAddress;
use common::compression::Compressor;
use common::container::ContainerFacts;
use common::images::{ImagePid, ImagesDigest};
use common::open_file::OpenFile;
use common::page::{PageIndex, PageRange, pages_to_bytes};
use common::program_file::ProgramFile;
use common::proto::bulk::BulkHeader;
use common::proto::control::{
    Abort, BulkHello, Hello, HugeAreas, MoreFacts, Present, Resume, Secret, SessionId, Tally,
    ToDestination, ToSource, Welcome, WorkloadFacts,
};
use common::proto::credit::CreditFrame;
use common::proto::demand::DemandFrame;
use common::proto::files::{Changes, FilesFacts, FilesRequest, MappedFiles};
use common::proto::packed::{Body, PackedHeader};
use common::proto::pages::{DataHeader, DemandReply};
use common::proto::stream;
use common::session::State;
use common::session_file::{
    AtRest, ContainerName, DestinationSide, FrozenTasks, Original, Runs, SessionFile, Side,
    SourceSide, Task, Whole, WholeProcess, encode,
};
use lazy_restorer::journal::{Journal, Note};
use lazy_restorer::resolver::Change;
use lazy_restorer::touches::Touches;
use serde::Serialize;

use crate::{sockets, texts};

/// A packed frame, which refers to other pages or does not.
fn packed(referred: u64, kept: bool) -> PackedHeader {
    PackedHeader {
        pid: PID,
        pages: pages(16),
        zero: 0,
        referred,
        kept,
        body: Body::Zstd,
        payload: 5000,
    }
}

const PID: ImagePid = ImagePid(100);
const SECRET: Secret = Secret([5; 32]);
const SESSION: SessionId = SessionId([6; 16]);

/// First words of image files (`criu/include/magic.h`).
const COMMON_MAGIC: u32 = 0x5456_4319;
const INVENTORY_MAGIC: u32 = 0x5831_3116;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
const MM_MAGIC: u32 = 0x5749_2820;
const CORE_MAGIC: u32 = 0x5505_3847;

/// Good inputs of a target.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    match target {
        "control_to_source" => to_source().iter().map(framed).collect(),
        "control_to_destination" => to_destination().iter().map(framed).collect(),
        "bulk_hello" => vec![framed(&BulkHello {
            session: SESSION,
            secret: SECRET,
        })],
        "files_request" => files_requests().iter().map(framed).collect(),
        "files_changes" => vec![
            framed(&Changes::Everything),
            framed(&Changes::Only(vec![b"a/".to_vec(), b"a/b".to_vec()])),
        ],
        "files_mapped" => vec![framed(&MappedFiles(vec![b"a/b".to_vec()]))],
        "demand" => vec![
            DemandFrame::Request(PID, pages(16)).encode().to_vec(),
            DemandFrame::Discard(PID, pages(1 << 20)).encode().to_vec(),
        ],
        "replies" => vec![
            DataHeader::raw(PID, pages(16), 5).encode().to_vec(),
            DemandReply::Withheld(PID, pages(9)).encode().to_vec(),
            DemandReply::Packed(packed(0, false)).encode().to_vec(),
        ],
        "bulk" => bulk()
            .iter()
            .map(|header| header.encode().to_vec())
            .collect(),
        "credit" => vec![
            CreditFrame::Total(1 << 20).encode().to_vec(),
            CreditFrame::Wanted(1).encode().to_vec(),
        ],
        "skeleton_name" => ["inventory.img", "core-1.img", "tmpfs-dev-74.tar.gz.img"]
            .map(|name| name.as_bytes().to_vec())
            .to_vec(),
        "image_pagemap" => vec![image(
            PAGEMAP_MAGIC,
            &[
                number(1, 1),
                [number(1, 0x1000), number(2, 0), number(4, 2), number(5, 3)].concat(),
                [number(1, 0x9000), number(2, 0), number(4, 4), number(5, 7)].concat(),
            ],
        )],
        "image_mm" => vec![image(MM_MAGIC, &[mm()])],
        "image_core" => vec![image(CORE_MAGIC, &[core()])],
        "image_pstree" => vec![image(
            PSTREE_MAGIC,
            &[[number(1, 7), number(2, 0), number(5, 7), number(5, 8)].concat()],
        )],
        "image_inventory" => vec![inventory()],
        "image_stored_pages" => vec![image(
            PAGEMAP_MAGIC,
            &[
                number(1, 1),
                [number(1, 0x1000), number(2, 0), number(4, 6), number(5, 3)].concat(),
            ],
        )],
        "session_file" => [session_file(), destination_file()]
            .map(|file| encode(&file).expect("it is small"))
            .to_vec(),
        "packed" => vec![packed_frames()],
        "skeleton" => vec![skeleton()],
        "present_map" => vec![present_map()],
        "journal" => vec![journal()],
        "touches" => vec![touches()],
        "handover" => sockets::handovers(),
        "inheritance" => sockets::inheritances(),
        "remote_shell" => sockets::handed_over_by_rsync(&framed(&rsync_arguments())),
        _ => texts::corpus(target),
    }
}

/// Two frames: pages that compress, and a page that refers to one of them beside a new one.
fn packed_frames() -> Vec<u8> {
    let content: Vec<u8> = (0..pages_to_bytes(4)).map(|at| (at / 700) as u8).collect();
    let mut room = vec![0; content.len()];
    let mut compressor = Compressor::new().expect("memory");
    let length = compressor
        .compress(&content, &mut room)
        .expect("it shrinks");
    let first = PackedHeader {
        pages: pages(4),
        payload: length as u32,
        ..packed(0, true)
    };
    let second = PackedHeader {
        pages: pages(3),
        zero: 0b100,
        body: Body::Raw,
        payload: 4 + pages_to_bytes(1) as u32,
        ..packed(0b010, false)
    };
    let body = &content[..pages_to_bytes(1) as usize];
    [
        &first.encode()[..],
        &room[..length],
        &second.encode(),
        &2_u32.to_le_bytes(),
        body,
    ]
    .concat()
}

/// An inventory in two pieces, an empty file and the end.
fn skeleton() -> Vec<u8> {
    let inventory = inventory();
    let (front, back) = inventory.split_at(5);
    let mut bytes = Vec::new();
    let pieces = [
        ("inventory.img", 0, front),
        ("inventory.img", 5, back),
        ("fs-1.img", 0, &[]),
    ];
    for (name, offset, piece) in pieces {
        let header = BulkHeader::File {
            name: name.len() as u8,
            offset,
            payload: piece.len() as u32,
        };
        bytes.extend(header.encode());
        bytes.extend(name.as_bytes());
        bytes.extend(piece);
    }
    let end = BulkHeader::SkeletonEnd {
        files: 2,
        bytes: inventory.len() as u64,
    };
    bytes.extend(end.encode());
    bytes
}

/// A successor is told nothing, then something; one that remembers must not be told more than it sent.
fn present_map() -> Vec<u8> {
    let part = |words: &[u64]| Present {
        pid: PID,
        first_word: 0,
        words: words.to_vec(),
    };
    let nothing = [0_u64; 4];
    let messages = [
        ToSource::Present(part(&nothing)),
        ToSource::Withheld(part(&nothing)),
        ToSource::PresentEnd,
        ToSource::Present(part(&nothing)),
    ];
    messages.iter().flat_map(framed).collect()
}

/// A journal into which nothing but its first word and an attached member were noted.
fn journal() -> Vec<u8> {
    let mut journal = Journal::new(ImagePid(7)).expect("memory");
    journal.note(Note::from(Change::Attach));
    journal.content().expect("our own memory")
}

fn touches() -> Vec<u8> {
    let mut touches = Touches::new(vec![PID]);
    touches.note(PID, pages(3));
    touches.note(PID, PageRange::new(PageIndex(9), 1));
    touches.encode()
}

fn pages(count: u64) -> PageRange {
    PageRange::new(PageIndex(0x7f00_0000), count)
}

fn to_source() -> Vec<ToSource> {
    vec![
        ToSource::Hello(Hello {
            versions: vec![1],
            token: Some(SECRET),
            host: String::from("b"),
        }),
        ToSource::Ready,
        ToSource::Drained(tally()),
        ToSource::Abort(abort()),
        ToSource::Resume(Resume {
            version: 1,
            session: SESSION,
            secret: SECRET,
        }),
        ToSource::Present(Present {
            pid: PID,
            first_word: 0,
            words: vec![u64::MAX; 9],
        }),
        ToSource::PresentEnd,
        ToSource::Withheld(Present {
            pid: PID,
            first_word: 9,
            words: vec![1; 3],
        }),
        ToSource::ReadyWithImages(ImagesDigest(8)),
    ]
}

fn to_destination() -> Vec<ToDestination> {
    vec![
        ToDestination::Welcome(Welcome {
            version: 1,
            session: SESSION,
            secret: SECRET,
            bulk_port: 7001,
            host: String::from("a"),
        }),
        ToDestination::Frozen,
        ToDestination::Complete,
        ToDestination::Abort(abort()),
        ToDestination::WelcomeBack { bulk_port: 7001 },
        ToDestination::Advise(facts()),
        ToDestination::AdviseMore(more_facts()),
        ToDestination::Huge(HugeAreas {
            pid: PID,
            areas: vec![(0x7f00_0000, 512), (0x7f10_0000, 1024)],
        }),
    ]
}

fn facts() -> WorkloadFacts {
    WorkloadFacts {
        architecture: String::from("x86_64"),
        kernel: String::from("6.18"),
        page_size: 4096,
        criu: String::from("4.2"),
        cpu_features: vec![String::from("avx"), String::from("sse")],
        pids: vec![7, 8],
        name: String::from("redis"),
        resident_pages: 1 << 20,
        tcp_established: true,
        shell_job: false,
        // Not on the wire with it.
        more: MoreFacts::default(),
    }
}

fn more_facts() -> MoreFacts {
    MoreFacts {
        container: Some(Box::new(ContainerFacts {
            namespaces: vec![String::from("pid")],
            mounts: vec![String::from("/proc")],
            terminal: true,
        })),
        programs: vec![ProgramFile {
            path: String::from("/bin/p"),
            bytes: 9,
            digest: 8,
        }],
        addresses: vec![std::net::IpAddr::from([10, 0, 0, 1])],
        open_files: vec![OpenFile {
            path: String::from("/var/f"),
            mode: 0o100_600,
            bytes: Some(7),
        }],
        files: FilesFacts {
            sync: vec![String::from("/srv")],
            shared: false,
        },
    }
}

fn tally() -> Tally {
    Tally {
        pages: 1 << 20,
        digest: u64::MAX,
        discarded: 3,
    }
}

fn files_requests() -> Vec<FilesRequest> {
    let path = || String::from("/srv");
    vec![
        FilesRequest::Rsync {
            path: path(),
            arguments: rsync_arguments(),
        },
        FilesRequest::Mapped { path: path() },
        FilesRequest::Changed { path: path() },
    ]
}

/// As rsync 3.2 writes them.
fn rsync_arguments() -> Vec<String> {
    let words = "--server --sender -qlHogDtpAXrSe.iLsfxCIvu --numeric-ids . /srv/tree/";
    words.split(' ').map(String::from).collect()
}

fn abort() -> Abort {
    Abort {
        host: String::from("a"),
        state: State::Listen,
        text: String::from("no"),
        copy_is_dead: true,
    }
}

fn session_file() -> SessionFile {
    let task = Task { pid: 7, start: 9 };
    let address = "10.0.0.1:7000".parse().expect("an address");
    SessionFile {
        id: SESSION,
        state: State::Postcopy,
        boot: String::from("boot"),
        program: task,
        directory: String::from("/run/postcopy"),
        identity: String::from("/etc/postcopy"),
        accept: vec![String::from("ab")],
        mtu: Some(1452),
        secret: SECRET,
        peer_host: String::from("b"),
        side: Side::Source(SourceSide {
            original: Original::Foreign(
                FrozenTasks {
                    root: task,
                    tasks: vec![task; 3],
                    at_rest: vec![AtRest {
                        task,
                        threads: 2,
                        sleeps: 300,
                    }],
                    criu: task,
                    container: None,
                },
                String::from("/var/tmp/images"),
            ),
            version: 3,
            criu_program: String::from("criu"),
            fault: address,
            bulk: address,
            on_thawed: Some(String::from("true")),
            makes_clones: false,
        }),
    }
}

fn destination_file() -> SessionFile {
    let task = Task { pid: 7, start: 9 };
    SessionFile {
        side: Side::Destination(DestinationSide {
            source: "10.0.0.1:7000".parse().expect("an address"),
            bulk_port: 7001,
            version: 3,
            keeper: task,
            anchor: Some(task),
            anchor_puts_away: true,
            may_run: true,
            root: Some(task),
            tasks: vec![task; 3],
            addresses: vec![MovingAddress {
                ip: [10, 0, 0, 100].into(),
                prefix: 24,
                device: String::from("eth0"),
            }],
            pidfile: Some(String::from("/run/pid")),
            on_resumed: Some(String::from("true")),
            container: Some(ContainerName {
                id: String::from("box"),
                runtime: String::from("runc"),
                root: None,
            }),
            whole: Some(Whole {
                tally: tally(),
                processes: vec![WholeProcess {
                    pid: ImagePid(7),
                    received: Runs::of(&[u64::MAX, 5]),
                    withheld: Runs::of(&[0, 8]),
                }],
            }),
        }),
        ..session_file()
    }
}

fn bulk() -> Vec<BulkHeader> {
    vec![
        BulkHeader::File {
            name: 13,
            offset: 1 << 20,
            payload: 1 << 16,
        },
        BulkHeader::SkeletonEnd {
            files: 40,
            bytes: 1 << 20,
        },
        BulkHeader::Data(DataHeader::raw(PID, pages(4), 0)),
    ]
}

/// A control message as it is on the stream.
fn framed(message: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let sent = runtime
        .expect("a runtime")
        .block_on(stream::send(&mut bytes, message));
    sent.expect("a Vec takes everything");
    bytes
}

/// An image file of these messages.
fn image(magic: u32, messages: &[Vec<u8>]) -> Vec<u8> {
    let mut file = [COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
    for message in messages {
        file.extend((message.len() as u32).to_le_bytes());
        file.extend(message);
    }
    file
}

fn inventory() -> Vec<u8> {
    let message = [number(1, 2), number(11, 1)].concat();
    let length = (message.len() as u32).to_le_bytes();
    [&INVENTORY_MAGIC.to_le_bytes()[..], &length, &message].concat()
}

fn mm() -> Vec<u8> {
    let vma = [
        number(1, 0x1000),
        number(2, 0x9000),
        number(6, 0x22),
        number(7, 1),
    ]
    .concat();
    let landmarks = [5, 7, 8, 9, 10, 11].map(|field| number(field, 0x7fff_0000));
    [landmarks.concat(), nested(14, &vma)].concat()
}

fn core() -> Vec<u8> {
    let fields = (1..=15).chain([17, 20, 22]);
    let registers: Vec<u8> = fields.flat_map(|field| number(field, 0x40_0000)).collect();
    nested(2, &nested(2, &registers))
}

/// A protobuf field that holds a number.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// A protobuf field that holds a message.
fn nested(field: u64, message: &[u8]) -> Vec<u8> {
    let head = [varint(field << 3 | 2), varint(message.len() as u64)].concat();
    [&head, message].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
