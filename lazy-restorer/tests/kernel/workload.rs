//! The migrated process: what it does with its memory, and its checks of every byte.

use std::io::{Read, Write, stdin};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use common::page::{PageIndex, PageRange};

use crate::frozen::{Frozen, Page, State};
use crate::{stress, sys};

/// The descriptor comes with this byte.
pub const HANDED_OVER: u8 = b'u';
/// No descriptor can be had.
pub const SKIPPED: u8 = b'x';
/// The workload may run.
pub const GO: u8 = b'g';
/// The workload did what it wanted.
pub const READY: u8 = b'r';
/// Everything was sent.
pub const SETTLED: u8 = b's';

/// Whoever this process plays, as the environment says.
pub fn run_from_environment() {
    let Ok(name) = std::env::var("LAZY_RESTORER_WORKLOAD") else {
        return;
    };
    let text = std::env::var("LAZY_RESTORER_FROZEN").unwrap_or_default();
    let numbers: Vec<u64> = text.split(' ').flat_map(str::parse).collect();
    let &[seed, pages, vma_pages] = numbers.as_slice() else {
        panic!("three numbers, not {text:?}");
    };
    let frozen = Frozen {
        seed,
        pages,
        vma_pages,
    };
    if let Some(workload) = Workload::hand_over(frozen) {
        workload.run(&name);
    }
    std::process::exit(0);
}

/// The workload and its line to the test.
pub struct Workload {
    pub frozen: Frozen,
    socket: UnixStream,
}

impl Workload {
    fn hand_over(frozen: Frozen) -> Option<Self> {
        let socket = stdin()
            .as_fd()
            .try_clone_to_owned()
            .expect("standard input");
        let mut socket = UnixStream::from(socket);
        let uffd = match sys::userfault() {
            Ok(uffd) => uffd,
            Err(error) => {
                eprintln!("no userfaultfd: {error}");
                socket.write_all(&[SKIPPED]).expect("the test listens");
                return None;
            }
        };
        sys::map(frozen.whole()).expect("the addresses are free");
        sys::register(&uffd, frozen.whole()).expect("anonymous memory can be watched");
        sys::send_fd(&socket, HANDED_OVER, uffd.as_raw_fd()).expect("the test listens");
        let mut workload = Workload { frozen, socket };
        workload.expect(GO);
        Some(workload)
    }

    pub fn say(&mut self, byte: u8) {
        self.socket.write_all(&[byte]).expect("the test listens");
    }

    pub fn expect(&mut self, byte: u8) {
        let mut got = [0];
        self.socket.read_exact(&mut got).expect("the test speaks");
        assert_eq!(got[0], byte);
    }

    /// Lets the test send the rest.
    pub fn settle(&mut self) {
        self.say(READY);
        self.expect(SETTLED);
    }

    fn run(mut self, name: &str) {
        match name {
            "removed_while_waiting" => self.removed_while_waiting(),
            "wiped_on_fork" => self.wiped_on_fork(),
            "split" => self.split(),
            "orphan" => self.orphan(),
            "moved_over_what_is_leaving" => self.moved_over_what_is_leaving(),
            "shrunk_while_moved" => self.shrunk_while_moved(),
            name => stress::run(&mut self, name),
        }
    }

    /// Panics unless a page holds what it must.
    pub fn check(&self, page: PageIndex, state: State) {
        if let Some(index) = self.difference(page, state) {
            let mut got: Page = [0; _];
            sys::load(page, &mut got);
            let expected = self.frozen.content(state);
            let seed = self.frozen.seed;
            let (got, expected) = (got[index], expected[index]);
            eprintln!(
                "seed {seed}: {page:?}, {state:?}: word {index} is {got:#x}, not {expected:#x}"
            );
            std::process::exit(1);
        }
    }

    /// The first word of a page that is not what it must be.
    pub fn difference(&self, page: PageIndex, state: State) -> Option<usize> {
        let mut got: Page = [0; _];
        sys::load(page, &mut got);
        let expected = self.frozen.content(state);
        (0..got.len()).find(|index| got[*index] != expected[*index])
    }

    /// One thread waits for a page while another removes it.
    fn removed_while_waiting(&mut self) {
        let page = self.frozen.page(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| sys::load(page, &mut [0; _]));
            let mut byte = [0];
            (&self.socket)
                .read_exact(&mut byte)
                .expect("the test speaks");
            sys::advise(PageRange::new(page, 1), libc::MADV_DONTNEED).expect("it is mapped");
            reader.join().expect("it reads something");
        });
        self.check(page, State::Zero);
        self.settle();
        self.check(page, State::Zero);
    }

    /// A child of fork finds zeros where its parent had content.
    fn wiped_on_fork(&mut self) {
        let page = self.frozen.page(0);
        self.check(page, State::Frozen(page));
        sys::advise(PageRange::new(page, 1), libc::MADV_WIPEONFORK).expect("it is mapped");
        let wiped = sys::in_child(|| self.difference(page, State::Zero).is_none());
        assert!(wiped, "the child sees zeros");
        self.check(page, State::Frozen(page));
        self.settle();
    }

    /// A child stays when its parent ends, in the session that its parent led.
    fn orphan(&mut self) {
        sys::lead_a_session().expect("not yet");
        sys::leave_a_child();
    }

    /// Every other page has a protection of its own, so every page is a mapping of its own.
    fn split(&mut self) {
        for index in (0..self.frozen.pages).step_by(2) {
            let page = PageRange::new(self.frozen.page(index), 1);
            sys::split_mapping(page).expect("it is mapped");
        }
        self.settle();
        for index in 0..self.frozen.pages {
            let page = self.frozen.page(index);
            self.check(page, State::Frozen(page));
        }
    }

    /// `mremap` that moves and shrinks, right in front of other frozen pages.
    fn shrunk_while_moved(&mut self) {
        let half = self.frozen.pages / 2;
        let from = PageRange::new(self.frozen.page(half), 8);
        let target = self.frozen.page(0);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        sys::remap(from, 4, flags, target).expect("both are mapped");
        self.settle();
        for index in 0..half {
            let was = if index < 4 { half + index } else { index };
            self.check(
                self.frozen.page(index),
                State::Frozen(self.frozen.page(was)),
            );
        }
    }

    /// While one thread has yet to report that its pages moved away, another moves its own to where they were.
    fn moved_over_what_is_leaving(&mut self) {
        let part = |index| PageRange::new(self.frozen.page(index), 8);
        let (first, second, third) = (part(0), part(16), part(32));
        let move_to = |from: PageRange, to: PageRange| {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            sys::remap(from, from.count, flags, to.start).expect("one mapping");
        };
        std::thread::scope(|scope| {
            // The kernel reports the end of what was at the target first, and waits until that is read.
            scope.spawn(|| move_to(first, second));
            sys::await_unmapped(first);
            scope.spawn(|| move_to(third, first));
            sys::await_unmapped(third);
            (&self.socket)
                .write_all(&[READY])
                .expect("the test listens");
        });
        for index in 0..8 {
            let state = |from: PageRange| State::Frozen(from.start.forward(index));
            self.check(first.start.forward(index), state(third));
            self.check(second.start.forward(index), state(first));
        }
        self.settle();
    }
}
