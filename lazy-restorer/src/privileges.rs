//! What `lazy-restorer`'s threads may still do after set-up; what each capability is for.

use std::io;

use common::privileges::{self, Capabilities};

/// Threads that drive connections, stage the skeleton and answer faults: a userfault descriptor asks nobody for
/// capabilities after it was made, and CRIU made it.
pub const DATA: Capabilities = Capabilities::empty();

/// The main thread and the keeper.
const MAIN: Capabilities = Capabilities::KILL
    // Killing a copy means finding its processes, also where /proc hides those of others.
    .union(Capabilities::SYS_PTRACE)
    // Having the kernel make pages of the copy huge again.
    .union(Capabilities::SYS_NICE)
    // Unmounting what a killed CRIU has mounted.
    .union(Capabilities::SYS_ADMIN)
    // Large socket buffers, when it connects again.
    .union(Capabilities::NET_ADMIN)
    // Telling the neighbours where a service address is now.
    .union(Capabilities::NET_RAW)
    // The operator's directories, whoever owns them.
    .union(Capabilities::DAC_READ_SEARCH)
    .union(Capabilities::DAC_OVERRIDE);

/// The threads run: gives up what the main thread does not need any more.
pub fn give_up() -> io::Result<()> {
    if !privileges::keep_for_main(MAIN)? {
        tracing::info!("not root: the main thread keeps the capabilities that CRIU needs");
    }
    Ok(())
}
