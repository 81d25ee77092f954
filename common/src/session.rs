//! The states of one migration and the only transitions between them.
//!
//! Both programs hold a [`Session`] and feed it what happened; an event that the table does not list for the
//! present state is an error that names both, never a silent change.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a migration stands. The first nine follow each other; the last four are where it goes when something fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The ends authenticate each other and agree on a protocol version.
    Hello,
    /// Each end checks that the migration can work; the workload still runs.
    Advise,
    /// The workload is frozen and its skeleton dumped.
    Freeze,
    /// The skeleton moves to the destination.
    Skeleton,
    /// The destination restores the skeleton; faults of the restore itself are served.
    Listen,
    /// The destination asked to let the workload run: the point of no return.
    Cutover,
    /// The workload runs on the destination; its memory follows.
    Postcopy,
    /// Every page is accounted for on the destination.
    Drained,
    /// Both ends agree that everything moved; the frozen original is released.
    Complete,
    /// Failed before the point of no return: the workload runs on the source as before.
    Aborted,
    /// The link was lost after the point of no return: threads that touch missing pages wait.
    Paused,
    /// The ends have met again and settle what is still owed.
    Recover,
    /// Given up after the point of no return, loudly.
    Lost,
}

/// What moves a migration on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The version is agreed.
    Welcomed,
    /// Both ends passed their checks.
    Ready,
    /// The workload is frozen and the skeleton complete.
    Dumped,
    /// The destination holds the whole skeleton.
    Staged,
    /// The destination's tasks are rebuilt and wait; it asks for the point of no return.
    CutoverAsked,
    /// The source has given the workload away.
    CutoverGranted,
    /// No page is owed any more.
    AllPresent,
    /// Counts and digests of both ends agree.
    Agreed,
    /// Something failed while the workload could still run on the source.
    Failed,
    /// The destination says for certain that its copy is dead and never ran.
    CopyDead,
    /// The connection was lost.
    LinkLost,
    /// A new connection of the same session was authenticated.
    Reconnected,
    /// The present map was exchanged.
    Settled,
    /// The operator's limit for recovery has passed.
    GaveUp,
}

/// One row of the table.
type Transition = (State, Event, State);

/// Every transition there is, in the order a migration goes through them.
pub const TRANSITIONS: &[Transition] = &[
    (State::Hello, Event::Welcomed, State::Advise),
    (State::Advise, Event::Ready, State::Freeze),
    (State::Freeze, Event::Dumped, State::Skeleton),
    (State::Skeleton, Event::Staged, State::Listen),
    (State::Listen, Event::CutoverAsked, State::Cutover),
    (State::Cutover, Event::CutoverGranted, State::Postcopy),
    (State::Postcopy, Event::AllPresent, State::Drained),
    (State::Drained, Event::Agreed, State::Complete),
    (State::Hello, Event::Failed, State::Aborted),
    (State::Advise, Event::Failed, State::Aborted),
    (State::Freeze, Event::Failed, State::Aborted),
    (State::Skeleton, Event::Failed, State::Aborted),
    (State::Listen, Event::Failed, State::Aborted),
    (State::Cutover, Event::CopyDead, State::Aborted),
    (State::Postcopy, Event::CopyDead, State::Aborted),
    (State::Recover, Event::CopyDead, State::Aborted),
    (State::Cutover, Event::LinkLost, State::Paused),
    (State::Postcopy, Event::LinkLost, State::Paused),
    (State::Drained, Event::LinkLost, State::Paused),
    (State::Recover, Event::LinkLost, State::Paused),
    (State::Paused, Event::Reconnected, State::Recover),
    (State::Recover, Event::Settled, State::Postcopy),
    (State::Paused, Event::GaveUp, State::Lost),
];

/// An event that the present state does not allow.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{event:?} is not allowed in state {state:?}")]
pub struct InvalidTransition {
    /// The state it happened in.
    pub state: State,
    /// What happened.
    pub event: Event,
}

/// One end's view of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    state: State,
}

impl Default for Session {
    fn default() -> Self {
        Session {
            state: State::Hello,
        }
    }
}

impl Session {
    /// A session that a restarted program goes on with: its link is lost.
    pub fn orphaned() -> Self {
        Session {
            state: State::Paused,
        }
    }

    /// Where the migration stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Applies an event.
    pub fn apply(&mut self, event: Event) -> Result<State, InvalidTransition> {
        let state = self.state;
        let next = TRANSITIONS
            .iter()
            .find(|(from, on, _)| (*from, *on) == (state, event))
            .ok_or(InvalidTransition { state, event })?;
        self.state = next.2;
        Ok(self.state)
    }
}

impl State {
    /// Whether the source may still let the workload run again by itself.
    pub fn source_may_thaw(self) -> bool {
        matches!(
            self,
            State::Hello
                | State::Advise
                | State::Freeze
                | State::Skeleton
                | State::Listen
                | State::Aborted
        )
    }

    /// The state's name as logs, records and error messages have it.
    pub fn name(self) -> &'static str {
        match self {
            State::Hello => "hello",
            State::Advise => "advise",
            State::Freeze => "freeze",
            State::Skeleton => "skeleton",
            State::Listen => "listen",
            State::Cutover => "cutover",
            State::Postcopy => "postcopy",
            State::Drained => "drained",
            State::Complete => "complete",
            State::Aborted => "aborted",
            State::Paused => "paused",
            State::Recover => "recover",
            State::Lost => "lost",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The table as a graph in the `dot` language; `docs/session.md` holds a copy that a test compares.
pub fn to_dot() -> String {
    let mut dot = String::from("digraph session {\n");
    for (from, event, to) in TRANSITIONS {
        dot += &format!("  {from} -> {to} [label=\"{event:?}\"];\n");
    }
    dot + "}\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_graph_is_the_table() {
        let document = include_str!("../../docs/session.md");
        assert!(
            document.contains(&to_dot()),
            "docs/session.md must contain this graph:\n{}",
            to_dot()
        );
    }

    #[test]
    fn each_pair_of_state_and_event_leads_to_one_state() {
        for (index, (from, event, _)) in TRANSITIONS.iter().enumerate() {
            let again = TRANSITIONS[index + 1..]
                .iter()
                .any(|(f, e, _)| (f, e) == (from, event));
            assert!(!again, "{from} has two rows for {event:?}");
        }
    }

    #[test]
    fn after_the_point_of_no_return_only_a_dead_copy_leads_back() {
        for (from, event, to) in TRANSITIONS {
            if !from.source_may_thaw() && to.source_may_thaw() {
                assert_eq!(*event, Event::CopyDead, "{from} -> {to}");
            }
        }
    }

    #[test]
    fn a_lost_link_at_the_cutover_pauses_and_never_aborts() {
        let mut session = Session {
            state: State::Cutover,
        };
        assert_eq!(
            session.apply(Event::Failed),
            Err(InvalidTransition {
                state: State::Cutover,
                event: Event::Failed
            })
        );
        assert_eq!(session.apply(Event::LinkLost), Ok(State::Paused));
    }

    #[test]
    fn the_straight_way_reaches_complete() {
        let mut session = Session::default();
        for event in [
            Event::Welcomed,
            Event::Ready,
            Event::Dumped,
            Event::Staged,
            Event::CutoverAsked,
            Event::CutoverGranted,
            Event::AllPresent,
            Event::Agreed,
        ] {
            session.apply(event).expect("the straight way");
        }
        assert_eq!(session.state(), State::Complete);
    }
}
