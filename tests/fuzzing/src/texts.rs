//! Decoders of texts: of the peer's rsync, of a container runtime, CRIU and this host's programs, of the kernel, and of
//! operators.

use std::ffi::OsString;
use std::fmt::Write;
use std::net::SocketAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};
use std::time::Instant;

use common::address::{self, MovingAddress, Prefixed};
use common::container::{Bundle, ContainerFacts, ContainerState, last_error};
use common::identity::{Fingerprint, common_name};
use common::lost::{OnLost, parse_duration, parse_limit};
use common::{criu, host, mounts, proc_text, token};
use page_server::files::check_arguments;
use page_server::{backlog, freezer, mapped, mounts_below, network_lock};
use rustls_pki_types::CertificateDer;

/// The tree that rsync is asked for.
pub(crate) const TREE: &str = "/srv/tree";
/// Words for rsync.
const WORDS: &[&str] = &[
    "--server",
    "--sender",
    "-qlHogDtpAXrSe.iLsfxCIvu",
    "--numeric-ids",
    ".",
    "/srv/tree/",
    "--files-from=-",
    "--from0",
    "-s",
    "/etc/",
    "--log-file=/etc/passwd",
];
/// Separates two files in one input.
const BETWEEN_FILES: u8 = 0;
/// Characters of a foreign name that reach a log.
const MAX_NAME_CHARS: usize = 128;

/// What the destination's rsync asks ours for: one tree is sent, and nothing is written or read besides. Words are separated
/// by spaces, and a small number stands for a word that is known to rsync.
pub(crate) fn rsync_arguments(bytes: &[u8]) -> bool {
    let words = bytes.split(|byte| *byte == b' ');
    let arguments: Vec<String> = words
        .map(|word| match word {
            [number] if usize::from(*number) < WORDS.len() => WORDS[usize::from(*number)].into(),
            word => String::from_utf8_lossy(word).into_owned(),
        })
        .collect();
    if check_arguments(Path::new(TREE), &arguments).is_err() {
        return false;
    }
    let [server, sender, options @ .., here, tree] = &arguments[..] else {
        panic!("{arguments:?}");
    };
    let expected = ["--server", "--sender", ".", "/srv/tree/"];
    assert_eq!([server, sender, here, tree], expected);
    for option in options {
        assert!(option.starts_with('-'), "{option:?} is a path");
        assert!(!option.contains(['/', '\0', ' ']), "{option:?}");
        assert!(
            !option.contains('=') || option == "--files-from=-",
            "{option:?}"
        );
    }
    true
}

/// `config.json` of a bundle, and what the runtime says of a container.
pub(crate) fn container(bytes: &[u8]) -> bool {
    let directory = Path::new("/bundle");
    let bundle = Bundle::parse(directory, bytes);
    if let Ok(bundle) = &bundle {
        let facts = bundle.facts();
        assert!(facts.namespaces.is_sorted() && facts.mounts.is_sorted());
        let sent = postcard::to_extend(facts, Vec::new()).expect("memory");
        let received: ContainerFacts = postcard::from_bytes(&sent).expect("ours");
        assert_eq!(received, *facts);
        for inside in ["/", "/usr/share/x", "relative", ""] {
            let _ = bundle.locate(Path::new(inside));
        }
    }
    bundle.is_ok() || serde_json::from_slice::<ContainerState>(bytes).is_ok()
}

/// What operators write.
pub(crate) fn operator_words(bytes: &[u8]) -> bool {
    let text = &*String::from_utf8_lossy(bytes);
    let fingerprint = text.parse::<Fingerprint>();
    if let Ok(fingerprint) = fingerprint {
        let written = fingerprint.to_string();
        assert_eq!(written.parse().ok(), Some(fingerprint));
        assert_eq!(
            written.replace(':', ""),
            text.replace(':', "").to_uppercase()
        );
    }
    let token = token::parse(text);
    if let Some(token) = &token {
        let digits: String = token.0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digits, text.to_lowercase());
    }
    let address = text.parse::<Prefixed>();
    if let Ok(address) = address {
        let moving = on_a_device(address);
        assert!(moving.prefix > 0 && moving.prefix <= if moving.ip.is_ipv4() { 32 } else { 128 });
        let again = format!("{}/{}", moving.ip, moving.prefix).parse();
        assert_eq!(on_a_device(again.expect("written by us")), moving);
    }
    let duration = parse_duration(text);
    if let Ok(duration) = duration {
        assert!(Instant::now().checked_add(duration).is_some(), "{text}");
        let limit = parse_limit(text).expect("it is a time");
        assert_eq!(limit.0, (!duration.is_zero()).then_some(duration));
    }
    fingerprint.is_ok()
        || token.is_some()
        || address.is_ok()
        || duration.is_ok()
        || text.parse::<OnLost>().is_ok()
}

fn on_a_device(address: Prefixed) -> MovingAddress {
    let paired = address::pair(&[address], &[String::from("eth0")]);
    paired.expect("one for one").remove(0)
}

/// `mountinfo`, with `/proc/PID/cgroup` before it.
pub(crate) fn proc_mounts(bytes: &[u8]) -> bool {
    let mut files = bytes.splitn(2, |byte| *byte == BETWEEN_FILES);
    let cgroups = files.next().unwrap_or_default();
    let mounts = files.next().unwrap_or_default();
    for line in proc_text::lines(bytes) {
        let path = Path::new(std::ffi::OsStr::from_bytes(line));
        assert_eq!(proc_text::unescape(&escaped(line)), path);
        let _ = mounts_below::upper(line);
    }
    let points: Vec<_> = proc_text::lines(mounts)
        .filter_map(proc_text::mount_point)
        .collect();
    let below = mounts::below(mounts, Path::new("/run"));
    assert!(below.iter().all(|point| points.contains(point)));
    let cgroup = freezer::directory_of(cgroups, mounts);
    if let Some(cgroup) = &cgroup {
        let is_below = |point: &std::path::PathBuf| {
            let rest = cgroup.strip_prefix(point).ok();
            rest.is_some_and(|rest| {
                rest != Path::new("")
                    && rest
                        .components()
                        .all(|part| matches!(part, Component::Normal(_)))
            })
        };
        assert!(points.iter().any(is_below), "{cgroup:?}");
    }
    cgroup.is_some() || !below.is_empty()
}

/// As the kernel writes a path (`seq_path` in `fs/seq_file.c`).
fn escaped(path: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for byte in path {
        match b" \t\n\\".contains(byte) {
            true => text.extend(format!("\\{byte:03o}").bytes()),
            false => text.push(*byte),
        }
    }
    text
}

/// `stat`, `status`, `maps` and `smaps` of a process.
pub(crate) fn proc_tasks(bytes: &[u8]) -> bool {
    let task = proc_text::state_and_start(bytes);
    if let Some(end) = bytes.iter().rposition(|byte| *byte == b')') {
        let renamed = [b"1 (\xff) R 1 1\n", &bytes[end..]].concat();
        assert_eq!(proc_text::state_and_start(&renamed), task);
    }
    let pid = proc_text::innermost_pid(bytes);
    let renamed = [b"Name:\t\xc3\n", bytes].concat();
    assert_eq!(proc_text::innermost_pid(&renamed), pid);
    let lazy = proc_text::has_lazy_memory(bytes);
    assert_eq!(proc_text::has_lazy_memory(&renamed), lazy);
    let mut mappings = 0;
    for mapping in proc_text::lines(bytes).filter_map(mapped::mapping) {
        let link = mapping.link_name();
        // As `map_files` takes them (`dname_to_vma_addr` in `fs/proc/base.c`).
        let mut ends = link.split('-');
        assert!(ends.all(|end| end == "0" || !end.starts_with(['0', '+'])));
        let line = [link.as_bytes(), b" rw-s 0 0:0 0 ", mapping.name].concat();
        let again = mapped::mapping(&line).expect("it is one");
        assert_eq!((again.link_name(), again.name), (link, mapping.name));
        assert!(again.is_shared() && again.is_writable() && !again.is_executable());
        mappings += 1;
    }
    task.is_some() || pid.is_some() || lazy || mappings > 0
}

/// `/proc/net/tcp` and `tcp6`.
pub(crate) fn proc_sockets(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let addresses = backlog::addresses(&text);
    let table: String = addresses.iter().map(socket_line).collect();
    assert_eq!(backlog::addresses(&table), addresses);
    !addresses.is_empty()
}

/// A line of the table, as the kernel writes it.
fn socket_line(address: &SocketAddr) -> String {
    let words: Vec<u8> = match address {
        SocketAddr::V4(address) => address.ip().octets().to_vec(),
        SocketAddr::V6(address) => address.ip().octets().to_vec(),
    };
    let mut hex = String::new();
    for word in words.as_chunks::<4>().0 {
        write!(hex, "{:08X}", u32::from_ne_bytes(*word)).expect("memory");
    }
    let port = address.port();
    format!("0: {hex}:{port:04X} {hex}:0000 0A 0:0 0:0 0 0 0 7\n")
}

/// What CRIU, a runtime, `nft` and the kernel say of themselves.
pub(crate) fn tool_words(bytes: &[u8]) -> bool {
    let text = &*String::from_utf8_lossy(bytes);
    let version = criu::parse_version(text);
    if let Some(version) = &version {
        assert!(!criu::is_newer(version, version));
    }
    let times = text.lines().filter_map(criu::log_time).count();
    let error = criu::quoted(text).or_else(|| last_error(text));
    assert!(error.is_none_or(|error| !error.contains('\n')));
    let run = network_lock::run_id(text);
    if let Some(run) = &run {
        assert!(network_lock::belongs(&format!("CRIU-{run}"), run));
    }
    for table in network_lock::tables(text) {
        assert!(!table.is_empty() && !table.contains(char::is_whitespace));
    }
    assert!(host::features_in(text).is_sorted());
    let available = host::available_in(bytes);
    let _ = host::check_kernel(text, (5, 12), "");
    version.is_some() || times > 0 || run.is_some() || available.is_some()
}

/// A peer's certificate, as far as we read it ourselves: its name goes into logs.
pub(crate) fn certificate(bytes: &[u8]) -> bool {
    let Some(name) = common_name(&CertificateDer::from(bytes)) else {
        return false;
    };
    assert!(name.chars().count() <= MAX_NAME_CHARS);
    assert!(!name.contains(char::is_control), "{name:?}");
    true
}

/// Good inputs of these targets.
pub(crate) fn corpus(target: &str) -> Vec<Vec<u8>> {
    let bytes = |text: &&str| text.as_bytes().to_vec();
    let texts: &[&str] = match target {
        "rsync_arguments" => &[
            "\0 \x01 \x02 \x03 \x04 \x05",
            "\0 \x01 -lHogDtpAXIRSe.LsfxCIvu \x03 \x06 \x07 \x04 \x05",
            "--server --sender . /srv/tree/",
        ],
        "container" => &[CONFIG, STATE],
        "operator_words" => &[
            "E3:B0:C4:42:98:FC:1C:14:9A:FB:F4:C8:99:6F:B9:24:27:AE:41:E4:64:9B:93:4C:A4:95:99:1B:78:52:B8:55",
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "10.0.0.100/32",
            "2001:db8::7/64",
            "90",
            "5m",
            "keep-paused",
        ],
        "proc_sockets" => &[TCP, TCP6],
        "proc_tasks" => &[STAT, STATUS, SMAPS],
        "tool_words" => &[
            CRIU_LOG,
            "Version: 4.2.1\nGitID: v4.2.1\n",
            "MemTotal:        8000000 kB\nMemAvailable:    4711000 kB\n",
        ],
        "proc_mounts" => return vec![odd(CGROUPS_AND_MOUNTS)],
        "certificate" => return vec![CERTIFICATE.to_vec()],
        _ => &[],
    };
    let mut inputs: Vec<Vec<u8>> = texts.iter().map(bytes).collect();
    if target == "proc_tasks" {
        inputs.extend([STAT, STATUS, SMAPS].map(odd));
    }
    inputs
}

/// The same with a name that is no UTF-8.
fn odd(text: &str) -> Vec<u8> {
    OsString::from(text.replace("odd", "\u{1}"))
        .into_vec()
        .into_iter()
        .map(|byte| if byte == 1 { 0xff } else { byte })
        .collect()
}

/// A host's certificate, made by `page-server identity init`.
const CERTIFICATE: &[u8] = include_bytes!("host.der");

/// Of `runc spec`, shortened.
const CONFIG: &str = r#"{"ociVersion": "1.0.2", "process": {"terminal": false, "args": ["sh"]}, "root": {"path": "rootfs"},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/usr", "type": "bind", "source": "/srv/usr", "options": ["rbind", "ro"]}],
    "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}]}}"#;
/// Of `runc state`.
const STATE: &str = r#"{"ociVersion": "1.0.2", "id": "box", "pid": 4711, "status": "running", "bundle": "/srv/box",
    "rootfs": "/srv/box/rootfs", "created": "2026-11-24T10:00:00.123456789Z", "owner": ""}"#;
const STAT: &str = "4711 (a) odd) S 1 4711 4711 0 -1 4194560 1161 0 4 0 3 2 0 0 20 0 5 0 84563 71163904 3584 \
    18446744073709551615 1 1 0 0 0 0 0 4097 17642 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n";
const STATUS: &str = "Name:\todd-server\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4711\nNgid:\t0\nPid:\t4711\n\
    PPid:\t1\nTracerPid:\t0\nNSpid:\t4711\t1\nvoluntary_ctxt_switches:\t12\n";
const SMAPS: &str = "00400000-00452000 r-xp 00000000 fd:01 173521                             /srv/odd\n\
    Size:                328 kB\nVmFlags: rd ex mr mw me sd\n\
    7f5e6c000000-7f5e6c010000 rw-s 00000000 fd:01 1234                       /srv/a b (deleted)\n\
    7ffc2f9b7000-7ffc2f9d8000 rw-p 00000000 00:00 0                          [stack]\n\
    VmFlags: rd wr mr mw me gd ac um\n";
const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
    0: 0100007F:1B58 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 21307 1 00 100 0 0 10 0\n   \
    1: 6400000A:18EB 0200000A:D431 03 00000000:00000000 01:00000063 00000000     0        0 0 2 0000000000000000\n";
const TCP6: &str = "   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A \
    00000000:00000000 00:00000000 00000000     0        0 21310 1 0000000000000000 100 0 0 10 0\n";
const CGROUPS_AND_MOUNTS: &str = "6:freezer:/box/odd\n5:cpu,cpuacct:/box\n0::/box2\n\0\
    29 1 0:19 / /srv/odd rw,relatime shared:1 - tmpfs none rw\n\
    30 29 0:20 / /run/a\\040b rw - tmpfs tmpfs rw,mode=755\n\
    31 30 0:21 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
    32 30 0:22 / /sys/fs/cgroup/unified rw shared:3 - cgroup2 cgroup2 rw,nsdelegate\n\
    51 30 0:44 / /srv/box rw,relatime - overlay overlay rw,lowerdir=/a:/b,upperdir=/srv/up\\040per,workdir=/srv/w\n";
const CRIU_LOG: &str = "(00.000000) CRIU run id = 0b014ddc-bd5e-45f0-9c68-d007b2a630d7\n\
    (00.027321) Seized task 4711, state 0\n(00.031000) Error (criu/sk-inet.c:188): inet: Connected TCP socket\n\
    table inet CRIU-0b014ddc-bd5e-45f0-9c\ntime=\"2026\" level=error msg=\"container gone\"\n";
