//! `page-server`: see `page-server --help`.

use std::process::ExitCode;

use clap::Parser;
use common::exit::{Failure, SessionError};
use common::{host, logging};
use nix::unistd::Pid;
use page_server::cli::{Cli, Command, Serve};
use page_server::report::Record;
use page_server::{guard, hook, identity_command, session};

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
        Command::Serve(serve) => match run(&serve) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("page-server: error: source host {}, {error}", host::name());
                error.failure.into()
            }
        },
    }
}

fn run(serve: &Serve) -> Result<(), SessionError> {
    let plan = serve.plan()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            let state = common::session::State::Hello;
            SessionError::new(Failure::Internal, state, error)
        })?;
    let mut record = Record::default();
    let result = runtime.block_on(session::run(&plan, &mut record));
    if let Some(path) = &serve.json
        && let Err(error) = record.write(path)
    {
        eprintln!("page-server: cannot write {}: {error}", path.display());
    }
    result
}
