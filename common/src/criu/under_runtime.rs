//! Settings for a CRIU that a container runtime starts, not we.
//!
//! The runtime runs the first `criu` of its search path as `criu swrk` and gives its options by RPC. CRIU also reads
//! the file that `CRIU_CONFIG_FILE` names, and runs the action scripts of that file after the runtime's own
//! notifications (`criu/config.c`, `criu/action-scripts.c`). The environment reaches CRIU and its scripts through the
//! runtime.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::Criu;

/// What CRIU reads its configuration file's name from.
const CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";

/// Puts a configuration file and a search path for `criu` into `directory`; returns the environment that uses them.
///
/// `options` are lines of the file; `arguments` are options as they would be on a command line.
pub fn environment(
    criu: &Criu,
    directory: &Path,
    options: &[(&str, String)],
    arguments: &[String],
) -> io::Result<Vec<(&'static str, OsString)>> {
    let config = directory.join("criu.conf");
    let mut text: String = options
        .iter()
        .map(|(name, value)| format!("{name} \"{value}\"\n"))
        .collect();
    text += &as_lines(arguments);
    fs::write(&config, text)?;
    let mut variables = vec![(CONFIG_VARIABLE, config.into_os_string())];
    // Without a slash it is the runtime's search path that decides, as it would without us.
    if criu.program().components().count() > 1 {
        let programs = directory.join("bin");
        fs::create_dir_all(&programs)?;
        symlink(fs::canonicalize(criu.program())?, programs.join("criu"))?;
        let mut path = programs.into_os_string();
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_default());
        variables.push(("PATH", path));
    }
    Ok(variables)
}

/// Command line arguments as lines of a configuration file: an option begins a line, its value stands behind it.
fn as_lines(arguments: &[String]) -> String {
    let mut text = String::new();
    for argument in arguments {
        match argument.strip_prefix("--") {
            Some(option) => {
                if !text.is_empty() {
                    text.push('\n');
                }
                text += &option.replacen('=', " ", 1);
            }
            None => {
                text.push(' ');
                text += argument;
            }
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_become_lines() {
        let arguments = ["--ghost-limit=10M", "--file-locks", "--cpu-cap", "none"];
        assert_eq!(
            as_lines(&arguments.map(String::from)),
            "ghost-limit 10M\nfile-locks\ncpu-cap none\n"
        );
        assert_eq!(as_lines(&[]), "");
    }
}
