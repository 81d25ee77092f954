//! Who knocks too often: a host whose handshakes fail again and again is heard a few times a second. Pure.
//!
//! A handshake costs the server about a millisecond of a real-time thread, and the stranger next to nothing. Who sends
//! packets in another's name must not keep that one out: failures of hosts that have not shown that they receive what is
//! sent to them (RFC 9000, section 8.1.2) are counted apart, and lead to nothing but being asked to show it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Failures a host may have at once. An operator's mistakes with certificates stay far below.
const BURST: u32 = 64;
/// One more is forgiven each time this has passed: 20 per second are 2 % of a processor.
const FORGIVEN_AFTER: Duration = Duration::from_millis(50);
/// Hosts remembered.
const MAX_HOSTS: usize = 1024;

/// Who knocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Knocker {
    /// The host that the packets name.
    pub(super) host: IpAddr,
    /// It has shown that it receives what is sent there.
    pub(super) is_there: bool,
}

/// What is done about a knock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The handshake goes on.
    Hear,
    /// It is to show that it is there, at no cost to us.
    Ask,
    /// Nothing. It knocks again by itself, until it is heard or gives up.
    Ignore,
}

/// What hosts have on their accounts.
#[derive(Debug, Default)]
pub(super) struct Knocks {
    hosts: HashMap<Knocker, Account>,
}

/// Failures up to a moment.
#[derive(Debug, Clone, Copy)]
struct Account {
    failures: u32,
    at: Instant,
}

impl Account {
    fn at(self, now: Instant) -> Account {
        let forgiven =
            now.saturating_duration_since(self.at).as_millis() / FORGIVEN_AFTER.as_millis();
        let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
        Account {
            failures: self.failures.saturating_sub(forgiven),
            at: self.at + FORGIVEN_AFTER.saturating_mul(forgiven),
        }
    }
}

impl Knocks {
    /// What is to be done about a knock now.
    pub(super) fn answer(&self, who: Knocker, now: Instant) -> Answer {
        let account = self.hosts.get(&who.network());
        match account.is_none_or(|account| account.at(now).failures < BURST) {
            true => Answer::Hear,
            false if who.is_there => Answer::Ignore,
            false => Answer::Ask,
        }
    }

    /// A handshake failed.
    pub(super) fn failed(&mut self, who: Knocker, now: Instant) {
        if self.hosts.len() >= MAX_HOSTS {
            self.hosts.retain(|_, account| account.at(now).failures > 0);
        }
        if self.hosts.len() >= MAX_HOSTS {
            // So many are at it together that nothing is gained by telling them apart.
            self.hosts.clear();
        }
        let new = Account {
            failures: 0,
            at: now,
        };
        let account = self.hosts.entry(who.network()).or_insert(new);
        let current = account.at(now);
        *account = Account {
            failures: (current.failures + 1).min(BURST),
            at: match current.failures {
                0 => now,
                _ => current.at,
            },
        };
    }
}

impl Knocker {
    /// One that has an IPv6 network has all its addresses: the upper 64 bits count.
    fn network(self) -> Knocker {
        let host = match self.host {
            IpAddr::V4(_) => self.host,
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
        };
        Knocker { host, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(number: u32) -> Knocker {
        at(std::net::Ipv4Addr::from_bits(number).into())
    }

    fn at(host: IpAddr) -> Knocker {
        Knocker {
            host,
            is_there: true,
        }
    }

    fn heard_in(knocks: &mut Knocks, began: Instant, time: Duration) -> u32 {
        let mut heard = 0;
        let mut now = began;
        while now < began + time {
            if knocks.answer(host(1), now) == Answer::Hear {
                heard += 1;
                knocks.failed(host(1), now);
            }
            now += Duration::from_millis(1);
        }
        heard
    }

    #[test]
    fn who_fails_all_the_time_is_heard_now_and_then() {
        let mut knocks = Knocks::default();
        let began = Instant::now();
        let heard = heard_in(&mut knocks, began, Duration::from_secs(10));
        assert!((BURST..=BURST + 201).contains(&heard), "{heard}");
        assert!(heard > BURST + 190, "{heard}");
        let later = began + Duration::from_secs(20);
        let again = heard_in(&mut knocks, later, Duration::from_millis(50));
        assert_eq!(again, 50, "all is forgiven");
    }

    #[test]
    fn nobody_pays_for_others() {
        let mut knocks = Knocks::default();
        let now = Instant::now();
        for _ in 0..10 * BURST {
            knocks.failed(host(1), now);
        }
        assert_eq!(knocks.answer(host(1), now), Answer::Ignore);
        assert_eq!(knocks.answer(host(2), now), Answer::Hear);
    }

    #[test]
    fn packets_in_anothers_name_keep_nobody_out() {
        let mut knocks = Knocks::default();
        let now = Instant::now();
        let invented = Knocker {
            is_there: false,
            ..host(1)
        };
        for _ in 0..10 * BURST {
            knocks.failed(invented, now);
        }
        assert_eq!(knocks.answer(invented, now), Answer::Ask);
        assert_eq!(knocks.answer(host(1), now), Answer::Hear);
    }

    #[test]
    fn a_network_is_one_host() {
        let mut knocks = Knocks::default();
        let now = Instant::now();
        for last in 0..BURST as u16 {
            let address = Ipv6Addr::new(0xfd77, 0, 0, 1, 0, 0, 0, last);
            knocks.failed(at(address.into()), now);
        }
        let another = Ipv6Addr::new(0xfd77, 0, 0, 1, 9, 9, 9, 9);
        assert_eq!(knocks.answer(at(another.into()), now), Answer::Ignore);
        let elsewhere = Ipv6Addr::new(0xfd77, 0, 0, 2, 0, 0, 0, 1);
        assert_eq!(knocks.answer(at(elsewhere.into()), now), Answer::Hear);
    }

    #[test]
    fn only_so_many_are_remembered() {
        let mut knocks = Knocks::default();
        let now = Instant::now();
        for number in 0..10 * MAX_HOSTS as u32 {
            knocks.failed(host(number), now);
            assert!(knocks.hosts.len() <= MAX_HOSTS);
        }
    }
}
