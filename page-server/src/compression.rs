//! Whether the next runs are compressed: pure, fed with what sending cost.
//!
//! Compression pays when the time it takes is less than the time the link is spared, and neither is known beforehand:
//! the link may be shaped, the processor shared, the data noise. So both ways are tried for a *slice* of pages each, and
//! the faster one is kept. Now and then the other is tried again, ever more rarely as long as it loses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Compress while it makes the push faster
    #[default]
    Auto,
    /// Compress whatever shrinks
    Always,
    /// Do not compress
    Never,
}

/// Bytes of pages over which a rate means something: several times what credit and buffers let through at once on a
/// short path.
const SLICE_BYTES: u64 = 2 << 20;
/// Time over which it does: several turns of whoever else wants this processor.
const SLICE_TIME: Duration = Duration::from_millis(20);
/// Bytes of pages after which a trial may be given up because compressing alone takes too long.
const EARLY_BYTES: u64 = 1 << 20;
/// Slices until the slower way is tried again, at first and at most.
const PAUSE_SLICES: (u32, u32) = (8, 128);
/// Compressing must take less than this part of the time to be begun: rates are noisy, it costs the processor of both
/// ends, and where it pays it pays more.
const CLEARLY: f64 = 0.8;

/// Sending a byte takes longer than this many nanoseconds where a single page is compressed: at 500 Mbit/s what it spares
/// the link is what it costs two processors while a thread waits.
const SLOW: f64 = 16.0;

/// Sending a byte is expected to take longer than this many nanoseconds where compressing is not tried out first: below 200
/// Mbit/s the slices that are sent as they are, and the pages that faults ask for meanwhile, take longer than all that can be
/// lost.
const SURELY_SLOW: f64 = 40.0;

/// For what compressing pays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Pays {
    /// For nothing.
    #[default]
    Nothing,
    /// For pages that go together.
    Several,
    /// Also for a page by itself.
    Single,
}

/// Shows those who answer requests what the push found out. Clones show the same.
///
/// It has one writer, and who reads an old value for a moment does no harm: no lock, so that a fault never waits for
/// bulk here.
#[derive(Clone, Debug, Default)]
pub struct Paying(Arc<AtomicU8>);

impl Paying {
    /// Says for what compressing pays.
    pub fn say(&self, pays: Pays) {
        self.0.store(pays as u8, Ordering::Relaxed);
    }

    /// Whether compressing pays for so many pages that go together.
    pub fn is_so(&self, pages: u64) -> bool {
        let least = match pages {
            1 => Pays::Single,
            _ => Pays::Several,
        };
        self.0.load(Ordering::Relaxed) >= least as u8
    }
}

/// One run that was sent.
#[derive(Clone, Copy, Debug)]
pub struct SentRun {
    /// Bytes of its pages.
    pub page_bytes: u64,
    /// Time the compressor took.
    pub compressing: Duration,
    /// Time since the run before was sent.
    pub elapsed: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Raw,
    Packed,
}

impl Way {
    fn other(self) -> Way {
        match self {
            Way::Raw => Way::Packed,
            Way::Packed => Way::Raw,
        }
    }
}

/// What has been sent of the present slice.
#[derive(Clone, Copy, Debug, Default)]
struct Slice {
    page_bytes: u64,
    compressing: Duration,
    elapsed: Duration,
}

/// Decides between the two ways.
#[derive(Debug)]
pub struct Compression {
    mode: Mode,
    way: Way,
    slice: Slice,
    /// The first slice fills the buffers on the way and says nothing.
    is_warm: bool,
    /// The present slice is a trial of the slower way.
    on_trial: bool,
    /// Nanoseconds for a byte of pages, as last measured.
    raw: Option<f64>,
    packed: Option<f64>,
    /// Slices until the next trial, and how many it will be the next time.
    until_trial: u32,
    pause: u32,
}

impl Compression {
    /// Nothing is known yet.
    pub fn new(mode: Mode) -> Self {
        Compression {
            mode,
            way: match mode {
                Mode::Always => Way::Packed,
                Mode::Auto | Mode::Never => Way::Raw,
            },
            slice: Slice::default(),
            is_warm: false,
            on_trial: false,
            raw: None,
            packed: None,
            until_trial: 0,
            pause: PAUSE_SLICES.0,
        }
    }

    /// Sending a byte of pages as they are is expected to take so many nanoseconds.
    pub fn expect(&mut self, nanoseconds: f64) {
        if self.mode == Mode::Auto && nanoseconds >= SURELY_SLOW {
            self.raw = Some(nanoseconds);
            self.way = Way::Packed;
            self.win();
        }
    }

    /// Whether the next run is to be compressed.
    pub fn compresses(&self) -> bool {
        self.way == Way::Packed
    }

    /// For what compressing is known to be the faster way, or wanted whatever it costs.
    pub fn pays(&self) -> Pays {
        // A trial proves nothing yet, either way.
        if self.compresses() == self.on_trial {
            return Pays::Nothing;
        }
        match self.raw {
            Some(raw) if raw < SLOW => Pays::Several,
            _ => Pays::Single,
        }
    }

    /// A run was sent the way it was to be.
    pub fn sent(&mut self, run: SentRun) {
        if self.mode != Mode::Auto {
            return;
        }
        self.slice.page_bytes += run.page_bytes;
        self.slice.compressing += run.compressing;
        self.slice.elapsed += run.elapsed;
        if self.is_hopeless() {
            let compressing = per_byte(self.slice.compressing, self.slice.page_bytes);
            self.packed = Some(compressing);
            self.lose();
        } else if self.is_far_slower() {
            self.raw = Some(per_byte(self.slice.elapsed, self.slice.page_bytes));
            self.lose();
        } else if self.slice.page_bytes >= SLICE_BYTES
            && (self.slice.elapsed >= SLICE_TIME || !self.is_warm)
        {
            self.conclude();
        }
    }

    /// On trial, and compressing alone takes longer than sending the pages as they are.
    fn is_hopeless(&self) -> bool {
        let compressing = per_byte(self.slice.compressing, self.slice.page_bytes);
        self.on_trial
            && self.way == Way::Packed
            && self.slice.page_bytes >= EARLY_BYTES
            && self.raw.is_some_and(|raw| compressing >= raw)
    }

    /// On trial as they are, and a part of a slice has taken longer already than a whole one of compressed pages.
    fn is_far_slower(&self) -> bool {
        let whole = self.packed.map(|packed| packed * SLICE_BYTES as f64);
        let elapsed = self.slice.elapsed;
        self.on_trial
            && self.way == Way::Raw
            && (EARLY_BYTES..SLICE_BYTES).contains(&self.slice.page_bytes)
            && elapsed >= SLICE_TIME
            && whole.is_some_and(|whole| elapsed.as_nanos() as f64 > whole)
    }

    fn conclude(&mut self) {
        let measured = per_byte(self.slice.elapsed, self.slice.page_bytes);
        self.slice = Slice::default();
        if !self.is_warm {
            self.is_warm = true;
            return;
        }
        let estimate = match self.way {
            Way::Raw => &mut self.raw,
            Way::Packed => &mut self.packed,
        };
        // An estimate remembers a little: one slice may have been disturbed. Before a trial it is too old for that.
        let measured = match *estimate {
            Some(before) if !self.on_trial => (before + measured) / 2.0,
            _ => measured,
        };
        *estimate = Some(measured);
        match self.is_better() {
            None => self.begin_trial(),
            Some(packed) => self.judge(packed),
        }
    }

    /// Whether compressing is better, if both ways are known.
    fn is_better(&self) -> Option<bool> {
        let (raw, packed) = (self.raw?, self.packed?);
        Some(packed < raw * CLEARLY)
    }

    fn judge(&mut self, packed: bool) {
        let is_on_better_way = packed == (self.way == Way::Packed);
        match (self.on_trial, is_on_better_way) {
            (true, true) => self.win(),
            (true, false) => self.lose(),
            (false, true) => self.wait_for_trial(),
            // What is known of the other way is old, so it has to prove itself.
            (false, false) => self.begin_trial(),
        }
    }

    fn wait_for_trial(&mut self) {
        self.until_trial = self.until_trial.saturating_sub(1);
        if self.until_trial == 0 {
            self.begin_trial();
        }
    }

    fn begin_trial(&mut self) {
        self.way = self.way.other();
        self.on_trial = true;
    }

    /// The way on trial is the slower one still.
    fn lose(&mut self) {
        self.slice = Slice::default();
        self.way = self.way.other();
        self.on_trial = false;
        self.until_trial = self.pause;
        self.pause = (self.pause * 2).min(PAUSE_SLICES.1);
    }

    /// The way on trial is the faster one now.
    fn win(&mut self) {
        self.on_trial = false;
        self.pause = PAUSE_SLICES.0;
        self.until_trial = self.pause;
    }
}

fn per_byte(time: Duration, bytes: u64) -> f64 {
    time.as_nanos() as f64 / bytes.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN_BYTES: u64 = 64 << 10;

    /// A path and a processor: nanoseconds for each byte.
    #[derive(Clone, Copy)]
    struct World {
        link: f64,
        sending: f64,
        compressing: f64,
        /// Bytes that are left of one byte.
        ratio: f64,
    }

    /// About what was measured: sending costs 1.2 ns a byte, compressing 1.8 ns.
    fn world(link: f64) -> World {
        World {
            link,
            sending: 1.2,
            compressing: 1.8,
            ratio: 0.25,
        }
    }

    impl World {
        fn send(self, compression: &mut Compression) -> (bool, f64) {
            let compressed = compression.compresses();
            let (compressing, left) = match compressed {
                true => (self.compressing, self.ratio),
                false => (0.0, 1.0),
            };
            let busy = compressing + self.sending * left;
            let took = busy.max(self.link * left);
            let nanoseconds =
                |per_byte: f64| Duration::from_nanos((per_byte * RUN_BYTES as f64) as u64);
            compression.sent(SentRun {
                page_bytes: RUN_BYTES,
                compressing: nanoseconds(compressing),
                elapsed: nanoseconds(took),
            });
            (compressed, took)
        }

        /// Sends 512 MiB: the part of the runs that was compressed, and the time for a byte.
        fn run(self, compression: &mut Compression) -> (f64, f64) {
            let runs = (512 << 20) / RUN_BYTES;
            let (mut compressed, mut took) = (0, 0.0);
            for _ in 0..runs {
                let (was, time) = self.send(compression);
                compressed += u64::from(was);
                took += time;
            }
            (compressed as f64 / runs as f64, took / runs as f64)
        }
    }

    #[test]
    fn what_is_expected_of_a_slow_link_is_done_at_once() {
        // 20 Mbit/s.
        let world = world(400.0);
        let mut compression = Compression::new(Mode::Auto);
        compression.expect(300.0);
        assert_eq!(compression.pays(), Pays::Single);
        let (compressed, took) = world.run(&mut compression);
        assert!(compressed > 0.95, "{compressed}");
        let (_, before) = world.run(&mut Compression::new(Mode::Auto));
        assert!(took < before, "{took} and {before}");
    }

    #[test]
    fn a_wrong_expectation_is_corrected() {
        let world = world(0.8);
        let mut compression = Compression::new(Mode::Auto);
        compression.expect(50.0);
        let (compressed, _) = world.run(&mut compression);
        // Eight slices of 20 ms, of half a GiB.
        assert!(compressed < 0.2, "{compressed}");
        for mode in [Mode::Always, Mode::Never] {
            let mut compression = Compression::new(mode);
            let before = compression.compresses();
            compression.expect(400.0);
            assert_eq!(compression.compresses(), before);
        }
        let mut compression = Compression::new(Mode::Auto);
        compression.expect(8.0);
        assert!(!compression.compresses(), "that is found out");
    }

    #[test]
    fn a_slow_link_gets_compressed_pages() {
        // 1 Gbit/s.
        let (compressed, took) = world(8.0).run(&mut Compression::new(Mode::Auto));
        assert!(compressed > 0.9, "{compressed}");
        assert!(took < 2.0 * 1.3, "{took}");
    }

    #[test]
    fn a_fast_path_is_not_slowed_down() {
        for link in [0.5, 1.0, 1.4] {
            let world = world(link);
            let (compressed, took) = world.run(&mut Compression::new(Mode::Auto));
            assert!(compressed < 0.05, "{compressed}");
            let without = world.link.max(world.sending);
            assert!(took < without * 1.02, "{took} against {without}");
        }
    }

    #[test]
    fn a_path_that_changes_is_followed() {
        let mut compression = Compression::new(Mode::Auto);
        world(0.5).run(&mut compression);
        let (compressed, _) = world(8.0).run(&mut compression);
        assert!(compressed > 0.5, "{compressed}");
        let (compressed, _) = world(0.5).run(&mut compression);
        assert!(compressed < 0.5, "{compressed}");
    }

    #[test]
    fn single_pages_are_compressed_on_slow_links_only() {
        for (link, pays) in [
            (0.5, Pays::Nothing),
            (8.0, Pays::Several),
            (80.0, Pays::Single),
        ] {
            let mut compression = Compression::new(Mode::Auto);
            world(link).run(&mut compression);
            // It may be in the middle of a trial.
            while compression.on_trial {
                world(link).send(&mut compression);
            }
            assert_eq!(compression.pays(), pays, "{link} ns for a byte");
        }
        assert_eq!(Compression::new(Mode::Always).pays(), Pays::Single);
        assert_eq!(Compression::new(Mode::Never).pays(), Pays::Nothing);
    }

    #[test]
    fn noise_costs_next_to_nothing() {
        let world = World {
            compressing: 0.2,
            ratio: 1.0,
            ..world(2.0)
        };
        let (_, took) = world.run(&mut Compression::new(Mode::Auto));
        assert!(took < 2.0 * 1.02, "{took}");
    }

    #[test]
    fn the_operator_has_the_last_word() {
        for (mode, expected) in [(Mode::Always, 1.0), (Mode::Never, 0.0)] {
            for link in [0.5, 8.0] {
                let (compressed, _) = world(link).run(&mut Compression::new(mode));
                assert_eq!(compressed, expected);
            }
        }
    }
}
