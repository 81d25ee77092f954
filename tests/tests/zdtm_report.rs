//! What `make zdtm` says of two runs of CRIU's suite, and when it fails.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// A run's report in the suite's own form.
fn write_run(prefix: &Path, name: &str, exit_code: u32, lines: &[&str]) {
    let folder = prefix.join(name);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("exit-code"), format!("{exit_code}\n")).expect("written");
    let report = folder.join("criu-testreport-today.tap");
    fs::write(report, lines.join("\n") + "\n").expect("written");
}

fn judge(ours: (u32, &[&str]), theirs: (u32, &[&str])) -> Output {
    let prefix = tempfile::tempdir().expect("a directory");
    write_run(prefix.path(), "ours", ours.0, ours.1);
    write_run(prefix.path(), "theirs", theirs.0, theirs.1);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/zdtm-report");
    Command::new("/usr/bin/python3")
        .arg(script)
        .arg(prefix.path())
        .arg("remote-lazy-pages")
        .output()
        .expect("python3")
}

const FUTEX: &str = "ok 1 - zdtm/static/futex # flavor h";
const MAPS: &str = "ok 2 - zdtm/static/maps00 # flavor h";
const MAPS_FAIL: &str = "not ok 2 - zdtm/static/maps00 # flavor h";
const MAPS_SKIPPED: &str = "ok 2 - zdtm/static/maps00 # SKIP not here";

#[test]
fn equal_runs_are_good() {
    let both: (u32, &[&str]) = (0, &[FUTEX, MAPS]);
    let said = judge(both, both);
    assert!(said.status.success(), "{said:?}");
    let both: (u32, &[&str]) = (1, &[FUTEX, MAPS_FAIL]);
    assert!(judge(both, both).status.success(), "the same failure");
}

#[test]
fn whatever_did_not_pass_only_with_ours_is_worse() {
    let theirs: (u32, &[&str]) = (0, &[FUTEX, MAPS]);
    for ours in [&[FUTEX, MAPS_FAIL][..], &[FUTEX, MAPS_SKIPPED], &[FUTEX]] {
        let said = judge((0, ours), theirs);
        assert_eq!(said.status.code(), Some(1), "{ours:?}: {said:?}");
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(
            text.contains("worse with our pair: zdtm/static/maps00"),
            "{text}"
        );
    }
}

#[test]
fn a_run_that_did_not_end_is_no_result() {
    let good: (u32, &[&str]) = (0, &[FUTEX]);
    let struck: (u32, &[&str]) = (124, &[FUTEX]);
    for said in [judge(struck, good), judge(good, (137, &[FUTEX]))] {
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(text.contains("did not end in time"), "{text}");
    }
}

#[test]
fn runs_in_which_nothing_passed_compare_nothing() {
    let barren: (u32, &[&str]) = (1, &[MAPS_FAIL]);
    let good: (u32, &[&str]) = (0, &[FUTEX]);
    for (ours, theirs) in [(barren, barren), (good, (1, &[])), (good, barren)] {
        assert_eq!(judge(ours, theirs).status.code(), Some(1), "{theirs:?}");
    }
}
