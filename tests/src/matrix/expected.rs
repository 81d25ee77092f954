//! What each cell of the matrix must end with.

use super::{Cell, Harm, Host, Moment, Verdict};

/// The only right end of `cell`.
pub fn verdict(cell: Cell) -> Verdict {
    use Moment as M;
    let Cell { moment, harm } = cell;
    let given_away = !matches!(
        moment,
        M::Hello | M::Advise | M::Freeze | M::Skeleton | M::Listen
    );
    match (harm, moment) {
        (Harm::DumpKilled, M::Hello | M::Advise) => Verdict::Absent("not started yet"),
        (Harm::DumpKilled, M::Unheard) => Verdict::Absent("has ended"),
        (Harm::RestoreKilled, M::Hello | M::Advise | M::Freeze) => {
            Verdict::Absent("not started yet")
        }
        // The copy never ran and is dead for certain: the source is told so, and thaws.
        (Harm::RestoreKilled, M::Cutover) => Verdict::Runs(Host::Source),
        (Harm::RestorerKilled, M::Cutover) => Verdict::Resumed(Host::Source),
        (Harm::RestoreKilled, _) if given_away => Verdict::Absent("has ended"),
        (Harm::RestorerKilled, M::Complete) => Verdict::Absent("has ended"),
        // It only waits, and leaves nothing that could be resumed.
        (Harm::ServerKilled, M::Unheard) => Verdict::Runs(Host::Destination),
        (Harm::RestorerKilled | Harm::ServerKilled, _) if given_away => {
            Verdict::Resumed(Host::Destination)
        }
        _ if given_away => Verdict::Runs(Host::Destination),
        _ => Verdict::Runs(Host::Source),
    }
}
