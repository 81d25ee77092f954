//! A migration that is to fail: how both sides end, what they say, and that the workload goes on where it was.

use anyhow::{Context, Result, ensure};

use crate::beating_redis::BeatingRedis;
use crate::exit_code::{ABORTED_BY_PEER, RESTORE};
use crate::leftovers::Snapshot;
use crate::pair::{PairPlan, Side};
use crate::redis_client::ClientPlan;
use crate::rig::Rig;

/// A workload under watch that must not be harmed by what is done next.
#[derive(Debug)]
pub struct Bystander {
    /// The workload.
    pub redis: BeatingRedis,
    before: Snapshot,
}

impl Bystander {
    /// Starts redis with a heartbeat and a client on the source.
    pub fn start(rig: &Rig) -> Result<Self> {
        let redis = BeatingRedis::start(
            rig,
            ClientPlan {
                mib: 16,
                seed: 1,
                rate: 1000,
            },
        )?;
        Ok(Self {
            redis,
            before: Snapshot::take(rig)?,
        })
    }

    /// Takes what is there now as the state to come back to.
    pub fn look_again(self, rig: &Rig) -> Result<Self> {
        Ok(Self {
            before: Snapshot::take(rig)?,
            ..self
        })
    }

    /// The workload runs on the source as before, its connection too, and nothing else is left on either host.
    pub fn assert_unharmed(self, rig: &Rig) -> Result<()> {
        self.redis
            .assert_alive()
            .context("the workload was harmed")?;
        self.before
            .assert_restored(rig)
            .context("something is left of the failed migration")?;
        self.redis
            .client
            .end()
            .context("the client noticed the failed migration")?;
        Ok(())
    }

    /// After a failure the same workload can be moved by a second try.
    pub fn assert_movable(self, rig: &Rig, plan: &PairPlan) -> Result<()> {
        self.redis
            .assert_alive()
            .context("the workload was harmed")?;
        self.before
            .assert_restored(rig)
            .context("something is left of the failed migration")?;
        plan.migrate(rig, self.redis.pid())
            .context("the second try failed")?;
        self.redis
            .assert_alive()
            .context("the workload was harmed by the second try")?;
        self.redis.client.end().context("the client noticed")?;
        Ok(())
    }
}

/// Waits for the end of `side`: its exit code must be `code`, and its one error line hold all of `words`.
pub fn expect_failure(side: &mut Side, code: i32, words: &[&str]) -> Result<()> {
    let status = side.end()?;
    let stderr = side.process.stderr();
    ensure!(
        status.code() == Some(code),
        "ended with {status} instead of exit code {code}: {stderr}"
    );
    let line = side.error_line()?;
    for word in words {
        ensure!(
            line.to_lowercase().contains(&word.to_lowercase()),
            "{word:?} is missing in: {line}"
        );
    }
    Ok(())
}

/// The destination says that it cannot work, both ends' operators read why in `words`, and nothing was frozen for it.
pub fn expect_refused_in_advise(
    server: &mut Side,
    restorer: &mut Side,
    words: &[&str],
) -> Result<()> {
    let words = [&["phase advise"], words].concat();
    expect_failure(restorer, RESTORE, &words)?;
    expect_failure(server, ABORTED_BY_PEER, &words)?;
    assert_never_frozen(server)
}

/// The source has not even begun to freeze.
pub fn assert_never_frozen(server: &Side) -> Result<()> {
    let record = server.record()?;
    let is_early = |phase: &crate::record::Phase| ["hello", "advise"].contains(&&*phase.name);
    ensure!(
        record.frozen_at_unix_us == 0 && record.phases.iter().all(is_early),
        "it was frozen: {record:?}"
    );
    Ok(())
}
