//! Servers in languages with runtimes of their own. All speak as much of redis' protocol as the crowd needs, hold a
//! ballast of known content, and look at a random piece of it with every GET: a wrong byte there is an error reply.

use std::fs;

use anyhow::Result;
use nix::unistd::Pid;

use crate::process::Process;
use crate::redis;
use crate::rig::Rig;

/// A server's language.
#[derive(Debug, Clone, Copy)]
pub enum Language {
    /// CPython: four forked workers on one listening socket, with the ballast of their parent.
    Python,
    /// V8: one thread that runs the program, and those of its engine.
    Node,
    /// The JVM: a thread for each connection, a collector and compilers beside them.
    Java,
}

const PYTHON: &str = r#"
import os, random, socket, sys, threading
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("0.0.0.0", int(sys.argv[1])))
listener.listen(512)
piece = lambda i: (str(i * 2654435761) * 200).encode()
ballast = [piece(i) for i in range(16000)]
def talk(connection):
    stream, data = connection.makefile("rwb", 1 << 20), {}
    def word():
        length = int(stream.readline()[1:])
        return stream.read(length + 2)[:-2]
    while True:
        line = stream.readline()
        if not line:
            return
        words = [word() for _ in range(int(line[1:]))]
        if words[0] == b"SET":
            data[words[1]] = words[2]
            stream.write(b"+OK\r\n")
        else:
            i = random.randrange(len(ballast))
            if ballast[i] != piece(i):
                stream.write(b"-ERR ballast damaged\r\n")
            value = data[words[1]]
            stream.write(b"$%d\r\n%s\r\n" % (len(value), value))
        stream.flush()
for _ in range(3):
    if os.fork() == 0:
        break
while True:
    connection, _ = listener.accept()
    threading.Thread(target=talk, args=(connection,), daemon=True).start()
"#;

const NODE: &str = r#"
const net = require("net");
const piece = (i) => String(i * 7919).repeat(300);
const ballast = Array.from({ length: 20000 }, (_, i) => Buffer.from(piece(i)));
net.createServer((socket) => {
  let rest = Buffer.alloc(0);
  const data = new Map();
  const parse = () => {
    let at = 0;
    const line = () => {
      const end = rest.indexOf("\r\n", at);
      if (end < 0) return null;
      const text = rest.toString("latin1", at + 1, end);
      at = end + 2;
      return Number(text);
    };
    const count = line();
    if (count === null) return null;
    const words = [];
    for (let i = 0; i < count; i++) {
      const length = line();
      if (length === null || rest.length < at + length + 2) return null;
      words.push(Buffer.from(rest.subarray(at, at + length)));
      at += length + 2;
    }
    rest = rest.subarray(at);
    return words;
  };
  socket.on("error", () => {});
  socket.on("data", (chunk) => {
    rest = rest.length ? Buffer.concat([rest, chunk]) : chunk;
    for (let words; (words = parse()); ) {
      const key = words[1].toString();
      if (words[0].toString() === "SET") {
        data.set(key, words[2]);
        socket.write("+OK\r\n");
        continue;
      }
      const i = Math.floor(Math.random() * ballast.length);
      if (ballast[i].toString() !== piece(i)) socket.write("-ERR ballast damaged\r\n");
      const value = data.get(key);
      socket.write(Buffer.concat([Buffer.from(`$${value.length}\r\n`), value, Buffer.from("\r\n")]));
    }
  });
}).listen(Number(process.argv[2]), "0.0.0.0", 512);
"#;

const JAVA: &str = r#"
import java.io.*;
import java.net.*;
import java.util.*;
import java.util.concurrent.ThreadLocalRandom;

public class Server {
    static byte[] piece(int i) { return Integer.toString(i * 7919).repeat(300).getBytes(); }
    static byte[][] ballast = new byte[20000][];

    static String line(InputStream in) throws IOException {
        StringBuilder text = new StringBuilder();
        for (int c = in.read(); c != '\n'; c = in.read()) {
            if (c < 0) return null;
            if (c != '\r') text.append((char) c);
        }
        return text.toString();
    }

    static void talk(Socket socket) throws IOException {
        socket.setTcpNoDelay(true);
        InputStream in = new BufferedInputStream(socket.getInputStream(), 1 << 16);
        OutputStream out = new BufferedOutputStream(socket.getOutputStream(), 1 << 16);
        Map<String, byte[]> data = new HashMap<>();
        for (String line = line(in); line != null; line = line(in)) {
            byte[][] words = new byte[Integer.parseInt(line.substring(1))][];
            for (int i = 0; i < words.length; i++) {
                words[i] = in.readNBytes(Integer.parseInt(line(in).substring(1)));
                in.readNBytes(2);
            }
            if (new String(words[0]).equals("SET")) {
                data.put(new String(words[1]), words[2]);
                out.write("+OK\r\n".getBytes());
            } else {
                int i = ThreadLocalRandom.current().nextInt(ballast.length);
                if (!Arrays.equals(ballast[i], piece(i))) out.write("-ERR ballast damaged\r\n".getBytes());
                byte[] value = data.get(new String(words[1]));
                out.write(("$" + value.length + "\r\n").getBytes());
                out.write(value);
                out.write("\r\n".getBytes());
            }
            if (in.available() == 0) out.flush();
        }
    }

    public static void main(String[] arguments) throws Exception {
        for (int i = 0; i < ballast.length; i++) ballast[i] = piece(i);
        ServerSocket listener = new ServerSocket(Integer.parseInt(arguments[0]), 512);
        while (true) {
            Socket socket = listener.accept();
            new Thread(() -> { try { talk(socket); } catch (IOException end) { } }).start();
        }
    }
}
"#;

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

impl Server {
    /// Starts it on the source.
    pub fn start(rig: &Rig, language: Language) -> Result<Self> {
        let folder = rig.make_folder("server")?;
        let (file, text) = match language {
            Language::Python => ("server.py", PYTHON),
            Language::Node => ("server.js", NODE),
            Language::Java => ("Server.java", JAVA),
        };
        let file = folder.join(file);
        fs::write(&file, text)?;
        let mut command = rig.source.command("setsid");
        match language {
            Language::Python => command.args(["/usr/bin/python3", "-I"]),
            Language::Node => command.arg("node"),
            // Performance counters would be a file under /tmp that is mapped and written all the time.
            Language::Java => command.args(["java", "-XX:-UsePerfData", "-Xms128m", "-Xmx128m"]),
        };
        command.arg(&file).arg(redis::PORT.to_string());
        let process = Process::start_detached("server", &mut command)?;
        Ok(Self { process })
    }

    /// Its root on the source.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }
}
