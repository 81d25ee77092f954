//! A tree of two processes with sockets of every kind, all of them with data that nobody has read yet.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::namespace;
use crate::process::Process;
use crate::rig::Rig;
use crate::wait::{wait_for, wait_until};

/// The TCP and the UDP port it serves.
pub const PORT: u16 = 7010;
/// Bytes a client sends that are not read before the move.
const TO_SERVER: usize = 3_000_000;
/// Bytes the server sends that are not read before the move.
const TO_CLIENT: usize = 5_000_000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Arguments: folder, port, service address. Says `ready`, waits for the file `go`, and says `good` or what is wrong.
const SCRIPT: &str = r#"
import os, socket, sys, time
folder, port = sys.argv[1], int(sys.argv[2])

def say(text):
    with open(folder + "/said.new", "w") as file:
        file.write(text)
    os.rename(folder + "/said.new", folder + "/said")

def pattern(salt, length):
    return bytes((salt + i * 7 + i // 251) & 255 for i in range(4096)) * (length // 4096) + b"\0" * (length % 4096)

def exactly(connection, length):
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError(f"{len(data)} of {length}")
        data += part
    return bytes(data)

# A client of ours on the network, which has sent what nobody reads, and reads nothing.
listener = socket.create_server(("0.0.0.0", port), backlog=16)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind((sys.argv[3], port))
say("listening")
client, _ = listener.accept()
client.setblocking(False)
answer = pattern(1, TO_CLIENT)
sent = 0
full_since = None
while full_since is None or time.monotonic() - full_since < 0.3:
    try:
        sent += client.send(answer[sent:sent + 65536])
        full_since = None
    except BlockingIOError:
        full_since = full_since or time.monotonic()
        time.sleep(0.01)
client.setblocking(True)

# Inside the tree.
ours, theirs = {}, {}
def put(name, a, b):
    ours[name], theirs[name] = a, b
put("stream", *socket.socketpair())
put("dgram", *socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
put("seqpacket", *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
named = socket.socket(socket.AF_UNIX)
named.bind(folder + "/named")
named.listen(4)
inner = socket.socket(socket.AF_UNIX)
inner.connect(folder + "/named")
put("named", inner, named.accept()[0])
loop = socket.create_server(("127.0.0.1", 0))
inner = socket.create_connection(loop.getsockname())
put("loop", inner, loop.accept()[0])
loop.close()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
inner = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inner.connect(udp.getsockname())
put("udp", inner, udp)

messages = [b"x", pattern(2, 1000), pattern(3, 30000)]
streams = ["stream", "named", "loop"]
for name in streams:
    for _ in range(2):
        ours[name].sendall(pattern(4, 20000))
        theirs[name].sendall(pattern(5, 20000))
for name in ["dgram", "seqpacket"]:
    for message in messages:
        ours[name].send(message)
        theirs[name].send(message)

child = os.fork()
mine, other = (ours, theirs) if child else (theirs, ours)
for connection in other.values():
    connection.close()
if child:
    say("ready")
while not os.path.exists(folder + "/go"):
    time.sleep(0.01)

wrong = []
def check(name, good):
    if not good:
        wrong.append(name)
for name in streams:
    check(name, exactly(mine[name], 40000) == pattern(5 if child else 4, 20000) * 2)
for name in ["dgram", "seqpacket"]:
    check(name, [mine[name].recv(65536) for _ in messages] == messages)
# And all of them still carry something new.
for name in streams + ["dgram", "seqpacket"]:
    mine[name].send(b"again")
    check(name + " again", mine[name].recv(5) == b"again")
if child:
    mine["udp"].send(b"datagram")
else:
    check("udp", mine["udp"].recv(100) == b"datagram")
    os._exit(len(wrong))
check("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)
check("from the client", exactly(client, TO_SERVER) == pattern(6, TO_SERVER))
client.sendall(answer[sent:])
second, _ = listener.accept()
check("listener", exactly(second, 5) == b"hello")
second.sendall(b"hello")
data, peer = datagrams.recvfrom(100)
datagrams.sendto(data, peer)
say(f"wrong: {wrong}" if wrong else "good")
time.sleep(1000)
"#;

/// The same bytes as the script's.
fn pattern(salt: usize, length: usize) -> Vec<u8> {
    let block: Vec<u8> = (0..4096).map(|i| (salt + i * 7 + i / 251) as u8).collect();
    let mut bytes = block.repeat(length / 4096);
    bytes.resize(length, 0);
    bytes
}

/// The tree and its client.
#[derive(Debug)]
pub struct Sockets {
    /// The root of the tree.
    pub process: Process,
    folder: PathBuf,
    from: String,
    server: SocketAddrV4,
    client: JoinHandle<Result<()>>,
}

impl Sockets {
    /// Starts the tree on the source and its client, and returns when all buffers are full.
    pub fn start(rig: &Rig) -> Result<Self> {
        let folder = rig.make_folder("sockets")?;
        let script = SCRIPT
            .replace("TO_CLIENT", &TO_CLIENT.to_string())
            .replace("TO_SERVER", &TO_SERVER.to_string());
        let mut command = rig.source.command("setsid");
        command
            .args(["/usr/bin/python3", "-I", "-c", &script])
            .arg(&folder)
            .args([PORT.to_string(), rig.service.0.to_string()]);
        let process = Process::start_detached("sockets", &mut command)?;
        let (from, server) = (rig.client.namespace().to_owned(), rig.service.port(PORT));
        let (inside, go) = (from.clone(), folder.join("go"));
        let client = std::thread::spawn(move || {
            namespace::enter(&inside)?;
            be_client(server, || go.exists())
        });
        let sockets = Self {
            process,
            folder,
            from,
            server,
            client,
        };
        sockets.wait_for("ready")?;
        Ok(sockets)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.join("said")).unwrap_or_default()
    }

    fn wait_for(&self, wanted: &str) -> Result<()> {
        let done = || {
            let said = self.said();
            said == wanted || said.starts_with("wrong")
        };
        wait_until(PATIENCE, &format!("the tree to say {wanted:?}"), done)
            .with_context(|| format!("it says {:?}", self.said()))?;
        ensure!(self.said() == wanted, "the tree says {:?}", self.said());
        Ok(())
    }

    /// Lets everybody read what was on its way, and checks it.
    pub fn finish(self) -> Result<()> {
        fs::write(self.folder.join("go"), "")?;
        let (from, server) = (self.from.clone(), self.server);
        let late = std::thread::spawn(move || {
            namespace::enter(&from)?;
            late_clients(server)
        });
        let join = |thread: JoinHandle<Result<()>>| {
            thread.join().map_err(|_| anyhow!("a client panicked"))?
        };
        let late = join(late);
        let client = join(self.client).map_err(|error| error.context("the client"));
        let good = fs::read_to_string(self.folder.join("said"));
        client
            .and(late)
            .with_context(|| format!("the tree says {good:?}"))?;
        let folder = self.folder.clone();
        wait_until(PATIENCE, "the tree's verdict", || {
            fs::read_to_string(folder.join("said")).is_ok_and(|said| said != "ready")
        })?;
        let said = fs::read_to_string(self.folder.join("said"))?;
        ensure!(said == "good", "the tree says {said:?}");
        Ok(())
    }
}

fn be_client(server: SocketAddrV4, go: impl Fn() -> bool) -> Result<()> {
    let mut connection = wait_for(PATIENCE, "the tree to listen", || {
        TcpStream::connect(server).ok()
    })?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut writing = connection.try_clone()?;
    // Blocks until the tree reads.
    let writer = std::thread::spawn(move || writing.write_all(&pattern(6, TO_SERVER)));
    wait_until(2 * PATIENCE, "the word to go on", go)?;
    let mut answer = vec![0; TO_CLIENT];
    connection.read_exact(&mut answer).context("the answer")?;
    ensure!(answer == pattern(1, TO_CLIENT), "the answer is damaged");
    let written = writer.join().map_err(|_| anyhow!("panicked"))?;
    written.context("what was sent")
}

/// The listening socket and the UDP socket still serve.
fn late_clients(server: SocketAddrV4) -> Result<()> {
    let mut connection = TcpStream::connect(server).context("the listening socket")?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(b"hello")?;
    let mut answer = [0; 5];
    connection
        .read_exact(&mut answer)
        .context("the listening socket")?;
    ensure!(&answer == b"hello", "{answer:?}");
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    wait_for(PATIENCE, "a datagram", || {
        socket.send(b"datagram").ok()?;
        let length = socket.recv(&mut answer).ok()?;
        (length == answer.len()).then_some(())
    })
    .context("the UDP socket")
}
