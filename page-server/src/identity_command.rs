//! `page-server identity`: makes and shows the identities by which hosts recognise each other.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use common::identity;

/// Where the system keeps the host's name; at most 64 bytes, as many as a certificate takes.
const HOSTNAME_FILE: &str = "/proc/sys/kernel/hostname";

/// What `page-server identity` can do.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Make a CA and, signed by it, this host's identity
    #[command(after_help = "Example:
  page-server identity init --dir /etc/postcopy

Then issue one identity for every other host with `page-server identity issue`. The CA's key (ca.key) is needed only for that; it may be kept elsewhere.")]
    Init(Init),
    /// Make the identity of a further host, signed by an existing CA
    #[command(after_help = "Example:
  page-server identity issue --ca /etc/postcopy --dir ./host-b --name host-b
  scp -pr ./host-b root@host-b:/etc/postcopy && rm -r ./host-b")]
    Issue(Issue),
    /// Show names, validity and fingerprints, and whether the identity is usable
    #[command(after_help = "Example:
  page-server identity show --dir /etc/postcopy")]
    Show(Show),
}

/// Options of `identity init`.
#[derive(Debug, Args)]
pub struct Init {
    /// Directory to make the identity in; created if needed, existing files are never overwritten
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    host: Host,
}

/// Options of `identity issue`.
#[derive(Debug, Args)]
pub struct Issue {
    /// Directory that `identity init` made, with the CA's key
    #[arg(long, value_name = "DIR")]
    pub ca: PathBuf,
    /// Directory to make the new identity in; created if needed, existing files are never overwritten
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    host: Host,
}

/// Options of `identity show`.
#[derive(Debug, Args)]
pub struct Show {
    /// Directory of the identity
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
struct Host {
    /// The host's name, for logs; peers are not addressed by it [default: this host's name]
    #[arg(long)]
    name: Option<String>,
    /// Days the host's certificate is valid
    #[arg(
        long,
        value_name = "DAYS",
        default_value_t = 825,
        allow_negative_numbers = true
    )]
    valid_days: i64,
}

impl Host {
    fn name(&self) -> anyhow::Result<String> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => hostname(),
        }
    }
}

/// Does what `command` says and prints the result.
pub fn run(command: &IdentityCommand) -> anyhow::Result<()> {
    match command {
        IdentityCommand::Init(Init { dir, host }) => {
            identity::init(dir, &host.name()?, host.valid_days)?;
            announce(dir)
        }
        IdentityCommand::Issue(Issue { ca, dir, host }) => {
            identity::issue(ca, dir, &host.name()?, host.valid_days)?;
            announce(dir)
        }
        IdentityCommand::Show(Show { dir }) => {
            println!("{}", identity::describe(dir)?);
            Ok(())
        }
    }
}

fn announce(dir: &Path) -> anyhow::Result<()> {
    let description = identity::describe(dir)?;
    let mut names = vec![identity::HOST_CERT, identity::HOST_KEY, identity::CA_CERT];
    if description.can_issue {
        names.push(identity::CA_KEY);
    }
    for name in names {
        println!("made {}", dir.join(name).display());
    }
    println!("{description}");
    Ok(())
}

fn hostname() -> anyhow::Result<String> {
    let text = fs::read_to_string(HOSTNAME_FILE).with_context(|| {
        format!("cannot read this host's name from {HOSTNAME_FILE}; give one with --name")
    })?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: IdentityCommand,
    }

    fn run_with(arguments: &[&str]) -> anyhow::Result<()> {
        let program = ["identity"].into_iter();
        run(&Cli::try_parse_from(program.chain(arguments.iter().copied()))?.command)
    }

    #[test]
    fn init_issue_and_show_work_together() {
        let parent = tempfile::tempdir().unwrap();
        let (ours, other) = (parent.path().join("a"), parent.path().join("b"));
        let (ours, other) = (ours.to_str().unwrap(), other.to_str().unwrap());
        run_with(&["init", "--dir", ours]).unwrap();
        let issue = ["issue", "--ca", ours, "--dir", other, "--name", "b"];
        run_with(&[&issue[..], &["--valid-days", "-1"]].concat()).unwrap();
        run_with(&["show", "--dir", other]).unwrap();
        let description = identity::describe(Path::new(other)).unwrap();
        assert_eq!(description.host.name, "b");
        assert!(description.problem.is_some() && !description.can_issue);
        let again = run_with(&["init", "--dir", ours]).unwrap_err();
        assert!(again.to_string().contains("exists already"), "{again}");
    }

    #[test]
    fn this_host_has_a_name() {
        assert!(!hostname().unwrap().is_empty());
    }
}
