//! Makes directories here equal to the source's by `rsync`, whose other end runs on the source; its protocol travels in
//! a stream of the bulk connection.
//!
//! rsync starts a program to reach the other host: this very program, in another role ([`remote_shell`](crate::remote_shell)), which hands
//! us what it is given.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::proto::ProtoError;
use common::proto::files::{Changes, FilesRequest, MappedFiles};
use common::proto::stream;
use nix::unistd::syncfs;
use quinn::{Connection, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::remote_shell::{Remote, SOCKET_VARIABLE};

/// What rsync calls the other host, and hands on as the first argument.
const HOST: &str = "source";
/// A file vanished on the source while it was read.
const VANISHED: i32 = 24;
/// Bytes that are carried at a time.
const BUFFER_BYTES: usize = 64 << 10;
/// Everything a file is: hard links, ACLs, extended attributes, holes, owners by number. Nanoseconds of change times
/// count, for a file may change twice in a second.
const OPTIONS: &[&str] = &[
    "-aHAXS",
    "--numeric-ids",
    "--modify-window=-1",
    "--quiet",
    // Else the pipe it gives us refuses what it cannot take at once.
    "--blocking-io",
];

/// Why files are not equal.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A system call, or rsync cannot be started.
    #[error("cannot run rsync: {0}")]
    Io(#[from] io::Error),
    /// rsync.
    #[error(
        "the files in {path} did not come: rsync ended with {status}: {error}; was page-server given --sync {path} too?",
        path = path.display()
    )]
    Rsync {
        /// Which.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its last words.
        error: String,
    },
    /// The source.
    #[error("the source does not send the files in {path}; give page-server --sync {path} too: {error}", path = path.display())]
    Source {
        /// Which.
        path: PathBuf,
        /// What came instead.
        error: ProtoError,
    },
    /// The link.
    #[error("the connection broke while files came: {0}")]
    Link(#[from] quinn::ConnectionError),
    /// A path that cannot be made here.
    #[error("--sync {0}: give the absolute path of a directory below /, without `..`, in UTF-8")]
    Path(PathBuf),
}

/// Which time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The workload runs on and may change them.
    First,
    /// It stands still: what is equal now stays equal.
    Last,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PassCounts {
    /// Microseconds it took.
    pub took_us: u64,
    /// Directories that rsync compared as a whole.
    pub trees: u64,
    /// Paths that it was asked to compare besides.
    pub paths: u64,
    /// Bytes of its protocol that came.
    pub bytes: u64,
}

/// What a pass brought.
#[derive(Debug, Default)]
pub struct Brought {
    /// Of what.
    pub counts: PassCounts,
    /// Those rsyncs that have not said yet how it went.
    outstanding: JoinSet<Result<(), FilesError>>,
}

impl Brought {
    /// Waits until every rsync has said that all went well.
    pub async fn settle(&mut self) -> Result<(), FilesError> {
        while let Some(said) = self.outstanding.join_next().await {
            said.map_err(io::Error::other)??;
        }
        Ok(())
    }
}

/// Directories to make equal.
#[derive(Clone, Debug, Default)]
pub struct Files {
    paths: Vec<PathBuf>,
    /// Both hosts have the same files.
    shared: bool,
}

impl Files {
    /// Whether nothing comes along.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The directories at `paths`; where files are `shared` there is nothing to bring.
    pub fn new(paths: &[PathBuf], shared: bool) -> Result<Self, FilesError> {
        for path in paths {
            let plain = path.components().all(|part| {
                matches!(
                    part,
                    std::path::Component::RootDir | std::path::Component::Normal(_)
                )
            });
            let plain = plain && path.to_str().is_some();
            if !plain || !path.is_absolute() || path.parent().is_none() {
                return Err(FilesError::Path(path.clone()));
            }
        }
        Ok(Files {
            // As the source writes them, too: with nothing doubled, and no slash at the end.
            paths: paths
                .iter()
                .map(|path| path.components().collect())
                .collect(),
            shared,
        })
    }

    /// The directories.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Whether both hosts have the same files.
    pub fn are_shared(&self) -> bool {
        self.shared
    }

    /// Whether `path` is brought, or lies in what is. Links on the way to it are followed as far as it is here.
    pub fn bring(&self, path: &Path) -> bool {
        if self.paths.is_empty() {
            return false;
        }
        let path = resolved(path);
        let mut paths = self.paths.iter();
        paths.any(|brought| path.starts_with(resolved(brought)))
    }

    /// Makes all of them equal to the source's. After the first pass they are; after the last one what rsync says of
    /// that is outstanding.
    pub async fn pass(&self, bulk: &Connection, pass: Pass) -> Result<Brought, FilesError> {
        let started = Instant::now();
        let mut brought = Brought::default();
        for path in &self.paths {
            fs::create_dir_all(path)?;
            let mut tree = Tree {
                bulk,
                path,
                brought: &mut brought,
            };
            match pass {
                Pass::First => {
                    tree.compare_all().await?;
                    brought.settle().await?;
                }
                Pass::Last => {
                    let changes = tree.changes().await;
                    // These first: then their times are equal, and the rest does not look at them again.
                    tree.compare_whole().await?;
                    tree.bring_changes(changes).await?;
                }
            }
        }
        if pass == Pass::First {
            self.write_out(started.elapsed()).await;
        }
        brought.counts.took_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(brought)
    }
}

impl Files {
    /// Lets the disk write what came, for `limit` at most: else it does so in the freeze, and the last pass waits for its
    /// journal.
    async fn write_out(&self, limit: Duration) {
        let paths = self.paths.clone();
        let writing = tokio::task::spawn_blocking(move || {
            paths
                .iter()
                .try_for_each(|path| Ok(syncfs(File::open(path)?)?))
        });
        let written: Result<Result<io::Result<()>, _>, _> = timeout(limit, writing).await;
        if !matches!(written, Ok(Ok(Ok(())))) {
            tracing::debug!(?written, "the files that came are not on disk yet");
        }
    }
}

/// The path without links; what of it is not here yet has none.
fn resolved(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for here in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (here.canonicalize(), path.strip_prefix(here)) {
            return real.join(rest);
        }
    }
    path
}

/// A list of paths for rsync.
struct PathList(tempfile::NamedTempFile);

impl PathList {
    fn write(paths: &[Vec<u8>]) -> io::Result<Self> {
        let mut list = tempfile::NamedTempFile::new()?;
        let mut bytes = Vec::new();
        for path in paths {
            bytes.extend(path);
            bytes.push(0);
        }
        list.write_all(&bytes)?;
        Ok(PathList(list))
    }

    fn options(&self) -> [OsString; 2] {
        let mut from = OsString::from("--files-from=");
        from.push(self.0.path());
        ["--from0".into(), from]
    }
}

/// One directory in one pass.
struct Tree<'a> {
    bulk: &'a Connection,
    path: &'a Path,
    brought: &'a mut Brought,
}

impl Tree<'_> {
    async fn compare_all(&mut self) -> Result<(), FilesError> {
        self.brought.counts.trees += 1;
        self.rsync(&["--delete".into()]).await
    }

    /// Compares what changed since the first pass, so that the freeze does not grow with the number of all files.
    async fn bring_changes(&mut self, changes: Changes) -> Result<(), FilesError> {
        match changes {
            Changes::Everything => self.compare_all().await,
            Changes::Only(paths) => self.compare(&paths, &["--delete"]).await,
        }
    }

    /// Compares files whose times do not tell whether they are equal: what is stored through a mapping changes the time
    /// of a file only now and then.
    async fn compare_whole(&mut self) -> Result<(), FilesError> {
        let path = self.path.display().to_string();
        let answer = self.ask(&FilesRequest::Mapped { path }).await;
        let MappedFiles(whole) = answer.map_err(|error| self.wrong(error))?;
        // Where there is a directory here, a file may be there now.
        self.compare(&whole, &["--ignore-times", "--force"]).await
    }

    /// A source that cannot say what changed has everything compared.
    async fn changes(&self) -> Changes {
        let path = self.path.display().to_string();
        let answer = self.ask(&FilesRequest::Changed { path }).await;
        answer.unwrap_or_else(|error| {
            tracing::debug!(%error, "all files are compared");
            Changes::Everything
        })
    }

    async fn ask<T: DeserializeOwned>(&self, request: &FilesRequest) -> Result<T, ProtoError> {
        let (mut send, mut receive) = self.bulk.open_bi().await.map_err(io::Error::from)?;
        stream::send(&mut send, request).await?;
        stream::receive(&mut receive).await
    }

    fn wrong(&self, error: ProtoError) -> FilesError {
        FilesError::Source {
            path: self.path.to_owned(),
            error,
        }
    }

    async fn compare(&mut self, paths: &[Vec<u8>], options: &[&str]) -> Result<(), FilesError> {
        if paths.is_empty() {
            return Ok(());
        }
        self.brought.counts.paths += paths.len() as u64;
        let list = PathList::write(paths)?;
        let options = options.iter().map(OsString::from).chain(list.options());
        self.rsync(&options.collect::<Vec<_>>()).await
    }

    async fn rsync(&mut self, more: &[OsString]) -> Result<(), FilesError> {
        let path = self.path;
        let directory = TempDir::with_prefix("postcopy-files-")?;
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket)?;
        let child = Command::new("rsync")
            .args(OPTIONS)
            .args(more)
            .arg("-e")
            .arg(env::current_exe()?)
            .arg(format!("{HOST}:{}/", path.display()))
            .arg(format!("{}/", path.display()))
            .env(SOCKET_VARIABLE, &socket)
            // No shell reads the path at the other end.
            .env("RSYNC_OLD_ARGS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut output = Box::pin(child.wait_with_output());
        let path = path.to_owned();
        tokio::select! {
            carried = self.carry(listener) => if !carried? {
                return judge(&path, &output.await?);
            },
            output = &mut output => return judge(&path, &output?),
        }
        // It ends some 20 ms after it has done everything, for that is how often it looks for its other process.
        self.brought.outstanding.spawn(async move {
            let output = output.await?;
            // Until then it is found there by the program that it started.
            drop(directory);
            judge(&path, &output)
        });
        Ok(())
    }

    /// Carries rsync's protocol between its program and a stream of ours, until the other end has nothing to say any more:
    /// it hears before that everything is in place here. False when the stream broke.
    async fn carry(&mut self, listener: UnixListener) -> Result<bool, FilesError> {
        let (local, _) = listener.accept().await?;
        let Remote {
            arguments,
            mut from_rsync,
            mut to_rsync,
        } = Remote::accept(local)
            .await
            .map_err(|error| self.wrong(error))?;
        let request = FilesRequest::Rsync {
            path: self.path.display().to_string(),
            arguments,
        };
        let (mut send, mut receive): (SendStream, RecvStream) = self.bulk.open_bi().await?;
        let sent = stream::send(&mut send, &request).await;
        sent.map_err(|error| self.wrong(error))?;
        let there = async {
            let copied = tokio::io::copy(&mut from_rsync, &mut send).await;
            // A source that has sent everything does not listen any more.
            let _ = send.shutdown().await;
            copied.map(drop)
        };
        let bytes = &mut self.brought.counts.bytes;
        let back = async move {
            let copied = copy_counted(&mut receive, &mut to_rsync, bytes).await;
            let _ = to_rsync.shutdown().await;
            copied
        };
        tokio::pin!(there);
        let mut is_listening = true;
        tokio::pin!(back);
        let carried = loop {
            tokio::select! {
                carried = &mut back => break carried,
                carried = &mut there, if is_listening => {
                    is_listening = false;
                    log_broken(&carried);
                }
            }
        };
        log_broken(&carried);
        Ok(carried.is_ok())
    }
}

/// What that means is rsync's to judge.
fn log_broken(carried: &io::Result<()>) {
    if let Err(error) = carried {
        tracing::debug!(%error, "files");
    }
}

fn judge(path: &Path, output: &Output) -> Result<(), FilesError> {
    match output.status.code() {
        Some(0) => Ok(()),
        Some(VANISHED) => {
            tracing::warn!(path = %path.display(), "a file vanished while it was read");
            Ok(())
        }
        _ => Err(FilesError::Rsync {
            path: path.to_owned(),
            status: output.status,
            error: first_line(&output.stderr),
        }),
    }
}

fn first_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().next().unwrap_or("it wrote nothing");
    line.chars().take(300).collect()
}

/// Counts as it goes, for rsync may end before the stream does.
async fn copy_counted(
    receive: &mut RecvStream,
    to: &mut (impl AsyncWrite + Unpin),
    bytes: &mut u64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Some(length) = receive.read(&mut buffer).await.map_err(io::Error::from)? {
        to.write_all(&buffer[..length]).await?;
        *bytes += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_directories_are_made() {
        for path in ["/", "relative", "/tmp/../etc"] {
            assert!(Files::new(&[path.into()], false).is_err(), "{path}");
        }
        let odd = std::os::unix::ffi::OsStringExt::from_vec(b"/srv/\xff".to_vec());
        assert!(Files::new(&[OsString::into(odd)], false).is_err());
        assert!(Files::new(&["/srv/tree".into()], false).is_ok());
    }

    #[test]
    fn what_lies_in_a_tree_is_brought_by_whatever_way_it_is_named() {
        let directory = TempDir::new().expect("a directory");
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).expect("made");
        std::os::unix::fs::symlink(&tree, directory.path().join("link")).expect("made");
        let files = Files::new(std::slice::from_ref(&tree), false).expect("plain");
        for inside in ["tree", "tree/not/there yet", "link", "link/not/there yet"] {
            assert!(files.bring(&directory.path().join(inside)), "{inside}");
        }
        for outside in ["", "tree2", "other/tree"] {
            assert!(!files.bring(&directory.path().join(outside)), "{outside}");
        }
    }
}
