//! `criu dump --lazy-pages` for a process tree.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

use tokio::process::Command;

use crate::freeze::FreezePlan;

pub(super) fn command(plan: &FreezePlan, page_server: RawFd, hook: &Path) -> Command {
    let mut command = Command::new(plan.criu.program());
    command.args(arguments(plan, page_server, hook));
    command
}

fn arguments(plan: &FreezePlan, page_server: RawFd, hook: &Path) -> Vec<OsString> {
    let mut arguments = plan.criu.command("dump", &plan.log());
    let options: [(&str, OsString); 6] = [
        ("--tree", plan.workload.root().to_string().into()),
        ("--images-dir", plan.images().into()),
        ("--work-dir", plan.work().into()),
        ("--ps-socket", page_server.to_string().into()),
        ("--action-script", hook.into()),
        ("--lazy-pages", OsString::new()),
    ];
    for (name, value) in options {
        arguments.push(name.into());
        if !value.is_empty() {
            arguments.push(value);
        }
    }
    if plan.tcp_established {
        arguments.push("--tcp-established".into());
        if plan.criu.locks_by_nftables() {
            arguments.extend(["--network-lock", "nftables"].map(OsString::from));
        }
    }
    if plan.shell_job {
        arguments.push("--shell-job".into());
    }
    if let Some(limit) = plan.ghost_limit {
        arguments.extend(["--ghost-limit".into(), limit.to_string().into()]);
    }
    arguments.extend(plan.criu_args.iter().map(OsString::from));
    arguments
}
