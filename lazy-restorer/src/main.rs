//! `lazy-restorer`: see `lazy-restorer --help`.

use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::{host, logging};
use lazy_restorer::cli::{Cli, Command, Restore};
use lazy_restorer::report::Record;
use lazy_restorer::{gate, keeper, nursery, session};

fn main() -> ExitCode {
    if let Some(code) = gate::run_if_called() {
        return code;
    }
    let cli = Cli::parse();
    match cli.command {
        Command::Keeper { directory } => keeper::run(&directory),
        Command::Nursery {
            init: false,
            command,
        } => nursery::make(&command),
        Command::Nursery {
            init: true,
            command,
        } => nursery::init(&command),
        Command::Restore(restore) => {
            logging::start(cli.verbose);
            match run(&restore) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!(
                        "lazy-restorer: error: destination host {}, {error}",
                        host::name()
                    );
                    error.failure.into()
                }
            }
        }
    }
}

fn run(restore: &Restore) -> Result<(), SessionError> {
    let plan = restore.plan()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            let state = common::session::State::Hello;
            SessionError::new(Failure::Internal, state, error)
        })?;
    let mut record = Record::default();
    let result = runtime.block_on(session::run(&plan, &mut record));
    if let Some(path) = &restore.json
        && let Err(error) = record.write(path)
    {
        eprintln!("lazy-restorer: cannot write {}: {error}", path.display());
    }
    result
}
