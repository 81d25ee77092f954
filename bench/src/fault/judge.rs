//! The targets `bench fault` is about: each only where it was set.

use std::time::Duration;

use tests::path::{Kind, PathSpec};
use tests::touch::Pattern;

use super::report::Row;
use crate::peer::Peer;
use crate::stats::Summary;
use crate::targets::{Bound, Target};

/// From this round trip on CRIU's way to fetch one page range after the other is what bounds it.
const LONG: Duration = Duration::from_millis(10);

/// What is judged.
pub struct Judge<'a> {
    pub rows: &'a [Row],
    pub bare_p50_us: Option<Summary>,
    pub bare_bulk_mib_s: Option<Summary>,
    pub path: PathSpec,
    /// Touches per second.
    pub rate: u64,
}

impl Judge<'_> {
    /// Those that apply here and were measured.
    pub fn all(&self) -> Vec<Target> {
        let mut targets = self.beside_bulk();
        if self.path.kind() == Kind::Bare {
            targets.extend(self.of_bare_path());
        }
        if self.path.rtt >= LONG {
            targets.push(Target::ratio(
                "bulk with faults over CRIU's, long path",
                self.bulk(Peer::Ours, true),
                self.bulk(Peer::Criu, true),
                Bound::AtLeast(10.0),
            ));
        }
        // While pages come evenly, a touch at a random moment of a fixed rate finds half of them missing.
        if self.rate == 0 {
            targets.push(Target::value(
                "network faults, percent",
                self.loaded().and_then(|row| row.network_faults_percent),
                Bound::AtMost(21.0),
            ));
        }
        targets.retain(Target::is_measured);
        targets
    }

    fn beside_bulk(&self) -> Vec<Target> {
        let (idle, loaded) = (self.idle(), self.loaded());
        vec![
            Target::ratio(
                "fault p50, loaded over idle",
                loaded.and_then(|row| row.p50_us),
                idle.and_then(|row| row.p50_us),
                Bound::AtMost(1.5),
            ),
            Target::ratio(
                "fault p99, loaded over idle",
                loaded.and_then(|row| row.p99_us),
                idle.and_then(|row| row.p99_us),
                Bound::AtMost(2.0),
            ),
            Target::ratio(
                "bulk with faults over bulk without",
                self.bulk(Peer::Ours, true),
                self.bulk(Peer::Ours, false),
                Bound::AtLeast(0.8),
            ),
            Target::ratio(
                "fault p50, idle, over QUIC alone",
                idle.and_then(|row| row.p50_us),
                self.bare_p50_us,
                Bound::AtMost(1.5),
            ),
        ]
    }

    fn of_bare_path(&self) -> Vec<Target> {
        let p99 = |row: Option<&Row>| row?.p99_us;
        let still = self.bulk(Peer::Ours, false);
        vec![
            Target::value(
                "fault p99, loaded, in us",
                p99(self.loaded()),
                Bound::AtMost(512.0),
            ),
            Target::ratio(
                "fault p99, loaded, over CRIU's",
                p99(self.loaded()),
                p99(self.row(Peer::Criu, true, true)),
                Bound::AtMost(0.2),
            ),
            Target::ratio(
                "bulk over QUIC alone",
                still,
                self.bare_bulk_mib_s,
                Bound::AtLeast(0.75),
            ),
            Target::ratio(
                "bulk over CRIU's",
                still,
                self.bulk(Peer::Criu, false),
                Bound::AtLeast(1.5),
            ),
        ]
    }

    fn idle(&self) -> Option<&Row> {
        self.row(Peer::Ours, true, false)
    }

    fn loaded(&self) -> Option<&Row> {
        self.row(Peer::Ours, true, true)
    }

    fn bulk(&self, peer: Peer, touches: bool) -> Option<Summary> {
        self.row(peer, touches, true)?.bulk_mib_s
    }

    fn row(&self, peer: Peer, touches: bool, push: bool) -> Option<&Row> {
        self.rows.iter().find(|row| {
            let case = row.case;
            case.peer == peer && case.push == push && (case.pattern != Pattern::Still) == touches
        })
    }
}
