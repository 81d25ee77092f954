//! Messages on their way: two connections for each link, reliable and in order within a stream, until they are cut.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use common::proto::control::{ToDestination, ToSource};
use common::proto::demand::DEMAND_FRAME_BYTES;

/// A pair of connections, numbered in the order they were made.
pub type LinkId = usize;

/// Simulated microseconds since the beginning.
pub type Time = u64;

/// Which connection of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Connection {
    /// Control and demand.
    Fault,
    /// Skeleton, push and credit.
    Bulk,
}

/// One direction of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Control messages to the source.
    ControlUp,
    /// Control messages to the destination.
    ControlDown,
    /// Requests and discards.
    DemandUp,
    /// Answers to them.
    DemandDown,
    /// Pushed pages.
    BulkDown,
    /// Credit for them.
    CreditUp,
}

impl Lane {
    /// All lanes.
    pub const ALL: [Lane; 6] = [
        Lane::ControlUp,
        Lane::ControlDown,
        Lane::DemandUp,
        Lane::DemandDown,
        Lane::BulkDown,
        Lane::CreditUp,
    ];

    /// The connection it belongs to.
    pub fn connection(self) -> Connection {
        match self {
            Lane::BulkDown | Lane::CreditUp => Connection::Bulk,
            _ => Connection::Fault,
        }
    }

    /// Whether it leads to the source.
    pub fn is_up(self) -> bool {
        matches!(self, Lane::ControlUp | Lane::DemandUp | Lane::CreditUp)
    }
}

/// Something on its way.
#[derive(Clone, Debug)]
pub enum Message {
    /// A control message.
    ToSource(ToSource),
    /// A control message.
    ToDestination(ToDestination),
    /// A frame of the demand stream.
    Demand([u8; DEMAND_FRAME_BYTES]),
    /// A reply frame, or a frame of pushed pages.
    Frame(Bytes),
    /// The skeleton is complete.
    SkeletonEnd,
    /// Credit so far.
    Credit(u64),
    /// The other end has heard everything and closes the connection.
    Closed,
}

/// All links there were.
#[derive(Debug, Default)]
pub struct Network {
    links: Vec<Link>,
}

#[derive(Debug, Default)]
struct Link {
    lanes: BTreeMap<Lane, VecDeque<(Time, Message)>>,
    cut: Vec<Connection>,
}

impl Network {
    /// A new link.
    pub fn open(&mut self) -> LinkId {
        self.links.push(Link::default());
        self.links.len() - 1
    }

    /// Whether a connection still carries anything.
    pub fn is_up(&self, link: LinkId, connection: Connection) -> bool {
        !self.links[link].cut.contains(&connection)
    }

    /// Puts a message on its way; returns when it arrives, or `None` when it never will.
    pub fn send(&mut self, link: LinkId, lane: Lane, message: Message, due: Time) -> Option<Time> {
        if !self.is_up(link, lane.connection()) {
            return None;
        }
        let queue = self.links[link].lanes.entry(lane).or_default();
        let due = queue.back().map_or(due, |(last, _)| due.max(*last));
        queue.push_back((due, message));
        Some(due)
    }

    /// The message that has arrived on a lane by now.
    pub fn arrived(&mut self, link: LinkId, lane: Lane, now: Time) -> Option<Message> {
        let queue = self.links[link].lanes.get_mut(&lane)?;
        let front = queue.front().is_some_and(|(due, _)| *due <= now);
        front.then(|| queue.pop_front()).flatten().map(|(_, m)| m)
    }

    /// A connection carries nothing any more; what has not arrived is lost.
    pub fn cut(&mut self, link: LinkId, connection: Connection, now: Time) {
        let link = &mut self.links[link];
        if !link.cut.contains(&connection) {
            link.cut.push(connection);
        }
        for (lane, queue) in &mut link.lanes {
            if lane.connection() == connection {
                queue.retain(|(due, _)| *due <= now);
            }
        }
    }

    /// What is on its way on a lane.
    pub fn on_the_way(&self, link: LinkId, lane: Lane) -> impl Iterator<Item = &Message> {
        let queue = self.links[link].lanes.get(&lane);
        queue.into_iter().flatten().map(|(_, message)| message)
    }
}
