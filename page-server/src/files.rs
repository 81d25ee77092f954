//! Sends the workload's files by `rsync`, at the destination's wish, over streams of the bulk connection.
//!
//! The destination's rsync says with which arguments ours has to run. They are data of a peer: only a closed set is
//! passed on, without a shell, and only the trees that the operator named are sent.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::limits::MAX_CONTROL_BYTES;
use common::proto::files::{Changes, FilesFacts, FilesRequest, MappedFiles};
use common::proto::stream;
use nix::unistd::{Pid, syncfs};
use quinn::{Connection, RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::sleep;

use crate::mapped::mapped_files;
use crate::report::LastLook;
use crate::survey::{Again, Survey};
use crate::watch::{Unwatched, Watch, Watching};

/// Letters that may be among the short options of a sending rsync. Missing is `s`, which reads more options from the
/// stream.
const SHORT_OPTIONS: &str = "lHogDtpAXrRSIWqvzd";
/// Long options of a sending rsync that may be passed on.
const LONG_OPTIONS: &[&str] = &["--numeric-ids", "--files-from=-", "--from0"];
/// Longer than a tick of the clock that the kernel takes times of files from (10 ms at 100 Hz).
const TICK: Duration = Duration::from_millis(20);
/// Bytes of a length in a message, at most.
const LENGTH_BYTES: usize = 8;
/// Bytes of an argument: all of ours are shorter.
const MAX_ARGUMENT_BYTES: usize = 64;

/// Why the files of a tree cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The operator's path.
    #[error("--sync {0}: give the absolute path of a directory below /, without `..`, in UTF-8")]
    Path(PathBuf),
    /// The peer's.
    #[error("the destination asks for {0:?}, which --sync does not name here")]
    NotOffered(String),
    /// An argument outside the set.
    #[error("the destination asks for rsync with {0:?}")]
    Argument(String),
    /// The stream.
    #[error(transparent)]
    Proto(#[from] common::proto::ProtoError),
    /// A program or file.
    #[error("rsync: {0}")]
    Io(#[from] io::Error),
}

/// Trees that may be sent.
#[derive(Debug, Default)]
pub struct Files {
    root: Option<Pid>,
    paths: Vec<PathBuf>,
    /// Both hosts have the same files.
    shared: bool,
    /// Trees as they were before they were sent first.
    surveys: Mutex<HashMap<PathBuf, Arc<Survey>>>,
    /// Trees that are watched since shortly before the freeze.
    watched: Mutex<HashMap<PathBuf, Watching>>,
    /// What was looked at since then.
    last_look: Mutex<LastLook>,
    /// Files to be compared whatever their times say, when that was found out along with the changes.
    whole: Mutex<HashMap<PathBuf, Vec<Vec<u8>>>>,
}

/// Serves requests for files until it is dropped.
#[derive(Debug)]
pub struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Files {
    /// Offers the trees at `paths`, files of the workload under `root`; `shared` ones need no sending.
    pub fn offer(root: Pid, paths: &[PathBuf], shared: bool) -> Result<Arc<Self>, FilesError> {
        for path in paths {
            let plain = path
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            let plain = plain && path.to_str().is_some();
            if !plain || !path.is_absolute() || path.parent().is_none() || !path.is_dir() {
                return Err(FilesError::Path(path.clone()));
            }
        }
        Ok(Arc::new(Files {
            root: Some(root),
            paths: paths.iter().map(|path| plain(path)).collect(),
            shared,
            ..Files::default()
        }))
    }

    /// What the destination must know: it has to be told the same.
    pub fn facts(&self) -> FilesFacts {
        let paths = self.paths.iter().map(|path| path.display().to_string());
        FilesFacts {
            sync: paths.collect(),
            shared: self.shared,
        }
    }

    /// Serves requests on `bulk`, on the current runtime.
    pub fn serve(self: &Arc<Self>, bulk: Connection) -> Serving {
        let files = self.clone();
        Serving(tokio::spawn(async move {
            let mut requests = JoinSet::new();
            while let Ok((send, receive)) = bulk.accept_bi().await {
                let files = files.clone();
                requests.spawn(async move {
                    if let Err(error) = files.answer(send, receive).await {
                        tracing::warn!(%error, "files");
                    }
                });
                while requests.try_join_next().is_some() {}
            }
        }))
    }

    async fn answer(
        &self,
        mut send: SendStream,
        mut receive: RecvStream,
    ) -> Result<(), FilesError> {
        match stream::receive(&mut receive).await? {
            FilesRequest::Mapped { path } => {
                let path = self.offered(&path)?;
                let whole = self.whole(path).await?;
                stream::send(&mut send, &MappedFiles(whole)).await?;
            }
            FilesRequest::Changed { path } => {
                let path = self.offered(&path)?;
                stream::send(&mut send, &self.changes(path).await).await?;
            }
            FilesRequest::Rsync { path, arguments } => {
                let path = self.offered(&path)?;
                let command = command(path, &arguments)?;
                self.survey(path).await?;
                relay(command, send, receive).await?;
            }
        }
        Ok(())
    }

    /// Notes what the tree looks like before it is sent for the first time.
    async fn survey(&self, path: &Path) -> io::Result<()> {
        if self.surveyed(path).is_some() {
            return Ok(());
        }
        let (tree, root) = (path.to_owned(), self.root);
        // A page that is dirty already takes stores without a mark; the kernel marks the first one after it was written.
        let made = spawn_blocking(move || {
            syncfs(File::open(&tree)?)?;
            Ok::<_, io::Error>(Survey::make(&tree, mapped_files(root)))
        });
        match made.await.map_err(io::Error::other)?? {
            Ok(survey) => {
                locked(&self.surveys).insert(path.to_owned(), Arc::new(survey));
            }
            Err(error) => tracing::warn!(%error, "the last pass will compare all files"),
        }
        // A change in the same tick of the kernel's clock as a look at the file would not show. It comes before rsync then.
        sleep(TICK).await;
        Ok(())
    }

    /// Watches all trees that have been sent, so that the last look at them is only at what changed. To be called before
    /// the workload is frozen: it takes as long as a look at everything.
    pub async fn watch(&self) {
        for path in &self.paths {
            if let Err(error) = self.watch_one(path).await {
                tracing::info!(path = %path.display(), %error, "the last look will be at all files");
                locked(&self.last_look).reasons.push(error.to_string());
            }
        }
    }

    async fn watch_one(&self, path: &Path) -> Result<(), Unwatched> {
        let Some(survey) = self.surveyed(path) else {
            return Ok(());
        };
        let tree = path.to_owned();
        let begun = spawn_blocking(move || Watch::begin(&tree, &survey)).await;
        let watching = Watching::start(begun.map_err(io::Error::other)??)?;
        locked(&self.watched).insert(path.to_owned(), watching);
        Ok(())
    }

    /// What the last looks were at.
    pub fn last_look(&self) -> LastLook {
        locked(&self.last_look).clone()
    }

    fn surveyed(&self, path: &Path) -> Option<Arc<Survey>> {
        locked(&self.surveys).get(path).cloned()
    }

    async fn changes(&self, path: &Path) -> Changes {
        let Some(survey) = self.surveyed(path) else {
            return Changes::Everything;
        };
        let Ok(again) = self.look_again(path, survey).await else {
            return Changes::Everything;
        };
        let (mut whole, mut changed) = (again.unmarked, again.changed);
        let mut room = MAX_CONTROL_BYTES.saturating_sub(bytes_of(&whole));
        for path in again.touched {
            let list = match room.checked_sub(path.len() + LENGTH_BYTES) {
                Some(left) => {
                    room = left;
                    &mut whole
                }
                None => &mut changed,
            };
            list.push(path);
        }
        locked(&self.whole).insert(path.to_owned(), whole);
        match bytes_of(&changed) < MAX_CONTROL_BYTES {
            true => Changes::Only(changed),
            false => Changes::Everything,
        }
    }

    /// Files whose times do not tell whether they are equal.
    async fn whole(&self, path: &Path) -> io::Result<Vec<Vec<u8>>> {
        let known = locked(&self.whole).remove(path);
        match known {
            Some(whole) => Ok(whole),
            None => {
                let survey = self.surveyed(path).unwrap_or_default();
                Ok(self.look_again(path, survey).await?.unmarked)
            }
        }
    }

    async fn look_again(&self, path: &Path, survey: Arc<Survey>) -> io::Result<Again> {
        let (tree, root) = (path.to_owned(), self.root);
        let watch = locked(&self.watched).remove(path).and_then(Watching::stop);
        let again = spawn_blocking(move || last_look(&tree, &survey, root, watch));
        let (again, looked) = again.await.map_err(io::Error::other)??;
        let mut looks = locked(&self.last_look);
        looks.watched_trees += looked.watched_trees;
        looks.paths += looked.paths;
        looks.whole_trees += looked.whole_trees;
        looks.reasons.extend(looked.reasons);
        Ok(again)
    }

    fn offered(&self, path: &str) -> Result<&Path, FilesError> {
        let offered = self
            .paths
            .iter()
            .find(|offered| **offered == Path::new(path));
        offered
            .map(PathBuf::as_path)
            .ok_or_else(|| FilesError::NotOffered(path.to_owned()))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at what the watch says may have changed, and at everything where that is not known.
fn last_look(
    tree: &Path,
    survey: &Survey,
    root: Option<Pid>,
    watch: Option<Watch>,
) -> io::Result<(Again, LastLook)> {
    let unmarked = mapped_files(root);
    let mut looked = LastLook::default();
    match watch.map(Watch::finish) {
        Some(Ok(mut due)) => {
            due.add(tree, &unmarked)?;
            looked.watched_trees = 1;
            looked.paths = due.paths.len() as u64;
            let again = survey.look_at(tree, &due, &unmarked)?;
            // The workload does not stand still for that.
            spawn_blocking(move || drop(due));
            return Ok((again, looked));
        }
        Some(Err(error)) => {
            tracing::info!(%error, "all files are looked at");
            looked.reasons.push(error.to_string());
        }
        None => {}
    }
    looked.whole_trees = 1;
    Ok((survey.look_again(tree, &unmarked)?, looked))
}

/// The path as the other end writes it, too: with nothing doubled, and no slash at its end.
fn plain(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Bytes of a list in a message, at most; each path has its length before it.
fn bytes_of(paths: &[Vec<u8>]) -> usize {
    let bytes: usize = paths.iter().map(|path| path.len() + LENGTH_BYTES).sum();
    // The list has a length too, and a kind.
    bytes + 2 * LENGTH_BYTES
}

/// Makes sure that the destination's `arguments` for our rsync are all of the closed set, for sending `path`.
pub fn check_arguments(path: &Path, arguments: &[String]) -> Result<(), FilesError> {
    let refused = || FilesError::Argument(arguments.join(" "));
    // The dot stands for nothing. A second one would be our working directory.
    let [server, sender, options @ .., dot, tree] = arguments else {
        return Err(refused());
    };
    let is_sender = server == "--server" && sender == "--sender";
    if !is_sender || dot != "." || *tree != format!("{}/", path.display()) {
        return Err(refused());
    }
    let is_known = |option: &&String| {
        LONG_OPTIONS.contains(&option.as_str()) || are_short_options(option.as_str())
    };
    match options.iter().find(|option| !is_known(option)) {
        Some(option) => Err(FilesError::Argument(option.clone())),
        None => Ok(()),
    }
}

/// The sending rsync.
fn command(path: &Path, arguments: &[String]) -> Result<Command, FilesError> {
    check_arguments(path, arguments)?;
    let mut command = Command::new("rsync");
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    Ok(command)
}

/// Whether an argument is a word of known short options, and after `e.` what the other rsync is capable of.
fn are_short_options(argument: &str) -> bool {
    let Some(word) = argument.strip_prefix('-') else {
        return false;
    };
    let (options, capabilities) = word.split_once("e.").unwrap_or((word, ""));
    argument.len() <= MAX_ARGUMENT_BYTES
        && !options.is_empty()
        && options.chars().all(|option| SHORT_OPTIONS.contains(option))
        && capabilities
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == '.')
}

async fn relay(
    mut command: Command,
    mut send: SendStream,
    mut receive: RecvStream,
) -> Result<(), FilesError> {
    let mut child = command.spawn()?;
    let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(io::Error::other("it has no pipes").into());
    };
    let there = async {
        let copied = tokio::io::copy(&mut receive, &mut stdin).await;
        drop(stdin);
        copied
    };
    let back = async {
        let copied = tokio::io::copy(&mut stdout, &mut send).await;
        send.shutdown().await?;
        copied
    };
    let (_, sent) = tokio::join!(there, back);
    sent?;
    let status = child.wait().await?;
    // 24: a file vanished while it was read. The destination's end judges that.
    match status.code() {
        Some(0 | 24) => Ok(()),
        _ => Err(io::Error::other(format!("the sender ended with {status}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &str) -> Vec<String> {
        words.split(' ').map(String::from).collect()
    }

    #[test]
    fn what_rsync_asks_for_is_passed_on() {
        for words in [
            "--server --sender -qlHogDtpAXrSe.iLsfxCIvu --numeric-ids . /srv/tree/",
            "--server --sender -lHogDtpAXIRSe.LsfxCIvu --numeric-ids --files-from=- --from0 . /srv/tree/",
        ] {
            let result = command(Path::new("/srv/tree"), &arguments(words));
            assert!(result.is_ok(), "{words}: {result:?}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for words in [
            "--server -lHogDtpAXrSe.iLsfxCIvu . /srv/tree/",
            "--server --sender -lHogDtpAXrSe.iLsfxCIvu . /etc/",
            "--server --sender -lHogDtpAXrSe.iLsfxCIvu . /srv/tree/../../etc/",
            "--server --sender -s . /srv/tree/",
            "--server --sender -lse.iL . /srv/tree/",
            "--server --sender --files-from=/etc/shadow . /srv/tree/",
            "--server --sender --log-file=/etc/passwd . /srv/tree/",
            "--server --sender --remove-source-files . /srv/tree/",
            "--server --sender . /srv/tree/ /etc/",
            "--server --sender . /etc/ /srv/tree/",
            "--server --sender . . /srv/tree/",
            "--server --sender . /srv/tree/ . /srv/tree/",
            "--server --sender /srv/tree/",
            "--server --sender --sender . /srv/tree/",
            "--daemon --sender . /srv/tree/",
            "",
        ] {
            let result = command(Path::new("/srv/tree"), &arguments(words));
            assert!(result.is_err(), "{words}");
        }
    }

    #[test]
    fn only_plain_directories_are_offered() {
        let directory = tempfile::tempdir().expect("a directory");
        let offer = |path: &Path| Files::offer(Pid::this(), &[path.to_owned()], false);
        let files = offer(directory.path()).expect("a directory");
        let facts = files.facts();
        assert_eq!(facts.sync, [directory.path().display().to_string()]);
        assert!(!facts.shared);
        for path in [
            "/",
            "relative",
            "/nonexistent",
            "/tmp/../etc",
            "/etc/passwd",
        ] {
            assert!(offer(Path::new(path)).is_err(), "{path}");
        }
    }
}
