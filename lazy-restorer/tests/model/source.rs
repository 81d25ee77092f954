//! The other end: what the source sends, and the wire that delivers it in any order.

use std::collections::{HashSet, VecDeque};

use common::page::{PageIndex, PageRange};
use common::proto::demand::DemandFrame;

use model_kernel::pages_of;

/// Something on its way to the destination.
#[derive(Clone, Copy, Debug)]
pub enum Message {
    Data(PageRange),
    Withheld(PageRange),
}

/// The frozen process and both directions of the wire.
#[derive(Debug, Default)]
pub struct Source {
    lazy: Vec<u64>,
    sent: HashSet<u64>,
    withheld: HashSet<u64>,
    /// From the destination, in order.
    pub demands: VecDeque<DemandFrame>,
    /// To the destination, over two connections: in no order.
    pub wire: Vec<Message>,
}

impl Source {
    pub fn new(lazy: &[PageRange]) -> Self {
        Source {
            lazy: lazy.iter().copied().flat_map(pages_of).collect(),
            ..Source::default()
        }
    }

    /// Handles the oldest frame. False when there is none.
    pub fn serve(&mut self) -> bool {
        match self.demands.pop_front() {
            None => return false,
            Some(DemandFrame::Request(_, pages)) => self.send(pages),
            Some(DemandFrame::Discard(_, pages)) => {
                for page in pages_of(pages) {
                    assert!(!self.withheld.contains(&page), "{page} was discarded twice");
                    if !self.sent.contains(&page) {
                        self.withhold(page);
                    }
                }
            }
        }
        true
    }

    fn send(&mut self, pages: PageRange) {
        for page in pages_of(pages) {
            assert!(self.lazy.contains(&page), "{page} is not lazy");
            assert!(
                !self.withheld.contains(&page),
                "{page} is asked for after all"
            );
            self.sent.insert(page);
        }
        self.wire.push(Message::Data(pages));
    }

    fn withhold(&mut self, page: u64) {
        self.withheld.insert(page);
        if let Some(Message::Withheld(last)) = self.wire.last_mut()
            && last.end().0 == page
        {
            last.count += 1;
            return;
        }
        let pages = PageRange::new(PageIndex(page), 1);
        self.wire.push(Message::Withheld(pages));
    }

    /// Pushes a run of pages never sent before, or of any that may be sent. False when there is none.
    pub fn push(&mut self, at: usize, count: u64, again: bool) -> bool {
        let may =
            |page: &u64| !self.withheld.contains(page) && (again || !self.sent.contains(page));
        let choice: Vec<u64> = self.lazy.iter().copied().filter(may).collect();
        if choice.is_empty() {
            return false;
        }
        let first = choice[at % choice.len()];
        let fits = (first..first + count).take_while(|page| choice.contains(page));
        let pages = PageRange::new(PageIndex(first), fits.count() as u64);
        self.send(pages);
        true
    }
}
