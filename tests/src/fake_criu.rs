//! A CRIU that fails or waits at one thing and otherwise is the real one.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::binaries;
use crate::gate::Gate;
use crate::rig::Rig;
use crate::shell;

/// What it says before it fails, in CRIU's own form.
pub const ITS_ERROR: &str = "Error (criu/fake.c:1): the test wants this to fail";

/// Makes a CRIU that fails when its command line holds `word`, such as `dump` or `restore`.
///
/// The error goes to the log file it is told to write, as CRIU does it, and to its standard error.
pub fn failing_at(rig: &Rig, word: &str) -> Result<PathBuf> {
    let path = rig.folder().join(format!("criu-failing-at-{word}"));
    let criu = binaries::criu()?;
    let script = format!(
        r#"#!/bin/sh
case " $* " in *" {word} "*) ;; *) exec {criu} "$@" ;; esac
echo "{ITS_ERROR}" >&2
folder=. log=
while [ $# -gt 0 ]; do
  case "$1" in
    -D | --images-dir | -W | --work-dir) folder=$2; shift ;;
    -o | --log-file) log=$2; shift ;;
    --images-dir=* | --work-dir=*) folder=${{1#*=}} ;;
    --log-file=*) log=${{1#*=}} ;;
  esac
  shift
done
[ -z "$log" ] || (cd "$folder" && echo "(00.000001) {ITS_ERROR}" >"$log")
exit 1
"#,
        criu = criu.display()
    );
    make_program(path, &script)
}

/// Makes a CRIU that runs `line` before it does what `word` on its command line says.
pub fn running_before(rig: &Rig, word: &str, line: &str) -> Result<PathBuf> {
    let script = format!(
        r#"#!/bin/sh
case " $* " in *" {word} "*) ({line}) ;; esac
exec {criu} "$@"
"#,
        criu = binaries::criu()?.display(),
    );
    make_program(rig.folder().join(format!("criu-before-{word}")), &script)
}

/// Makes a CRIU that waits at `gate` before it does what `word` on its command line says.
pub fn waiting_at(rig: &Rig, word: &str, gate: &Gate) -> Result<PathBuf> {
    let script = format!(
        r#"#!/bin/sh
case " $* " in *" {word} "*) {wait} ;; esac
exec {criu} "$@"
"#,
        criu = binaries::criu()?.display(),
        wait = gate.after(":"),
    );
    make_program(
        rig.folder().join(format!("criu-waiting-at-{word}")),
        &script,
    )
}

/// Makes a CRIU that waits at `gate` when it is to run its scripts for `action` of `word`, before it runs ours:
/// the script that is named last is run first.
pub fn held_at(rig: &Rig, word: &str, action: &str, gate: &Gate) -> Result<PathBuf> {
    let wait = gate.after(":");
    let script = make_program(
        rig.folder().join(format!("script-at-{action}")),
        &format!("#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != {action} ] || {{ {wait}; }}\n"),
    )?;
    let program = format!(
        r#"#!/bin/sh
case " $* " in *" {word} "*) set -- "$@" --action-script {script} ;; esac
exec {criu} "$@"
"#,
        criu = binaries::criu()?.display(),
        script = script.display(),
    );
    make_program(
        rig.folder().join(format!("criu-held-at-{action}")),
        &program,
    )
}

fn make_program(path: PathBuf, script: &str) -> Result<PathBuf> {
    let text = path.with_extension("text");
    std::fs::write(&text, script).with_context(|| format!("cannot write {}", text.display()))?;
    // By a program of its own: a child that another test forks has for a moment what this one has open, and what somebody has
    // open for writing cannot be run.
    let mut install = Command::new("install");
    shell::run(install.args(["-m", "755"]).arg(&text).arg(&path))?;
    Ok(path)
}
