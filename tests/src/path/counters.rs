//! What a device of a host has sent and received, from `/proc/net/dev` as that host sees it.

use std::fs;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::namespace;

use super::DEVICE;

/// Bytes both ways, as the source's end of the path counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// From the destination.
    pub received: u64,
    /// To the destination.
    pub sent: u64,
}

impl Bytes {
    /// What was added since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            received: self.received - before.received,
            sent: self.sent - before.sent,
        }
    }
}

/// Reads the counters of the path. The thread that makes it moves into the host's network namespace.
#[derive(Debug)]
pub struct DeviceCounters(());

impl DeviceCounters {
    /// Moves the calling thread to the host whose network namespace is `namespace`.
    pub fn enter(namespace: &str) -> Result<Self> {
        namespace::enter(namespace)?;
        Ok(Self(()))
    }

    /// The counters now.
    pub fn read(&self) -> Result<Bytes> {
        let text = fs::read_to_string("/proc/thread-self/net/dev").context("no device counters")?;
        parse(&text).with_context(|| format!("no counters of {DEVICE}"))
    }
}

fn parse(text: &str) -> Option<Bytes> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(DEVICE)?.strip_prefix(':'))?;
    let mut fields = line.split_whitespace().map(str::parse);
    Some(Bytes {
        received: fields.next()?.ok()?,
        sent: fields.nth(7)?.ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_is_the_first_field_and_sent_the_ninth() {
        let text = "Inter-|   Receive\n path0: 10 1 0 0 0 0 0 0 90 2 0 0 0 0 0 0\n";
        let bytes = Bytes {
            received: 10,
            sent: 90,
        };
        assert_eq!(parse(text), Some(bytes));
    }
}
