//! Logs on standard error: quiet by default, `RUST_LOG` or `--verbose` say more.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

/// Environment variable with `tracing`'s filter directives.
pub const FILTER_VARIABLE: &str = "RUST_LOG";

/// Starts logging for a program. `verbose` counts how often the operator asked for more.
pub fn start(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let directives = format!("warn,common={level},page_server={level},lazy_restorer={level}");
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| directives.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
}
