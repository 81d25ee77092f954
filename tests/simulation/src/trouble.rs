//! What goes wrong in a run, and what of it really did.

use std::collections::VecDeque;

use common::proto::control::{ToDestination, ToSource};

use crate::network::Message;

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Trouble {
    /// Connections cut at random times.
    pub cuts: u64,
    /// Programs killed at random times, and succeeded.
    pub kills: u64,
    /// Messages at which something happens: to the first of its kind, once what stands before it has happened.
    pub at_messages: VecDeque<(Kind, Fate)>,
    /// When the rebuilt copy dies by itself.
    pub copy_dies: Option<CopyDies>,
}

/// When a rebuilt copy dies by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDies {
    /// Before the cutover is asked for.
    Armed,
    /// At the gate, when it has been granted: CRIU was killed.
    AtTheGate,
}

/// A step of the session, as a message announces it.
pub type Kind = &'static str;

/// What happens at a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is lost, and the link with it.
    Lost,
    /// It arrives, and whatever would answer it is lost.
    Delivered,
    /// The program that said it is killed a moment later.
    SenderDies,
    /// The program that it is for is killed as it arrives.
    ReceiverDies,
}

impl Fate {
    /// All of them.
    pub const ALL: [Fate; 4] = [
        Fate::Lost,
        Fate::Delivered,
        Fate::SenderDies,
        Fate::ReceiverDies,
    ];
}

/// What really happened, so that a run that was to be disturbed and was not is noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// Messages of [`Trouble::at_messages`] that were met.
    pub messages: u64,
    /// Connections that carried something, and were cut.
    pub cuts: u64,
    /// Running programs that were killed: source, destination.
    pub kills: [u64; 2],
    /// Programs that took a session over: source, destination.
    pub successions: [u64; 2],
    /// Links that replaced a lost one, with everything settled.
    pub recoveries: u64,
    /// Destinations that missed the last word, and asked for it.
    pub told_again: u64,
}

impl Record {
    /// Adds another run's.
    pub fn add(&mut self, other: &Record) {
        self.messages += other.messages;
        self.cuts += other.cuts;
        self.recoveries += other.recoveries;
        self.told_again += other.told_again;
        for end in 0..2 {
            self.kills[end] += other.kills[end];
            self.successions[end] += other.successions[end];
        }
    }
}

/// The steps of a session, by the names of the messages that announce them, in their order. `ReadyWithImages` is not among
/// them: it is said only where somebody else runs CRIU, which is not simulated (`tests/tests/lost_messages.rs` has it).
pub const KINDS: [Kind; 21] = [
    "Hello",
    "Welcome",
    "Advise",
    "AdviseMore",
    "Ready",
    "Freezing",
    "SkeletonEnd",
    "Frozen",
    "Staged",
    "CutoverRequest",
    "CutoverGranted",
    "Resumed",
    "Drained",
    "Huge",
    "Complete",
    "Resume",
    "WelcomeBack",
    "Present",
    "PresentEnd",
    "Withheld",
    "Abort",
];

/// Whether a message is only said over a link that replaces a lost one.
pub fn is_of_recovery(kind: Kind) -> bool {
    matches!(
        kind,
        "Resume" | "WelcomeBack" | "Present" | "PresentEnd" | "Withheld"
    )
}

/// The step a message announces.
pub fn name(message: &Message) -> Option<Kind> {
    Some(match message {
        Message::ToSource(ToSource::Hello(_)) => "Hello",
        Message::ToDestination(ToDestination::Welcome(_)) => "Welcome",
        Message::ToDestination(ToDestination::Advise(_)) => "Advise",
        Message::ToDestination(ToDestination::AdviseMore(_)) => "AdviseMore",
        Message::ToSource(ToSource::Ready) => "Ready",
        Message::ToDestination(ToDestination::Freezing) => "Freezing",
        Message::SkeletonEnd => "SkeletonEnd",
        Message::ToDestination(ToDestination::Frozen) => "Frozen",
        Message::ToSource(ToSource::Staged) => "Staged",
        Message::ToSource(ToSource::CutoverRequest) => "CutoverRequest",
        Message::ToDestination(ToDestination::CutoverGranted) => "CutoverGranted",
        Message::ToSource(ToSource::Resumed) => "Resumed",
        Message::ToSource(ToSource::Drained(_)) => "Drained",
        Message::ToDestination(ToDestination::Huge(_)) => "Huge",
        Message::ToDestination(ToDestination::Complete) => "Complete",
        Message::ToSource(ToSource::Resume(_)) => "Resume",
        Message::ToDestination(ToDestination::WelcomeBack { .. }) => "WelcomeBack",
        Message::ToSource(ToSource::Present(_)) => "Present",
        Message::ToSource(ToSource::Withheld(_)) => "Withheld",
        Message::ToSource(ToSource::PresentEnd) => "PresentEnd",
        Message::ToSource(ToSource::Abort(_)) => "Abort",
        _ => return None,
    })
}
