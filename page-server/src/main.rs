//! `page-server`: see `page-server --help`.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::{host, logging, open_files};
use nix::unistd::Pid;
use page_server::cli::{Attach, Cli, Command, Release, Resume, Resumption, Serve, Thaw};
use page_server::report::Record;
use page_server::{external, guard, hook, identity_command, session, session_command};

fn main() -> ExitCode {
    if let Some(code) = hook::run_if_called() {
        return code;
    }
    let cli = Cli::parse();
    logging::start(cli.verbose);
    match cli.command {
        Command::Identity(command) => match identity_command::run(&command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("page-server: error: {error:#}");
                Failure::Identity.into()
            }
        },
        Command::Guard { pid, directory } => guard::run(Pid::from_raw(pid), &directory),
        Command::Serve(command) => concluded(serve(&command)),
        Command::Attach(command) => concluded(attach(&command)),
        Command::Resume(command) => concluded(resume(&command)),
        Command::Sessions(command) => concluded(session_command::list(&command)),
        Command::Thaw(command) => concluded(thaw(&command)),
        Command::Release(command) => concluded(release(&command)),
    }
}

fn concluded(result: Result<(), SessionError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page-server: error: source host {}, {error}", host::name());
            error.failure.into()
        }
    }
}

fn serve(command: &Serve) -> Result<(), SessionError> {
    if let Some(plan) = command.images_plan()? {
        let (records, result) = runtime()?.block_on(external::run(&plan));
        write(&records, command.json.as_deref());
        return result;
    }
    let plan = command.plan()?;
    let mut record = Record::default();
    let result = runtime()?.block_on(session::run(&plan, &mut record));
    write(&[record], command.json.as_deref());
    result
}

fn attach(command: &Attach) -> Result<(), SessionError> {
    let plan = command.plan()?;
    let (records, result) = runtime()?.block_on(external::run(&plan));
    write(&records, command.json.as_deref());
    result
}

fn resume(command: &Resume) -> Result<(), SessionError> {
    match command.plan()? {
        Resumption::Ours(left) => {
            let (plan, file) = *left;
            let mut record = Record::default();
            let result = runtime()?.block_on(session::resume(&plan, file, &mut record));
            write(&[record], command.json.as_deref());
            result
        }
        Resumption::External(plan) => {
            let (records, result) = runtime()?.block_on(external::run(&plan));
            write(&records, command.json.as_deref());
            result
        }
    }
}

fn thaw(command: &Thaw) -> Result<(), SessionError> {
    runtime()?.block_on(session_command::thaw(command))
}

fn release(command: &Release) -> Result<(), SessionError> {
    runtime()?.block_on(session_command::release(command))
}

fn runtime() -> Result<tokio::runtime::Runtime, SessionError> {
    open_files::raise();
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    built.map_err(|error| {
        let state = common::session::State::Hello;
        SessionError::new(Failure::Internal, state, error)
    })
}

fn write(records: &[Record], path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = Record::write_all(records, path)
    {
        eprintln!("page-server: cannot write {}: {error}", path.display());
    }
}
