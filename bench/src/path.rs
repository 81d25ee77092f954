//! `bench path`: lays paths and shows what the probes say of them.

use anyhow::Result;
use tests::path::{Path, PathSpec, probe};
use tests::rig::Rig;

use crate::table::Table;

/// Checks every path of `specs` and prints what was measured.
pub fn run(specs: &[PathSpec]) -> Result<()> {
    let mut table = Table::default();
    table.row([
        "path",
        "round trip p50",
        "p99",
        "loss",
        "UDP",
        "one TCP connection",
    ]);
    for spec in specs {
        let rig = Rig::new()?;
        let path = Path::lay(&rig, *spec)?;
        let measured = match probe::check(&rig, spec) {
            Ok(measured) => measured,
            Err(error) => {
                table.row([&spec.to_string(), &format!("NOT BELIEVED: {error:#}")]);
                continue;
            }
        };
        table.row([
            &path.spec.to_string(),
            &format!("{} us", measured.rtt_us),
            &format!("{} us", measured.rtt_p99_us),
            &format!("{:.3} %", measured.loss * 100.0),
            &measured
                .udp_mbit_s
                .map_or("-".to_owned(), |rate| format!("{rate:.0} Mbit/s")),
            &format!("{:.0} Mbit/s", measured.tcp_mbit_s),
        ]);
        if !measured.rate_was_reached(spec) {
            eprintln!("{spec}: this machine cannot send as much as the path would carry");
        }
        report_lateness(&path);
    }
    print!("{}", table.render());
    Ok(())
}

fn report_lateness(path: &Path) {
    use std::sync::atomic::Ordering::Relaxed;
    let Some(counters) = path.emulated() else {
        return;
    };
    for (name, traffic) in [("forth", &counters.forth), ("back", &counters.back)] {
        eprintln!(
            "{}, {name}: {} packets, {} lost, {} overflowed, {} late, the latest by {} us",
            path.spec,
            traffic.packets.load(Relaxed),
            traffic.lost.load(Relaxed),
            traffic.overflowed.load(Relaxed),
            traffic.late.load(Relaxed),
            traffic.latest_ns.load(Relaxed) / 1000
        );
    }
}
