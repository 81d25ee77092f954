//! What `page-server`'s threads may still do after set-up; what each capability is for.

use std::io;

use common::privileges::{self, Capabilities};

/// Threads that drive connections: `process_vm_readv` of frozen tasks of whatever user, and images of whatever owner.
pub const DATA: Capabilities = Capabilities::SYS_PTRACE.union(Capabilities::DAC_READ_SEARCH);

/// The main thread, the guard and CRIU's script.
const MAIN: Capabilities = Capabilities::SYS_PTRACE
    // Files and /proc of other users.
    .union(Capabilities::DAC_READ_SEARCH)
    .union(Capabilities::DAC_OVERRIDE)
    // /proc/PID/map_files.
    .union(Capabilities::CHECKPOINT_RESTORE)
    // Stopping, waking and killing tasks of other users.
    .union(Capabilities::KILL)
    // Ending the repair mode of connections whose CRIU was killed.
    .union(Capabilities::NET_ADMIN)
    // Telling the neighbours that a service address is here again.
    .union(Capabilities::NET_RAW);

/// The ports are bound and the threads run: gives up what the main thread does not need any more.
pub fn give_up() -> io::Result<()> {
    if !privileges::keep_for_main(MAIN)? {
        tracing::info!("not root: the main thread keeps the capabilities that CRIU needs");
    }
    Ok(())
}
