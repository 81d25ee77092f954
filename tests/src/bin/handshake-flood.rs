//! Strangers at the door: connects to a source again and again with an identity it does not trust.
//! `handshake-flood IDENTITY ADDRESS AT-A-TIME`. Says `flooding` once a hundred were refused.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use common::identity::{Identity, Trust};
use common::quic::{self, PathProfile, Role};
use quinn::Endpoint;

/// Refusals after which it counts as a flood.
const FLOOD: u64 = 100;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [identity, address, at_a_time] = &arguments[..] else {
        anyhow::bail!("usage: handshake-flood IDENTITY ADDRESS AT-A-TIME");
    };
    let identity = Identity::load(Path::new(identity))?;
    let address: SocketAddr = address.parse().context("no address")?;
    let at_a_time: usize = at_a_time.parse().context("no number")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(flood(&identity, address, at_a_time))
}

async fn flood(identity: &Identity, address: SocketAddr, at_a_time: usize) -> Result<()> {
    let refused = Arc::new(AtomicU64::new(0));
    let mut strangers = Vec::new();
    for _ in 0..at_a_time {
        let path = PathProfile::default();
        let endpoint = quic::bind_client(address, None, identity, &Trust::Ca, Role::Fault, path)?;
        strangers.push(tokio::spawn(stranger(endpoint, address, refused.clone())));
    }
    for stranger in strangers {
        stranger.await?;
    }
    Ok(())
}

/// One that never gives up. It does not trust the source either, so each handshake fails when all the work is done.
async fn stranger(endpoint: Endpoint, address: SocketAddr, refused: Arc<AtomicU64>) {
    loop {
        if quic::connect(&endpoint, address).await.is_err()
            && refused.fetch_add(1, Ordering::Relaxed) + 1 == FLOOD
        {
            println!("flooding");
        }
    }
}
