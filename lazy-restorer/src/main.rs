//! `lazy-restorer`: see `lazy-restorer --help`.

use std::env;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::session::State;
use common::{host, logging, open_files};
use lazy_restorer::cli::{self, Cli, Command, LazyPages, Restore, Resume};
use lazy_restorer::keeper::Keeper;
use lazy_restorer::report::Record;
use lazy_restorer::{external, gate, nursery, ready, remote_shell, session, session_command};

fn main() -> ExitCode {
    if let Some(code) = remote_shell::run_if_called() {
        return code;
    }
    if let Some(code) = gate::run_if_called() {
        return code;
    }
    let cli = Cli::parse_from(cli::arguments(env::args_os()));
    match cli.command {
        Command::Nursery {
            init: false,
            command,
        } => nursery::make(&command),
        Command::Nursery {
            init: true,
            command,
        } => nursery::init(&command),
        Command::Restore(command) => {
            logging::start(cli.verbose);
            concluded(restore(&command))
        }
        Command::Resume(command) => {
            logging::start(cli.verbose);
            concluded(resume(&command))
        }
        Command::Sessions(command) => concluded(session_command::list(&command)),
        Command::LazyPages(lazy_pages) => match ready::in_background(lazy_pages.daemon) {
            Some(code) => code,
            None => concluded(stand_in(&lazy_pages, cli.verbose)),
        },
    }
}

fn concluded(result: Result<(), SessionError>) -> ExitCode {
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

fn restore(command: &Restore) -> Result<(), SessionError> {
    let plan = command.plan()?;
    let keeper = start_keeper()?;
    let mut record = Record::default();
    let result = runtime()?.block_on(session::run(&plan, keeper, &mut record));
    write(&record, command.json.as_deref());
    result
}

fn resume(command: &Resume) -> Result<(), SessionError> {
    let (plan, file) = command.plan()?;
    let keeper = start_keeper()?;
    let mut record = Record::default();
    let result = runtime()?.block_on(session::resume(&plan, file, keeper, &mut record));
    write(&record, command.json.as_deref());
    result
}

fn stand_in(command: &LazyPages, verbose: u8) -> Result<(), SessionError> {
    start_log(command, verbose)?;
    let result = provide_memory(command);
    if let Err(error) = &result
        && command.log_file().is_some()
    {
        tracing::error!("{error}");
    }
    result
}

fn start_log(command: &LazyPages, verbose: u8) -> Result<(), SessionError> {
    let Some(path) = command.log_file() else {
        logging::start(verbose);
        return Ok(());
    };
    let created = File::create(&path);
    let file = created.map_err(|error| {
        let text = format!("--log-file {}: {error}", path.display());
        SessionError::new(Failure::BadInput, State::Hello, text)
    })?;
    logging::start_in(file, verbose);
    Ok(())
}

fn provide_memory(command: &LazyPages) -> Result<(), SessionError> {
    let plan = command.plan()?;
    let keeper = start_keeper()?;
    let mut record = Record::default();
    let result = runtime()?.block_on(external::run(&plan, keeper, &mut record));
    write(&record, command.json.as_deref());
    result
}

/// Before there is a second thread.
fn start_keeper() -> Result<Keeper, SessionError> {
    // The keepers share our descriptors.
    open_files::raise();
    let text = |error| format!("cannot start the keeper: {error}");
    Keeper::start().map_err(|error| internal(&text(error)))
}

fn runtime() -> Result<tokio::runtime::Runtime, SessionError> {
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    built.map_err(|error| internal(&error))
}

fn internal(error: &dyn std::fmt::Display) -> SessionError {
    SessionError::new(Failure::Internal, State::Hello, error)
}

fn write(record: &Record, path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = record.write(path)
    {
        eprintln!("lazy-restorer: cannot write {}: {error}", path.display());
    }
}
