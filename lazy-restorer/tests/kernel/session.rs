//! The destination's side of a test: the real `Memory`, a source that answers it, and the workload as a child process.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::session_file::Task;
use lazy_restorer::memory::{Arrival, MemberKey, Memory, Order};
use lazy_restorer::resolver::MemberId;
use lazy_restorer::uffd::UserFault;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::frozen::{Frozen, PID, Random};
use crate::source::{Sent, Shared, follow};
use crate::sys;
use crate::workload::{GO, READY, SETTLED, SKIPPED};

/// A workload that takes longer is stuck.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One workload and everything around it.
pub struct Session {
    name: String,
    shared: Arc<Shared>,
    child: Child,
    socket: UnixStream,
    orders: Option<UnboundedReceiver<Order>>,
    threads: Vec<JoinHandle<()>>,
}

impl Session {
    /// Starts the workload `name` in a process of its own, which hands its descriptor over when asked.
    pub fn start(name: &str, frozen: Frozen) -> Self {
        let (socket, theirs) = UnixStream::pair().expect("a socket pair");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let program = std::env::current_exe().expect("the test knows itself");
        let child = Command::new(program)
            .args([
                "workload_process",
                "--exact",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("LAZY_RESTORER_WORKLOAD", name)
            .env("LAZY_RESTORER_FROZEN", frozen_to_text(&frozen))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .expect("the workload starts");
        let (memory, orders) = Memory::new(vec![frozen.image()]);
        let pages = frozen.pages as usize;
        let sent = Sent {
            sent: vec![false; pages],
            withheld: vec![false; pages],
            ..Sent::default()
        };
        Session {
            name: format!("{name}, seed {}", frozen.seed),
            shared: Arc::new(Shared {
                frozen,
                memory,
                sent: Mutex::new(sent),
                requested: Condvar::new(),
                stop: AtomicBool::new(false),
                reading: AtomicBool::new(true),
                errors: Mutex::new(Vec::new()),
            }),
            child,
            socket,
            orders: Some(orders),
            threads: Vec::new(),
        }
    }

    /// Takes the descriptor over and lets the workload run. False when the kernel does not permit descriptors.
    pub fn attach(&mut self) -> bool {
        let attached = self.attach_unrestored();
        self.restored();
        attached
    }

    /// From here on every page is installed as it comes, not only those that threads wait for.
    pub fn restored(&self) {
        let restored = self.shared.memory.restored();
        restored.expect("the kernel takes early pages");
    }

    /// As [`attach`](Self::attach), while the restore still goes on.
    pub fn attach_unrestored(&mut self) -> bool {
        let (byte, fd) = sys::receive_fd(&self.socket).expect("the workload answers");
        if byte == SKIPPED {
            println!("skipped: the workload may not use userfaultfd");
            return false;
        }
        let fd = fd.expect("a descriptor came along");
        let memory = Arc::clone(&self.shared.memory);
        memory
            .attach(PID, UserFault::from_fd(fd))
            .expect("it is the first");
        let (shared, orders) = (Arc::clone(&self.shared), self.orders.take());
        let orders = orders.expect("attached once");
        self.threads
            .push(thread::spawn(move || follow(&shared, orders)));
        self.tell(GO);
        true
    }

    /// Leaves events where they are, or reads them after all.
    pub fn read_events(&self, read: bool) {
        self.shared.reading.store(read, Ordering::Release);
    }

    /// Whether something found no memory or no descriptor.
    pub fn is_short(&self) -> bool {
        self.shared.memory.is_short()
    }

    /// Waits until the workload asked for so many pages and got them.
    pub fn await_demanded(&self, pages: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.shared.memory.counts().demanded < pages {
            assert!(Instant::now() < deadline, "{}: too few faults", self.name);
            thread::yield_now();
        }
    }

    /// Keeps answers back until [`answer`](Self::answer).
    pub fn put_answers_off(&self) {
        self.shared.sent().puts_off = true;
    }

    /// Waits until the workload asked for a page.
    pub fn await_request(&self) {
        let sent = self.shared.sent();
        let wait = self
            .shared
            .requested
            .wait_timeout_while(sent, PATIENCE, |sent| sent.put_off.is_empty());
        let (sent, _) = wait.expect("nobody panics with the lock");
        assert!(
            !sent.put_off.is_empty(),
            "{}: nothing was asked for",
            self.name
        );
    }

    /// Sends what was put off.
    pub fn answer(&self) {
        let mut sent = self.shared.sent();
        sent.puts_off = false;
        let put_off = std::mem::take(&mut sent.put_off);
        drop(sent);
        for pages in put_off {
            self.shared.send(pages, Arrival::Demanded);
        }
    }

    /// Pushes `frames` random frames from another thread, some of them twice.
    pub fn push_in_background(&mut self, frames: usize) {
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::spawn(move || {
            let mut random = Random(shared.frozen.seed ^ 0x70);
            for _ in 0..frames {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                shared.push(&mut random);
                thread::yield_now();
            }
        }));
    }

    /// Pushes random frames at once.
    pub fn push(&self, frames: usize) {
        let mut random = Random(self.shared.frozen.seed ^ 0x71);
        for _ in 0..frames {
            self.shared.push(&mut random);
        }
    }

    pub fn tell(&mut self, byte: u8) {
        self.socket
            .write_all(&[byte])
            .expect("the workload listens");
    }

    /// Waits for a byte of the workload.
    pub fn expect(&mut self, byte: u8) {
        let mut got = [0];
        let read = self.socket.read_exact(&mut got);
        let status = self.child.try_wait();
        assert!(
            read.is_ok() && got[0] == byte,
            "{}: {read:?}, {got:?}, {status:?}, {:?}, {:?}",
            self.name,
            self.shared.memory.counts(),
            self.shared.errors.lock()
        );
    }

    /// Sends everything still owed and waits until it is settled.
    pub fn settle(&self) {
        let deadline = Instant::now() + PATIENCE;
        let all = self.shared.frozen.whole();
        while self.shared.memory.counts().owed > 0 {
            assert!(
                Instant::now() < deadline,
                "{}: {:?}",
                self.name,
                self.shared.memory.counts()
            );
            for index in 0..all.count {
                self.shared.push_run(all.start.forward(index), 8, false);
            }
            thread::yield_now();
        }
        let tally = self.shared.memory.tally();
        let lazy = self.shared.frozen.image().lazy.slots() as u64;
        assert_eq!(tally.pages + tally.discarded, lazy, "{}", self.name);
    }

    /// The workload is done: everything owed is sent, and it looks at all its memory once more.
    pub fn finish(mut self) {
        self.expect(READY);
        self.settle();
        self.tell(SETTLED);
        let status = self.wait();
        assert!(status.success(), "{}: {status}", self.name);
    }

    /// The workload's process.
    pub fn task(&self) -> Task {
        Task::find(self.child.id().cast_signed()).expect("it lives until it is told to go on")
    }

    /// Waits for the end of the workload's process, which leaves somebody behind.
    pub fn bury_parent(&mut self) {
        self.child.wait().expect("it is ours");
    }

    /// Whether nobody has the memory any more.
    pub fn is_gone(&self) -> bool {
        self.shared.memory.is_gone()
    }

    /// Whether the memory finds the workload's process alive.
    pub fn is_alive(&self) -> bool {
        let key = MemberKey {
            pid: PID,
            member: MemberId(0),
        };
        self.shared.memory.check(key)
    }

    /// Ends the workload wherever it is.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }

    fn wait(&mut self) -> ExitStatus {
        let (done, ended) = mpsc::channel();
        let mut socket = self.socket.try_clone().expect("a copy");
        // The workload never writes after this: only its end ends the read.
        thread::spawn(move || done.send(socket.read(&mut [0]).map(|_| ())));
        let in_time = ended.recv_timeout(PATIENCE);
        if !matches!(in_time, Ok(Ok(()))) {
            let _ = self.child.kill();
            panic!("{}: the workload is stuck", self.name);
        }
        self.child.wait().expect("it is ours")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join().is_ok();
            assert!(
                ended || thread::panicking(),
                "{}: a thread panicked",
                self.name
            );
        }
        let errors = self
            .shared
            .errors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            errors.is_empty() || thread::panicking(),
            "{}: {errors:?}",
            self.name
        );
    }
}

fn frozen_to_text(frozen: &Frozen) -> String {
    format!("{} {} {}", frozen.seed, frozen.pages, frozen.vma_pages)
}
