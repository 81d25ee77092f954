//! A real PostgreSQL with its children, and a client that speaks the little of its protocol a query needs.

use std::ffi::CString;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::unistd::Pid;

use crate::namespace;
use crate::process::Process;
use crate::rig::Rig;
use crate::shell::run;
use crate::wait::wait_for;

/// The port it listens on.
pub const PORT: u16 = 5432;
/// PostgreSQL refuses to be root; root of a container without `CAP_SYS_RESOURCE` can dump nobody else's processes. So it
/// runs as root and is told that it is this user.
const PRETENDED_USER: u32 = 65534;
/// Tells it so.
const PRETENCE: &str = "#include <sys/types.h>\nuid_t geteuid(void) { return 65534; }\nuid_t getuid(void) { return 65534; }\n";
/// How long an answer may take.
const SILENCE: Duration = Duration::from_secs(60);

/// Where Debian keeps the programs of PostgreSQL, which are not on `PATH`.
pub fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut found: Vec<PathBuf> = versions
        .flatten()
        .map(|version| version.path().join("bin"))
        .filter(|programs| programs.join("postgres").is_file())
        .collect();
    found.sort();
    found.pop()
}

/// A running PostgreSQL.
#[derive(Debug)]
pub struct Postgres {
    process: Process,
}

impl Postgres {
    /// Makes a cluster and starts its server on the source.
    pub fn start(rig: &Rig) -> Result<Self> {
        let programs = programs().context("PostgreSQL is not installed")?;
        let folder = rig.make_folder("postgres")?;
        let pretence = build_pretence(&folder)?;
        let data = folder.join("data");
        fs::create_dir_all(&data)?;
        chown(&data)?;
        let mut initdb = Command::new(programs.join("initdb"));
        initdb
            .args(["--auth=trust", "--username=postgres", "--no-sync", "-D"])
            .arg(&data);
        run(initdb.env("LD_PRELOAD", &pretence))?;
        // What it made as root it would not accept as another user's.
        run(Command::new("chown")
            .args(["-R", &PRETENDED_USER.to_string()])
            .arg(&data))?;
        let mut command = rig.source.command("setsid");
        // It keeps a System V segment, and CRIU moves those only with an IPC namespace of the tree's own.
        command.args(["unshare", "--ipc", "--"]);
        command.arg(programs.join("postgres")).arg("-D").arg(&data);
        let settings = [
            "listen_addresses=0.0.0.0",
            "unix_socket_directories=",
            "dynamic_shared_memory_type=mmap",
            "shared_buffers=16MB",
            "fsync=off",
            // With huge pages CRIU would need as many of them again to look at the shared memory.
            "huge_pages=off",
        ];
        for setting in settings {
            command.args(["-c", setting]);
        }
        fs::write(data.join("pg_hba.conf"), "host all all all trust\n")?;
        let process = Process::start_detached("postgres", command.env("LD_PRELOAD", &pretence))?;
        Ok(Self { process })
    }

    /// The postmaster.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }
}

fn build_pretence(folder: &Path) -> Result<PathBuf> {
    let (source, library) = (folder.join("pretence.c"), folder.join("pretence.so"));
    fs::write(&source, PRETENCE)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library);
    run(compiler.arg(&source))?;
    Ok(library)
}

fn chown(path: &Path) -> Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let user = Some(PRETENDED_USER.into());
    nix::unistd::chown(path.as_c_str(), user, None).context("chown")
}

/// A client with one connection.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Client {
    /// Connects from the network namespace `from`, as soon as the server answers.
    pub fn connect(from: &str, server: SocketAddrV4) -> Result<Self> {
        let from = from.to_owned();
        let thread = std::thread::spawn(move || {
            namespace::enter(&from)?;
            wait_for(SILENCE, "PostgreSQL to answer", || Self::open(server).ok())
        });
        thread.join().map_err(|_| anyhow!("panicked"))?
    }

    fn open(server: SocketAddrV4) -> Result<Self> {
        let writer = TcpStream::connect(server)?;
        writer.set_read_timeout(Some(SILENCE))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut client = Self { reader, writer };
        let body = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0";
        client.writer.write_all(&frame_length(body))?;
        client.writer.write_all(body)?;
        client.rows()?;
        Ok(client)
    }

    /// Runs a query and returns the first column of its rows.
    pub fn query(&mut self, text: &str) -> Result<Vec<String>> {
        let body = [text.as_bytes(), b"\0"].concat();
        self.writer.write_all(b"Q")?;
        self.writer.write_all(&frame_length(&body))?;
        self.writer.write_all(&body)?;
        self.rows()
    }

    /// Reads until the server is ready for a query.
    fn rows(&mut self) -> Result<Vec<String>> {
        let mut rows = Vec::new();
        loop {
            let mut header = [0; 5];
            self.reader
                .read_exact(&mut header)
                .context("the connection to PostgreSQL broke")?;
            let [kind, length @ ..] = header;
            let length = u32::from_be_bytes(length).saturating_sub(4) as usize;
            ensure!(length < 1 << 24, "a message of {length} bytes");
            let mut body = vec![0; length];
            self.reader.read_exact(&mut body)?;
            match kind {
                b'D' => {
                    rows.push(String::from_utf8_lossy(body.get(6..).unwrap_or_default()).into())
                }
                b'E' => bail!("PostgreSQL says: {}", String::from_utf8_lossy(&body)),
                b'Z' => return Ok(rows),
                _ => {}
            }
        }
    }
}

fn frame_length(body: &[u8]) -> [u8; 4] {
    ((body.len() + 4) as u32).to_be_bytes()
}
