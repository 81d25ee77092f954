//! Every bound on what a peer, an image or a user may ask for, with its reason.

use std::time::Duration;

use crate::page::PAGE_SIZE;

/// Pages in one data frame. 64 KiB reaches over 90 % of what `UFFDIO_COPY` and `process_vm_readv` can do per call
/// (measured), and one bit per page fits the frame header's zero bitmap.
pub const MAX_FRAME_PAGES: usize = 16;

/// Payload bytes of one data frame.
pub const MAX_FRAME_BYTES: usize = MAX_FRAME_PAGES * PAGE_SIZE;

/// Pages that were pushed lately and may be referred to: 16 MiB, which the destination holds. Related processes are
/// pushed side by side, so equal pages of theirs are never far apart.
pub const RECENT_PAGES: usize = 4096;

/// Runs of pages the destination may want first, and that a record of touches may hold: 12 MiB where they are kept.
pub const MAX_WANTED_RUNS: usize = 1 << 19;

/// Bytes of one control message. The largest is a piece of the destination's present map.
pub const MAX_CONTROL_BYTES: usize = 1 << 20;

/// Executable files compared before the freeze, each with a path of a few hundred bytes at most: far below
/// [`MAX_CONTROL_BYTES`]. The rest is not compared.
pub const MAX_PROGRAM_FILES: usize = 1024;

/// Open files compared before the freeze. The rest is not compared.
pub const MAX_OPEN_FILES: usize = 4096;

/// Bytes of all their paths together: with what belongs to each path, and with the programs, well below
/// [`MAX_CONTROL_BYTES`].
pub const MAX_OPEN_FILES_PATH_BYTES: usize = 256 * 1024;

/// Areas of huge pages in all: a process of 2 TiB in which every other huge page is one.
pub const MAX_HUGE_AREAS: usize = 1 << 19;

/// Areas of huge pages in one message: twenty bytes each at worst, well below [`MAX_CONTROL_BYTES`].
pub const MAX_HUGE_PIECE: usize = 4096;

/// Words of a present map in one message: ten bytes each at worst, well below [`MAX_CONTROL_BYTES`].
pub const MAX_PRESENT_WORDS: usize = 8192;

/// Lazy pages of one process: 4 TiB, more than any host we know of; bounds what a forged pagemap makes us allocate
/// (one bit per page) to 128 MiB.
pub const MAX_LAZY_PAGES: u64 = 1 << 30;

/// Pages pushed before the processes are there to take them: 32 MiB, for the destination keeps them.
pub const MAX_EAGER_PAGES: u64 = 8192;

/// Processes in one migrated tree.
pub const MAX_PROCESSES: usize = 32 * 1024;

/// Files in a skeleton: a few per process and namespace.
pub const MAX_SKELETON_FILES: usize = 1 << 20;

/// Bytes of one skeleton file. Shared memory is dumped into the skeleton whole, so this is generous.
pub const MAX_SKELETON_FILE_BYTES: u64 = 1 << 40;

/// Bytes of a skeleton file carried by one frame.
pub const MAX_SKELETON_CHUNK_BYTES: usize = MAX_FRAME_BYTES;

/// Bytes of one protobuf message in a CRIU image: a `mm` entry of a process with 64 k VMAs is about 4 MiB.
pub const MAX_IMAGE_MESSAGE_BYTES: usize = 64 << 20;

/// Bytes of text in an error message of the peer.
pub const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Bulk bytes in flight on a path without delay: enough to keep one core busy, short enough that a queue of it costs
/// a fault a fraction of a millisecond.
pub const BULK_WINDOW_BYTES: u64 = 512 * 1024;

/// Most bulk bytes in flight on any path: 10 Gbit/s at 50 ms.
pub const MAX_BULK_WINDOW_BYTES: u64 = 64 << 20;

/// Time without a packet after which a connection counts as lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Time without a page for a thread that waits for one, after which a source that is there counts as lost nevertheless:
/// longer than a disk or swap makes it wait.
pub const UNANSWERED_TIMEOUT: Duration = Duration::from_secs(15);

/// Time between keep-alive packets; several fit into [`IDLE_TIMEOUT`].
pub const KEEP_ALIVE: Duration = Duration::from_millis(800);

/// Time the peer has for each step of the handshake that needs no work of it.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause between two attempts to reach a lost peer, at first and at most.
pub const RECONNECT_PAUSE: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(2));

/// Bytes of a session file: some twenty for each process of the largest tree.
pub const MAX_SESSION_FILE_BYTES: usize = 1 << 20;
