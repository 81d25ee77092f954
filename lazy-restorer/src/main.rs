//! `lazy-restorer`: see `lazy-restorer --help`.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::{host, logging};
use lazy_restorer::cli::{Cli, Command, LazyPages, Restore};
use lazy_restorer::report::Record;
use lazy_restorer::{external, files, gate, keeper, nursery, ready, session};

fn main() -> ExitCode {
    if let Some(code) = files::run_if_called() {
        return code;
    }
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
            report(run(&restore))
        }
        Command::LazyPages(lazy_pages) => match ready::in_background(lazy_pages.daemon) {
            Some(code) => code,
            None => {
                logging::start(cli.verbose);
                report(stand_in(&lazy_pages))
            }
        },
    }
}

fn report(result: Result<(), SessionError>) -> ExitCode {
    match result {
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

fn run(restore: &Restore) -> Result<(), SessionError> {
    let plan = restore.plan()?;
    let mut record = Record::default();
    let result = block_on(session::run(&plan, &mut record))?;
    write(&record, restore.json.as_deref());
    result
}

fn stand_in(lazy_pages: &LazyPages) -> Result<(), SessionError> {
    let plan = lazy_pages.plan()?;
    let mut record = Record::default();
    let result = block_on(external::run(&plan, &mut record))?;
    write(&record, lazy_pages.json.as_deref());
    result
}

fn block_on<T>(future: impl Future<Output = T>) -> Result<T, SessionError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            let state = common::session::State::Hello;
            SessionError::new(Failure::Internal, state, error)
        })?;
    Ok(runtime.block_on(future))
}

fn write(record: &Record, path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = record.write(path)
    {
        eprintln!("lazy-restorer: cannot write {}: {error}", path.display());
    }
}
