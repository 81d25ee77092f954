//! What a watched tree's last look names is all that rsync has to be told of: whatever happens to the files between the
//! first pass and the last, on the file systems of this machine.

#[path = "watch/changes.rs"]
mod changes;
#[path = "watch/pair.rs"]
mod pair;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use page_server::mounts_below::upper_of_an_overlay;
use page_server::watch::{Unwatched, Watch};
use proptest::prelude::*;

use changes::Change;
use pair::{Pair, Place};

/// Changes before the watch, and while it lasts; each in a few cases.
fn any_changes() -> impl Strategy<Value = [Vec<Change>; 3]> {
    let some = |most| prop::collection::vec(Change::any(), 0..most);
    (some(40), some(12), some(12)).prop_map(|(before, early, late)| [before, early, late])
}

fn all_arrives(place: Place, [before, early, late]: &[Vec<Change>; 3]) {
    let mut pair = Pair::make(place);
    pair.change(before);
    let survey = pair.first_pass();
    pair.change(early);
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    pair.change(late);
    let due = watch.finish().expect("few changes");
    let looked = due.paths.len();
    let named = pair.last_pass(&survey, &due);
    pair.assert_equal(&format!(
        "{looked} paths were looked at, named were {named:?}"
    ));
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok();
    ProptestConfig {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(24),
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_changes_arrives_on_a_disk(changes in any_changes()) {
        all_arrives(Place::Disk, &changes);
    }

    #[test]
    fn whatever_changes_arrives_on_a_tmpfs(changes in any_changes()) {
        all_arrives(Place::Memory, &changes);
    }

    #[test]
    fn whatever_changes_arrives_on_an_overlay(changes in any_changes()) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root mounts");
            return Ok(());
        }
        all_arrives(Place::Overlay, &changes);
    }
}

/// A python that does `script` with the file, after it was told to; `script` says "x" when it is ready.
struct Helper(Child);

impl Helper {
    fn start(script: &str, file: &Path) -> Self {
        let mut child = Command::new("python3")
            .args(["-I", "-c", script])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let stdout = child.stdout.as_mut().expect("a pipe");
        stdout.read_exact(&mut [0; 2]).expect("it is ready");
        Self(child)
    }

    /// Until it has done it; it lives on.
    fn go_on(&mut self) {
        let stdin = self.0.stdin.as_mut().expect("a pipe");
        stdin.write_all(b"\n").expect("it listens");
        let stdout = self.0.stdout.as_mut().expect("a pipe");
        stdout.read_exact(&mut [0; 2]).expect("it has done it");
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().expect("our child");
    }
}

/// Stores through a mapping whose descriptor is closed.
const STORES: &str = "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(fd, 4096); os.close(fd); \
    print('x', flush=True); sys.stdin.readline(); m[7] = 66; print('x', flush=True); sys.stdin.read()";

/// Writes by `io_submit`, of which the kernel tells nobody. The numbers of system calls are those of x86-64.
#[cfg(target_arch = "x86_64")]
const SUBMITS: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDWR)
context = ctypes.c_ulong(0)
assert libc.syscall(206, 1, ctypes.byref(context)) == 0
print('x', flush=True)
sys.stdin.readline()
data = ctypes.create_string_buffer(b"submitted")
block = struct.pack("<QIIHhIQQqQII", 0, 0, 0, 1, 0, fd, ctypes.addressof(data), 9, 0, 0, 0, 0)
block = ctypes.create_string_buffer(block, 64)
blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
assert libc.syscall(209, context, ctypes.c_long(1), blocks) == 1
events = ctypes.create_string_buffer(32)
assert libc.syscall(208, context, ctypes.c_long(1), ctypes.c_long(1), events, None) == 1
print('x', flush=True)
sys.stdin.read()
"#;

/// Somebody who is not of the workload changes a file, between the watch's beginning and its end, with `script`.
fn arrives_in_silence(script: &str, opens_before: bool) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root sees what others have open");
        return;
    }
    let mut pair = Pair::make(Place::Disk);
    let file = pair.source().join("file");
    fs::write(&file, [65; 4096]).expect("written");
    let start = || Helper::start(script, &file);
    let early = opens_before.then(start);
    let survey = pair.first_pass();
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    let mut helper = early.unwrap_or_else(start);
    helper.go_on();
    let due = watch.finish().expect("few changes");
    let named = pair.last_pass(&survey, &due);
    assert_ne!(fs::read(&file).expect("there"), [65; 4096]);
    pair.assert_equal(&format!("named were {named:?}"));
}

#[test]
fn what_a_stranger_stores_through_a_mapping_arrives() {
    arrives_in_silence(STORES, true);
    arrives_in_silence(STORES, false);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn what_a_stranger_submits_arrives() {
    arrives_in_silence(SUBMITS, true);
    arrives_in_silence(SUBMITS, false);
}

#[test]
fn a_name_outside_the_tree_is_heeded() {
    let mut pair = Pair::make(Place::Disk);
    fs::write(pair.source().join("file"), "before").expect("written");
    let outside = pair.outside().join("name");
    fs::hard_link(pair.source().join("file"), &outside).expect("linked");
    let survey = pair.first_pass();
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    fs::write(&outside, "after!").expect("written");
    let due = watch.finish().expect("few changes");
    let named = pair.last_pass(&survey, &due);
    pair.assert_equal(&format!("named were {named:?}"));
}

/// What is told of in between is told by the name it had when the watch began.
#[test]
fn a_folder_that_comes_back_to_where_it_was_is_looked_at_wholly() {
    let mut pair = Pair::make(Place::Disk);
    let at = |name: &str| pair.source().join(name);
    let (home, away) = (at("home"), at("away"));
    fs::create_dir_all(home.join("deep/er")).expect("made");
    fs::write(home.join("deep/er/early"), "before").expect("written");
    fs::write(home.join("deep/er/late"), "before").expect("written");
    let survey = pair.first_pass();
    fs::rename(&home, &away).expect("moved");
    fs::write(away.join("deep/er/early"), "after").expect("written");
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    fs::write(away.join("deep/er/late"), "after").expect("written");
    fs::rename(&away, &home).expect("moved");
    let due = watch.finish().expect("few changes");
    let named = pair.last_pass(&survey, &due);
    pair.assert_equal(&format!("named were {named:?}"));
}

/// It may have the inode of what it replaces, a file or a directory, and nobody watches it.
#[test]
fn a_folder_in_the_place_of_another_entry_is_looked_at_wholly() {
    let mut pair = Pair::make(Place::Disk);
    let source = pair.source();
    let at = |name: &str| source.join(name);
    for number in 0..20 {
        fs::write(at(&format!("file{number}")), "before").expect("written");
        fs::create_dir(at(&format!("folder{number}"))).expect("made");
    }
    let survey = pair.first_pass();
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    for number in 0..20 {
        let (file, folder) = (at(&format!("file{number}")), at(&format!("folder{number}")));
        fs::remove_file(&file).expect("removed");
        fs::create_dir_all(file.join("now/deep")).expect("made");
        fs::write(file.join("now/deep/file"), "new").expect("written");
        fs::remove_dir(&folder).expect("removed");
        fs::create_dir_all(folder.join("now/deep")).expect("made");
        fs::write(folder.join("now/deep/file"), "new").expect("written");
    }
    let due = watch.finish().expect("few changes");
    let named = pair.last_pass(&survey, &due);
    pair.assert_equal(&format!("named were {named:?}"));
}

#[test]
fn only_what_changed_is_looked_at() {
    let mut pair = Pair::make(Place::Disk);
    for number in 0..500 {
        let folder = pair.source().join((number / 50).to_string());
        fs::create_dir_all(&folder).expect("made");
        fs::write(folder.join(number.to_string()), "same").expect("written");
    }
    let survey = pair.first_pass();
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    fs::write(pair.source().join("3/160"), "other").expect("written");
    let due = watch.finish().expect("few changes");
    assert_eq!(due.paths.len(), 1, "{:?}", due.paths);
    let named = pair.last_pass(&survey, &due);
    assert_eq!(named.touched, [b"3/160"]);
    pair.assert_equal("one changed");
}

#[test]
fn more_than_the_kernel_can_tell_is_noticed() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("there");
    let limit: u32 = limit.trim().parse().expect("a number");
    let mut pair = Pair::make(Place::Disk);
    let files = ["one", "other"].map(|name| pair.source().join(name));
    for file in &files {
        fs::write(file, "x").expect("written");
    }
    let survey = pair.first_pass();
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    // Events that equal the one before are one.
    for _ in 0..=limit / 2 {
        for file in &files {
            fs::File::open(file).expect("opened");
        }
    }
    assert!(matches!(watch.finish(), Err(Unwatched::Overflow)));
}

#[test]
fn what_is_mounted_in_the_tree_ends_the_watch() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root mounts");
        return;
    }
    let mut pair = Pair::make(Place::Memory);
    let folder = pair.source().join("folder");
    fs::create_dir(&folder).expect("made");
    let survey = pair.first_pass();
    let mount = |what: &[&str]| {
        let done = Command::new(what[0]).args(&what[1..]).arg(&folder).status();
        assert!(done.expect("it runs").success(), "{what:?}");
    };
    let watch = Watch::begin(&pair.source(), &survey).expect("a local file system");
    mount(&["mount", "-t", "tmpfs", "none"]);
    let ended = watch.finish();
    let again = Watch::begin(&pair.source(), &survey).expect("both are local file systems");
    mount(&["umount"]);
    assert!(matches!(ended, Err(Unwatched::Mounts)));
    assert!(matches!(again.finish(), Err(Unwatched::Mounts)));
}

#[test]
fn a_file_system_that_others_change_is_not_watched() {
    let pair = Pair::make(Place::Disk);
    let survey = page_server::survey::Survey::default();
    drop(pair);
    let begun = Watch::begin(Path::new("/proc/sys/kernel"), &survey);
    assert!(matches!(begun, Err(Unwatched::Remote(_))), "{begun:?}");
}

#[test]
fn an_overlay_that_stores_into_the_tree_is_found_in_other_namespaces() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root mounts");
        return;
    }
    let pair = Pair::make(Place::Memory);
    let path = |name: &str| pair.source().join(name).display().to_string();
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(path(name)).expect("made");
    }
    assert_eq!(upper_of_an_overlay(&pair.source()).expect("known"), None);
    let script = format!(
        "mount -t overlay overlay -o lowerdir={},upperdir={},workdir={} {} && echo x && read line",
        path("lower"),
        path("upper"),
        path("work"),
        path("merged"),
    );
    let mut mounted = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare runs");
    let stdout = mounted.stdout.as_mut().expect("a pipe");
    stdout.read_exact(&mut [0; 2]).expect("it is mounted");
    let found = upper_of_an_overlay(&pair.source());
    drop(mounted.stdin.take());
    mounted.wait().expect("our child");
    let upper = pair.source().join("upper");
    assert_eq!(found.expect("known").as_deref(), Some(upper.as_path()));
}
