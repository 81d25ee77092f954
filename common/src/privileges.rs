//! What threads may still do when everything is set up: the only file that gives capabilities up.
//!
//! Capabilities belong to threads and are inherited by those they start. Threads that handle bytes of the other host keep
//! what moving pages needs and can never get more. The main thread starts programs that need everything (CRIU, the
//! operator's commands); for root these get all of it again with `execve`, whatever their parent has given up. So the
//! main thread gives up what it does not need itself. The bounding set, `no_new_privs` and securebits are left alone
//! there: a restored workload would inherit them, and nothing could give them back.

use std::io;

use nix::unistd::geteuid;
pub use rustix::thread::CapabilitySet as Capabilities;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySets, capabilities, capabilities_secure_bits,
    clear_ambient_capability_set, set_capabilities, set_no_new_privs,
};

/// Gives up everything but `needs`, in this thread, and the way back by programs that have more.
pub fn keep_for_data(needs: Capabilities) -> io::Result<()> {
    set_no_new_privs(true)?;
    keep(needs)
}

/// Gives up everything but `needs`, in this thread. Without root's way back by `execve` its children would lose what
/// they need, so nothing is given up then; false says so.
pub fn keep_for_main(needs: Capabilities) -> io::Result<bool> {
    let by_exec = geteuid().is_root()
        && !capabilities_secure_bits()?.contains(CapabilitiesSecureBits::NO_ROOT);
    if by_exec {
        keep(needs)?;
    }
    Ok(by_exec)
}

fn keep(needs: Capabilities) -> io::Result<()> {
    let had = capabilities(None)?.permitted;
    // Older kernels than 4.3 know no ambient set; then there is nothing to clear.
    let _ = clear_ambient_capability_set();
    let kept = had & needs;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: Capabilities::empty(),
        },
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A thread of its own: what is given up here, no other test gets back.
    fn in_a_thread<T: Send + 'static>(body: fn() -> T) -> T {
        thread::spawn(body).join().expect("it does not panic")
    }

    #[test]
    fn what_is_given_up_stays_given_up() {
        let (before, after, again) = in_a_thread(|| {
            let before = capabilities(None).expect("known").permitted;
            keep_for_data(Capabilities::SYS_PTRACE).expect("always possible");
            let after = capabilities(None).expect("known");
            let sets = CapabilitySets {
                effective: before,
                permitted: before,
                inheritable: Capabilities::empty(),
            };
            (before, after, set_capabilities(None, sets))
        });
        assert_eq!(after.permitted, before & Capabilities::SYS_PTRACE);
        assert_eq!(after.effective, after.permitted);
        assert!(after.inheritable.is_empty());
        assert_eq!(again.is_ok(), before == after.permitted);
    }

    #[test]
    fn a_child_of_the_main_thread_has_everything_and_a_child_of_a_data_thread_nothing() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root's children get capabilities by execve");
            return;
        }
        let effective = || {
            let output = std::process::Command::new("sed")
                .args(["-n", "s/^CapEff:\t//p", "/proc/self/status"])
                .output()
                .expect("sed runs");
            let text = String::from_utf8(output.stdout).expect("hexadecimal");
            u64::from_str_radix(text.trim(), 16).expect("hexadecimal")
        };
        let ours = effective();
        let (main, data) = thread::spawn(move || {
            assert!(keep_for_main(Capabilities::KILL).expect("always possible"));
            let main = effective();
            keep_for_data(Capabilities::empty()).expect("always possible");
            (main, effective())
        })
        .join()
        .expect("it does not panic");
        assert_eq!(main, ours);
        assert_eq!(data, 0);
    }
}
