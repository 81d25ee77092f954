//! What was measured, one JSON object a line, written as each run ends: it is there whatever fails later, and reports can
//! be made of it again.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The name of the file in the directory for reports.
pub const FILE: &str = "runs.jsonl";

/// Where records go, if anywhere.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    file: Option<Arc<Mutex<File>>>,
    part: String,
}

/// Something that was to be measured and could not be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A rival gave up: that is a result. Anything else is an error of this program or of ours.
    pub of_a_rival: bool,
    /// What failed, and why.
    pub what: String,
}

#[derive(Serialize)]
struct Line<'a, T> {
    part: &'a str,
    kind: &'a str,
    #[serde(flatten)]
    run: &'a T,
}

/// What every kind of measurement has.
pub trait Recorded: Serialize + DeserializeOwned {
    /// What tells its lines from those of others.
    const KIND: &'static str;
}

impl Recorded for Failure {
    const KIND: &'static str = "failure";
}

impl Runs {
    /// Adds to the records in `folder`, which is made if it is not there.
    pub fn open(folder: Option<&Path>) -> Result<Self> {
        let Some(folder) = folder else {
            return Ok(Self::default());
        };
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(FILE);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self {
            file: Some(Arc::new(Mutex::new(file))),
            part: String::new(),
        })
    }

    /// The same file, for what belongs to `part` of a larger measurement.
    pub fn of_part(&self, part: &str) -> Self {
        Self {
            file: self.file.clone(),
            part: part.to_owned(),
        }
    }

    /// Writes one record.
    pub fn note<T: Recorded>(&self, run: &T) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let line = serde_json::to_string(&Line {
            part: &self.part,
            kind: T::KIND,
            run,
        })?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{line}").context("cannot write a record")
    }

    /// Keeps what was measured, or why it was not.
    pub fn keep<T: Recorded>(
        &self,
        outcome: Result<T>,
        of_a_rival: bool,
        kept: &mut Vec<T>,
        failures: &mut Vec<Failure>,
    ) -> Result<()> {
        match outcome {
            Ok(run) => {
                self.note(&run)?;
                kept.push(run);
                Ok(())
            }
            Err(error) => self.fail(&error, of_a_rival, failures),
        }
    }

    /// Keeps why something was not measured.
    pub fn fail(
        &self,
        error: &anyhow::Error,
        of_a_rival: bool,
        failures: &mut Vec<Failure>,
    ) -> Result<()> {
        let failure = Failure {
            of_a_rival,
            what: format!("{error:#}"),
        };
        eprintln!("FAILED: {}", failure.what);
        self.note(&failure)?;
        failures.push(failure);
        Ok(())
    }
}

/// An error when anything but a rival failed.
pub fn judge(failures: &[Failure]) -> Result<()> {
    let own = failures.iter().filter(|failure| !failure.of_a_rival);
    let count = own.count();
    ensure!(
        count == 0,
        "{count} measurements failed; see above for each"
    );
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_run_is_written_and_failures_are_counted() {
        let folder = tempfile();
        let runs = Runs::open(Some(&folder)).expect("a folder");
        let runs = runs.of_part("here");
        let (mut kept, mut failures) = (Vec::new(), Vec::new());
        let note = Failure {
            of_a_rival: true,
            what: "it was tired".to_owned(),
        };
        let mut keep = |outcome, rival| {
            let kept = runs.keep::<Failure>(outcome, rival, &mut kept, &mut failures);
            kept.expect("a file");
        };
        keep(Ok(note), false);
        keep(Err(anyhow::anyhow!("no path")), true);
        let lines = || std::fs::read_to_string(folder.join(FILE)).expect("a file");
        assert_eq!(lines().lines().count(), 2);
        assert!(lines().contains(r#""part":"here","kind":"failure""#));
        keep(Err(anyhow::anyhow!("ours broke")), false);
        assert_eq!((kept.len(), failures.len()), (1, 2));
        assert!(judge(&failures[..1]).is_ok());
        assert!(judge(&failures).is_err());
        std::fs::remove_dir_all(&folder).expect("it is there");
    }

    fn tempfile() -> std::path::PathBuf {
        std::env::temp_dir().join(format!("bench-runs-{}", std::process::id()))
    }
}
