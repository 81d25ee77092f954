//! What `page-server` must be permitted to do, and what its threads may still do after set-up; what each capability is
//! for.

use std::io;

use common::exit::{Failure, SessionError};
use common::host::{self, CAP_SYS_ADMIN, CAP_SYS_PTRACE};
use common::privileges::{self, Capabilities};
use common::session::State;

/// The first kernel with `pidfd_getfd(2)`, without which a tree whose CRIU was killed cannot be rescued.
const OLDEST_KERNEL: (u32, u32) = (5, 6);

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

/// Freezing needs what CRIU needs, and undoing it a kernel that can; better said before anyone connects.
pub fn check_host() -> Result<(), SessionError> {
    host::check_kernel(&host::kernel(), OLDEST_KERNEL, "")
        .map_err(|error| SessionError::new(Failure::NotPermitted, State::Hello, error))?;
    let missing: Vec<&str> = [
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
        (CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
    ]
    .into_iter()
    .filter(|(number, _)| !host::has_capability(*number))
    .map(|(_, name)| name)
    .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let text = format!("{} missing: run page-server as root", missing.join(" and "));
    Err(SessionError::new(Failure::NotPermitted, State::Hello, text))
}
