//! `mm-PID.img`: the mappings of a process and the landmarks of its address space.

use prost::Message;

use super::ImageError;
use super::framing::Messages;
use crate::page::{PageRange, VirtAddr};

const MM_MAGIC: u32 = 0x5749_2820;

#[derive(Clone, PartialEq, Message)]
struct MmEntry {
    #[prost(uint64, required, tag = "5")]
    start_stack: u64,
    #[prost(uint64, required, tag = "7")]
    brk: u64,
    #[prost(uint64, required, tag = "8")]
    arg_start: u64,
    #[prost(uint64, required, tag = "9")]
    arg_end: u64,
    #[prost(uint64, required, tag = "10")]
    env_start: u64,
    #[prost(uint64, required, tag = "11")]
    env_end: u64,
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    /// Bit per `MADV_*` number that was in force.
    #[prost(uint64, optional, tag = "9")]
    madv: Option<u64>,
}

/// One mapping as it was at the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpedVma {
    /// Its pages.
    pub pages: PageRange,
    /// Whether `criu restore --lazy-pages` registers it with userfaultfd.
    pub lazy: bool,
    /// Whether the process had asked for huge pages in it.
    pub huge_pages: bool,
}

/// What the memory image says of an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressSpaceLayout {
    /// All mappings in address order.
    pub vmas: Vec<DumpedVma>,
    /// Arguments and environment, which `/proc/PID/cmdline` readers touch without being able to fault.
    pub arguments: [PageRange; 2],
    /// Where the main thread's stack began.
    pub stack_start: VirtAddr,
    /// End of the heap.
    pub heap_end: VirtAddr,
}

/// Reads a memory image.
pub fn parse_mm(file: &[u8]) -> Result<AddressSpaceLayout, ImageError> {
    let mm = Messages::open(file, MM_MAGIC)?
        .next::<MmEntry>()?
        .ok_or(ImageError::Missing("mm entry"))?;
    Ok(AddressSpaceLayout {
        vmas: mm.vmas.iter().map(vma).collect(),
        arguments: [
            PageRange::covering(VirtAddr(mm.arg_start), VirtAddr(mm.arg_end)),
            PageRange::covering(VirtAddr(mm.env_start), VirtAddr(mm.env_end)),
        ],
        stack_start: VirtAddr(mm.start_stack),
        heap_end: VirtAddr(mm.brk),
    })
}

fn vma(entry: &VmaEntry) -> DumpedVma {
    DumpedVma {
        pages: PageRange::covering(VirtAddr(entry.start), VirtAddr(entry.end)),
        lazy: can_be_lazy(entry),
        huge_pages: entry.madv.unwrap_or(0) >> libc::MADV_HUGEPAGE & 1 == 1,
    }
}

/// The rule of `vma_entry_can_be_lazy` (`criu/include/vma.h`).
fn can_be_lazy(entry: &VmaEntry) -> bool {
    const VSYSCALL: u32 = 1 << 2;
    const VDSO: u32 = 1 << 3;
    const VVAR: u32 = 1 << 12;
    let wanted = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;
    let unwanted = (libc::MAP_LOCKED | libc::MAP_HUGETLB) as u32;
    entry.flags & wanted == wanted
        && entry.flags & unwanted == 0
        && entry.status & (VSYSCALL | VDSO | VVAR) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::framing::write;
    use crate::page::PageIndex;

    #[test]
    fn only_private_anonymous_unlocked_mappings_are_lazy() {
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;
        let vma = |flags: u32, status: u32| VmaEntry {
            start: 0x1000,
            end: 0x4000,
            flags,
            status,
            madv: Some(1 << libc::MADV_HUGEPAGE),
        };
        let mm = MmEntry {
            arg_start: 0x7010,
            arg_end: 0x7020,
            vmas: vec![
                vma(anonymous, 1),
                vma(anonymous | libc::MAP_LOCKED as u32, 1),
                vma(libc::MAP_SHARED as u32 | libc::MAP_ANONYMOUS as u32, 1),
                vma(anonymous, 1 | 8),
            ],
            ..Default::default()
        };
        let layout = parse_mm(&write(MM_MAGIC, &[mm])).expect("a valid image");
        let lazy: Vec<bool> = layout.vmas.iter().map(|vma| vma.lazy).collect();
        assert_eq!(lazy, [true, false, false, false]);
        assert_eq!(layout.vmas[0].pages, PageRange::new(PageIndex(1), 3));
        assert!(layout.vmas[0].huge_pages);
        assert_eq!(layout.arguments[0], PageRange::new(PageIndex(7), 1));
    }

    #[test]
    fn a_file_without_entry_is_an_error() {
        assert!(parse_mm(&write::<MmEntry>(MM_MAGIC, &[])).is_err());
        assert!(parse_mm(b"short").is_err());
    }
}
