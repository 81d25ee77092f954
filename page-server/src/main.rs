//! `page-server`: see `page-server --help`.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::{host, logging};
use nix::unistd::Pid;
use page_server::cli::{Cli, Command, Serve};
use page_server::report::Record;
use page_server::{external, guard, hook, identity_command, session};

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
        Command::Serve(serve) => report(run(&serve)),
        Command::Attach(attach) => report(attach.plan().and_then(|plan| {
            let (records, result) = block_on(external::run(&plan))?;
            write(&records, attach.json.as_deref());
            result
        })),
    }
}

fn report(result: Result<(), SessionError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("page-server: error: source host {}, {error}", host::name());
            error.failure.into()
        }
    }
}

fn run(serve: &Serve) -> Result<(), SessionError> {
    let json = serve.json.as_deref();
    if let Some(plan) = serve.images_plan()? {
        let (records, result) = block_on(external::run(&plan))?;
        write(&records, json);
        return result;
    }
    let plan = serve.plan()?;
    let mut record = Record::default();
    let result = block_on(session::run(&plan, &mut record))?;
    write(&[record], json);
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

fn write(records: &[Record], path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = Record::write_all(records, path)
    {
        eprintln!("page-server: cannot write {}: {error}", path.display());
    }
}
