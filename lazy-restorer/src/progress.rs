//! Shows on a terminal how far the memory has come. Elsewhere there is only the record at the end.

use std::io::{IsTerminal, stderr};

use common::page::pages_to_bytes;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::memory::Memory;

/// A bar of resident pages, with the faults beside it.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts a bar when standard error is a terminal.
    pub fn start(memory: &Memory) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(memory.counts().lazy);
            let style = ProgressStyle::with_template("{wide_bar} {percent}% {msg} {eta}");
            // A template that does not parse leaves the default style, which shows the same.
            style.map_or_else(|_| bar.clone(), |style| bar.clone().with_style(style))
        });
        Progress { bar }
    }

    /// Shows what has come by now.
    pub fn show(&self, memory: &Memory) {
        let Some(bar) = &self.bar else { return };
        let counts = memory.counts();
        let here = counts.lazy - counts.owed;
        let blocktime = memory.blocktime();
        bar.set_position(here);
        bar.set_message(format!(
            "{} of {}, {} faults, p99 {} us",
            BinaryBytes(pages_to_bytes(here)),
            BinaryBytes(pages_to_bytes(counts.lazy)),
            blocktime.count(),
            blocktime.summary().p99,
        ));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use common::images::ImagePid;
    use common::lazy_map::LazyMap;
    use common::page::{PageIndex, PageRange};

    use super::*;
    use crate::memory::ProcessImage;

    #[test]
    fn a_bar_shows_what_is_here() {
        let lazy = LazyMap::new([PageRange::new(PageIndex(1), 512)]).expect("in order");
        let image = ProcessImage {
            pid: ImagePid(1),
            lazy,
            vmas: Vec::new(),
        };
        let (memory, _orders) = Memory::new(vec![image]);
        let bar = ProgressBar::hidden();
        let progress = Progress {
            bar: Some(bar.clone()),
        };
        progress.show(&memory);
        assert_eq!(bar.position(), 0);
        assert!(
            bar.message().starts_with("0 B of 2.00 MiB, 0 faults"),
            "{}",
            bar.message()
        );
    }
}
