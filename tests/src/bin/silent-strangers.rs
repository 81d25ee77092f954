//! Strangers with good papers and nothing to say: each connects to a source, is silent until it is turned away, and
//! comes again. `silent-strangers IDENTITY ADDRESS AT-A-TIME`. Says `knocking` once each of them was let in.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use common::identity::{Identity, Trust};
use common::quic::{self, PathProfile, Role};
use quinn::Endpoint;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [identity, address, at_a_time] = &arguments[..] else {
        anyhow::bail!("usage: silent-strangers IDENTITY ADDRESS AT-A-TIME");
    };
    let identity = Identity::load(Path::new(identity))?;
    let address: SocketAddr = address.parse().context("no address")?;
    let at_a_time: u64 = at_a_time.parse().context("no number")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(knock(&identity, address, at_a_time))
}

async fn knock(identity: &Identity, address: SocketAddr, at_a_time: u64) -> Result<()> {
    let let_in = Arc::new(AtomicU64::new(0));
    let mut strangers = Vec::new();
    for _ in 0..at_a_time {
        let path = PathProfile::default();
        let endpoint = quic::bind_client(address, None, identity, &Trust::Ca, Role::Fault, path)?;
        let let_in = let_in.clone();
        strangers.push(tokio::spawn(stranger(endpoint, address, let_in, at_a_time)));
    }
    for stranger in strangers {
        stranger.await?;
    }
    Ok(())
}

async fn stranger(endpoint: Endpoint, address: SocketAddr, let_in: Arc<AtomicU64>, all: u64) {
    loop {
        let Ok(connection) = quic::connect(&endpoint, address).await else {
            continue;
        };
        if let_in.fetch_add(1, Ordering::Relaxed) + 1 == all {
            println!("knocking");
        }
        connection.closed().await;
    }
}
