//! Logs, on standard error or in a file: quiet by default, `RUST_LOG` or `--verbose` say more.

use std::fs::File;
use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Environment variable with `tracing`'s filter directives.
pub const FILTER_VARIABLE: &str = "RUST_LOG";

/// Starts logging for a program. `verbose` counts how often the operator asked for more.
pub fn start(verbose: u8) {
    start_to(BoxMakeWriter::new(stderr), stderr().is_terminal(), verbose);
}

/// The same with the log in `file`.
pub fn start_in(file: File, verbose: u8) {
    start_to(BoxMakeWriter::new(file), false, verbose);
}

fn start_to(writer: BoxMakeWriter, colours: bool, verbose: u8) {
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
        .with_writer(writer)
        .with_ansi(colours)
        .init();
}
