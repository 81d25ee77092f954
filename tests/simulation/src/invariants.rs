//! The five invariants of a migration, after every step and at its end.
//!
//! The third, that a page is the frozen one or what the workload wrote since, is checked where pages are put in place
//! ([`crate::uffd`]); the model kernel knows what each must be.

use common::page::PageRange;
use common::proto::pages::{DATA_HEADER_BYTES, DemandReply};
use common::session::State;
use page_server::pending::{PageState, Run};

use crate::destination::{Copy, Destination};
use crate::network::{Lane, LinkId, Message, Network};
use crate::source::{Original, Outcome, Source};
use crate::uffd::lock;

/// Both ends and what is between them.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// One end.
    pub source: &'a Source,
    /// The other.
    pub destination: &'a Destination,
    /// What is on its way.
    pub network: &'a Network,
}

impl Whole<'_> {
    /// What holds at any time.
    pub fn check(self) {
        self.at_most_one_runs();
        self.thaws_only_what_never_ran();
        self.completion_is_agreed();
        self.each_page_is_in_one_state();
    }

    fn at_most_one_runs(self) {
        let both =
            self.source.original == Original::Running && self.destination.copy == Copy::Running;
        assert!(!both, "the workload runs on both hosts");
    }

    fn thaws_only_what_never_ran(self) {
        let state = self.source.session.state();
        let thawed = self.source.original == Original::Running;
        assert!(
            !thawed || state.source_may_thaw(),
            "the original runs in state {state}"
        );
    }

    fn completion_is_agreed(self) {
        if self.source.original == Original::Released {
            assert_eq!(self.source.outcome, Some(Outcome::Complete));
            assert_eq!(self.destination.memory.counts().owed, 0);
            assert_eq!(self.destination.copy, Copy::Running);
        }
        if self.destination.outcome == Some(Outcome::Complete) {
            assert!(self.source.agreed, "complete, and the source does not know");
        }
        if self.source.agreed {
            assert_ne!(self.source.original, Original::Running, "a copy is whole");
        }
    }

    /// Owed, in flight, present or removed: what the two ends and the wire say of each page fits together.
    fn each_page_is_in_one_state(self) {
        let (Some(book), Some(link)) = (&self.source.book, self.settled_link()) else {
            return;
        };
        for (pid, map) in self.destination.memory.present_map() {
            let lazy = self.source.lazy(pid);
            for slot in 0..lazy.slots() {
                let page = lazy.page(slot);
                let received = map.received[slot / 64] >> (slot % 64) & 1 == 1;
                let on_the_way = self.is_on_the_way(link, |its_pid, pages| {
                    its_pid == pid && pages.contains(page)
                });
                let is_read = |run: Run| run.pid == pid && run.pages.contains(page);
                let on_the_way = on_the_way || self.source.reading().is_some_and(is_read);
                match book.state_of(pid, page) {
                    PageState::Owed => assert!(!received && !on_the_way, "{page:?} is owed twice"),
                    PageState::Sent => assert!(received || on_the_way, "{page:?} of {pid} is lost"),
                    PageState::Withheld => assert!(!received, "{page:?} came though withheld"),
                }
            }
        }
    }

    /// The link both ends use, when it is whole and nothing is being settled.
    fn settled_link(self) -> Option<LinkId> {
        let link = self.source.link?;
        // One that gave up reads nothing any more.
        let takes = matches!(
            self.destination.outcome,
            None | Some(Outcome::Complete | Outcome::Unacknowledged)
        );
        let settled = |state| {
            matches!(
                state,
                State::Skeleton | State::Listen | State::Cutover | State::Postcopy | State::Drained
            )
        };
        let same = self.destination.link == Some(link) && self.destination.pages_from == Some(link);
        let whole = Lane::ALL
            .iter()
            .all(|lane| self.network.is_up(link, lane.connection()));
        let states = settled(self.source.session.state())
            && (settled(self.destination.session.state())
                || self.destination.session.state() == State::Freeze);
        (takes && same && whole && states).then_some(link)
    }

    fn is_on_the_way(
        self,
        link: LinkId,
        is: impl Fn(common::images::ImagePid, PageRange) -> bool,
    ) -> bool {
        [Lane::BulkDown, Lane::DemandDown].into_iter().any(|lane| {
            self.network.on_the_way(link, lane).any(|message| {
                let Message::Frame(frame) = message else {
                    return false;
                };
                let header = frame[..DATA_HEADER_BYTES].try_into().expect("a header");
                match DemandReply::decode(header) {
                    Ok(DemandReply::Data(header)) => is(header.pid, header.pages),
                    _ => false,
                }
            })
        })
    }

    /// What holds when nothing happens any more.
    pub fn check_end(self) {
        let runs_here = self.source.original == Original::Running;
        let runs_there = self.destination.copy == Copy::Running;
        // The copy is dead and the source could not be told: the original waits for the operator.
        let waits = self.source.session.state() == State::Paused
            && self.source.original == Original::Frozen
            && self.destination.outcome == Some(Outcome::Untold);
        assert!(
            runs_here || runs_there || waits,
            "the workload runs nowhere: source {}, destination {}",
            self.source.session.state(),
            self.destination.session.state()
        );
        assert!(
            self.destination.outcome.is_some(),
            "the destination hangs: source {} ({:?}), destination {}, {:?}",
            self.source.session.state(),
            self.source.outcome,
            self.destination.session.state(),
            self.destination.memory.counts(),
        );
        if runs_there {
            for (pid, machine) in self.destination.machines() {
                for (index, process) in lock(machine).kernel.processes.iter().enumerate() {
                    let missing = process.missing().count();
                    assert_eq!(missing, 0, "pages of process {index} of {pid} never came");
                }
            }
        }
    }
}
