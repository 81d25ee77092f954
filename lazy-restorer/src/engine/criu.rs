//! `criu restore --lazy-pages`, directly or under an init of ours.

use std::ffi::OsString;
use std::path::Path;

use tokio::process::Command;

use crate::restore::RestorePlan;

pub(super) fn command(plan: &RestorePlan, script: &Path) -> Command {
    let mut command = Command::new(plan.criu.program());
    command.args(arguments(plan, script));
    command
}

/// The script is this program, and so is the init.
pub(super) fn command_in_nursery(plan: &RestorePlan, script: &Path) -> Command {
    let mut command = Command::new(script);
    command.args(["nursery", "--"]).arg(plan.criu.program());
    command.args(arguments(plan, script));
    command
}

fn arguments(plan: &RestorePlan, script: &Path) -> Vec<OsString> {
    let mut arguments = plan.criu.command("restore", &plan.log());
    let options: [(&str, &Path); 3] = [
        ("--images-dir", &plan.images()),
        ("--work-dir", &plan.work()),
        ("--action-script", script),
    ];
    for (name, value) in options {
        arguments.push(name.into());
        arguments.push(value.into());
    }
    arguments.extend(["--lazy-pages", "--restore-detached"].map(OsString::from));
    if plan.tcp_established {
        arguments.push("--tcp-established".into());
    }
    if plan.shell_job {
        arguments.push("--shell-job".into());
    }
    arguments.extend(plan.criu_args.iter().map(OsString::from));
    arguments
}
