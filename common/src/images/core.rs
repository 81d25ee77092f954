//! `core-TID.img`: where a thread stood when it was frozen.

use prost::Message;

use super::ImageError;
use super::framing::Messages;
use crate::page::VirtAddr;

const CORE_MAGIC: u32 = 0x5505_3847;

#[derive(Clone, PartialEq, Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "2")]
    thread_info: Option<ThreadInfoX86>,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadInfoX86 {
    #[prost(message, required, tag = "2")]
    gpregs: GeneralRegisters,
}

/// `user_x86_regs_entry`: general registers 1 to 15, then the ones with a meaning of their own.
#[derive(Clone, PartialEq, Message)]
struct GeneralRegisters {
    #[prost(uint64, required, tag = "1")]
    r15: u64,
    #[prost(uint64, required, tag = "2")]
    r14: u64,
    #[prost(uint64, required, tag = "3")]
    r13: u64,
    #[prost(uint64, required, tag = "4")]
    r12: u64,
    #[prost(uint64, required, tag = "5")]
    bp: u64,
    #[prost(uint64, required, tag = "6")]
    bx: u64,
    #[prost(uint64, required, tag = "7")]
    r11: u64,
    #[prost(uint64, required, tag = "8")]
    r10: u64,
    #[prost(uint64, required, tag = "9")]
    r9: u64,
    #[prost(uint64, required, tag = "10")]
    r8: u64,
    #[prost(uint64, required, tag = "11")]
    ax: u64,
    #[prost(uint64, required, tag = "12")]
    cx: u64,
    #[prost(uint64, required, tag = "13")]
    dx: u64,
    #[prost(uint64, required, tag = "14")]
    si: u64,
    #[prost(uint64, required, tag = "15")]
    di: u64,
    #[prost(uint64, required, tag = "17")]
    ip: u64,
    #[prost(uint64, required, tag = "20")]
    sp: u64,
    #[prost(uint64, required, tag = "22")]
    fs_base: u64,
}

/// The registers that say which memory a thread touches first when it runs again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadRegisters {
    /// Top of its stack.
    pub stack_pointer: VirtAddr,
    /// Its thread-local storage.
    pub thread_local: VirtAddr,
    /// Everything else that may be a pointer: the instruction pointer and the general registers.
    pub others: Vec<VirtAddr>,
}

/// Reads a thread's registers; `None` when the image is of another architecture.
pub fn parse_core(file: &[u8]) -> Result<Option<ThreadRegisters>, ImageError> {
    let core = Messages::open(file, CORE_MAGIC)?
        .next::<CoreEntry>()?
        .ok_or(ImageError::Missing("core entry"))?;
    Ok(core.thread_info.map(|info| registers(&info.gpregs)))
}

fn registers(r: &GeneralRegisters) -> ThreadRegisters {
    let others = [
        r.ip, r.bp, r.bx, r.r12, r.r13, r.r14, r.r15, r.di, r.si, r.dx, r.cx, r.r8, r.r9, r.r10,
        r.r11, r.ax,
    ];
    ThreadRegisters {
        stack_pointer: VirtAddr(r.sp),
        thread_local: VirtAddr(r.fs_base),
        others: others.into_iter().map(VirtAddr).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::framing::write;

    #[test]
    fn stack_and_thread_local_storage_are_found() {
        let core = CoreEntry {
            thread_info: Some(ThreadInfoX86 {
                gpregs: GeneralRegisters {
                    sp: 0x7ffc_0000_1000,
                    fs_base: 0x7f00_0000_2000,
                    ip: 0x40_0000,
                    ..Default::default()
                },
            }),
        };
        let registers = parse_core(&write(CORE_MAGIC, &[core]))
            .expect("a valid image")
            .expect("of this architecture");
        assert_eq!(registers.stack_pointer, VirtAddr(0x7ffc_0000_1000));
        assert_eq!(registers.thread_local, VirtAddr(0x7f00_0000_2000));
        assert_eq!(registers.others[0], VirtAddr(0x40_0000));
    }

    #[test]
    fn another_architecture_has_no_registers_for_us() {
        let core = CoreEntry { thread_info: None };
        assert!(
            parse_core(&write(CORE_MAGIC, &[core]))
                .expect("valid")
                .is_none()
        );
    }
}
