//! Makes directories here equal to the source's by `rsync`, whose other end runs on the source; its protocol travels in
//! a stream of the bulk connection.
//!
//! rsync starts a program to reach the other host: this very program, in another role ([`run_if_called`]), which hands
//! what it is given to us by a local socket.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::thread;

use common::proto::ProtoError;
use common::proto::files::{Changes, FilesRequest, MappedFiles};
use common::proto::stream;
use quinn::{Connection, RecvStream, SendStream};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::process::Command;

/// Names the socket of the waiting `lazy-restorer`; set for rsync and inherited by what it starts.
const SOCKET_VARIABLE: &str = "POSTCOPY_FILES_SOCKET";
/// What rsync calls the other host, and hands on as the first argument.
const HOST: &str = "source";
/// A file vanished on the source while it was read.
const VANISHED: i32 = 24;
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
    #[error("--sync {0}: give the absolute path of a directory below /, without `..`")]
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

/// Directories to make equal.
#[derive(Clone, Debug, Default)]
pub struct Files {
    paths: Vec<PathBuf>,
}

impl Files {
    /// Whether nothing comes along.
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The directories at `paths`.
    pub fn new(paths: &[PathBuf]) -> Result<Self, FilesError> {
        for path in paths {
            let plain = path.components().all(|part| {
                matches!(
                    part,
                    std::path::Component::RootDir | std::path::Component::Normal(_)
                )
            });
            if !plain || !path.is_absolute() || path.parent().is_none() {
                return Err(FilesError::Path(path.clone()));
            }
        }
        Ok(Files {
            paths: paths.to_vec(),
        })
    }

    /// Makes all of them equal to the source's.
    pub async fn pass(&self, bulk: &Connection, pass: Pass) -> Result<(), FilesError> {
        for path in &self.paths {
            fs::create_dir_all(path)?;
            match pass {
                Pass::First => rsync(bulk, path, &["--delete".into()]).await?,
                Pass::Last => {
                    let changes = changes(bulk, path).await;
                    // These first: then their times are equal, and the rest does not look at them again.
                    compare_whole(bulk, path).await?;
                    bring_changes(bulk, path, changes).await?;
                }
            }
        }
        Ok(())
    }
}

/// Compares what changed since the first pass, so that the freeze does not grow with the number of all files.
async fn bring_changes(
    bulk: &Connection,
    path: &Path,
    changes: Changes,
) -> Result<(), FilesError> {
    match changes {
        Changes::Everything => rsync(bulk, path, &["--delete".into()]).await,
        Changes::Only(paths) if paths.is_empty() => Ok(()),
        Changes::Only(paths) => {
            let list = PathList::write(&paths)?;
            let [from0, from] = list.options();
            rsync(bulk, path, &["--delete".into(), from0, from]).await
        }
    }
}

/// A source that cannot say what changed has everything compared.
async fn changes(bulk: &Connection, path: &Path) -> Changes {
    let path = path.display().to_string();
    let asked = async {
        let (mut send, mut receive) = bulk.open_bi().await.map_err(io::Error::from)?;
        stream::send(&mut send, &FilesRequest::Changed { path }).await?;
        stream::receive(&mut receive).await
    };
    let answer: Result<Changes, ProtoError> = asked.await;
    answer.unwrap_or_else(|error| {
        tracing::debug!(%error, "all files are compared");
        Changes::Everything
    })
}

/// A list of paths for rsync.
struct PathList(tempfile::NamedTempFile);

impl PathList {
    fn write(paths: &[impl AsRef<[u8]>]) -> io::Result<Self> {
        let mut list = tempfile::NamedTempFile::new()?;
        let mut bytes = Vec::new();
        for path in paths {
            bytes.extend(path.as_ref());
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

/// Compares files whose times do not tell whether they are equal: what is stored through a mapping changes the time of a
/// file only now and then.
async fn compare_whole(bulk: &Connection, path: &Path) -> Result<(), FilesError> {
    let (mut send, mut receive) = bulk.open_bi().await?;
    let wrong = |error| FilesError::Source {
        path: path.to_owned(),
        error,
    };
    let request = FilesRequest::Mapped {
        path: path.display().to_string(),
    };
    stream::send(&mut send, &request).await.map_err(wrong)?;
    let MappedFiles(whole) = stream::receive(&mut receive).await.map_err(wrong)?;
    if whole.is_empty() {
        return Ok(());
    }
    let list = PathList::write(&whole)?;
    let [from0, from] = list.options();
    // Where there is a directory here, a file may be there now.
    let options = ["--ignore-times", "--force"].map(OsString::from);
    rsync(bulk, path, &[&options[..], &[from0, from]].concat()).await
}

async fn rsync(bulk: &Connection, path: &Path, more: &[OsString]) -> Result<(), FilesError> {
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
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let carried = carry(listener, bulk, path);
    let output = child.wait_with_output();
    tokio::pin!(output);
    let output = tokio::select! {
        // The end of the stream is rsync's to judge.
        Err(error) = carried => return Err(error),
        output = &mut output => output?,
    };
    match output.status.code() {
        Some(0) => Ok(()),
        Some(VANISHED) => {
            tracing::warn!(path = %path.display(), "a file vanished while it was read");
            Ok(())
        }
        _ => Err(FilesError::Rsync {
            path: path.to_owned(),
            status: output.status,
            error: String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or("it wrote nothing")
                .chars()
                .take(300)
                .collect(),
        }),
    }
}

/// Carries rsync's protocol between its program and a stream of ours.
async fn carry(listener: UnixListener, bulk: &Connection, path: &Path) -> Result<(), FilesError> {
    let (local, _) = listener.accept().await?;
    let (mut from_rsync, mut to_rsync) = local.into_split();
    let arguments: Vec<String> =
        stream::receive(&mut from_rsync)
            .await
            .map_err(|error| FilesError::Source {
                path: path.to_owned(),
                error,
            })?;
    let (mut send, mut receive): (SendStream, RecvStream) = bulk.open_bi().await?;
    let request = FilesRequest::Rsync {
        path: path.display().to_string(),
        arguments,
    };
    let sent = stream::send(&mut send, &request).await;
    sent.map_err(|error| FilesError::Source {
        path: path.to_owned(),
        error,
    })?;
    let there = async {
        let copied = tokio::io::copy(&mut from_rsync, &mut send).await;
        // A source that has sent everything does not listen any more.
        let _ = send.shutdown().await;
        copied
    };
    let back = async {
        let copied = tokio::io::copy(&mut receive, &mut to_rsync).await;
        let _ = to_rsync.shutdown().await;
        copied
    };
    let (there, back) = tokio::join!(there, back);
    if let Err(error) = there.and(back) {
        tracing::debug!(%error, "files");
    }
    std::future::pending().await
}

/// Runs as rsync's way to the other host when called as it.
pub fn run_if_called() -> Option<ExitCode> {
    let socket = env::var_os(SOCKET_VARIABLE)?;
    Some(match hand_over(Path::new(&socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn hand_over(socket: &Path) -> io::Result<()> {
    // Ourselves, the host, and `rsync` come before what the other end needs.
    let arguments: Vec<String> = env::args().skip(3).collect();
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(&frame(&arguments)?)?;
    let mut to_source = stream.try_clone()?;
    let there = thread::spawn(move || {
        let copied = copy(&mut io::stdin(), &mut to_source);
        // What does not arrive shows at the other end of the pipe.
        let _ = to_source.shutdown(Shutdown::Write);
        copied
    });
    copy(&mut stream, &mut io::stdout())?;
    drop(there);
    Ok(())
}

/// The arguments in the format that `stream::receive` takes.
fn frame(arguments: &Vec<String>) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime
        .block_on(stream::send(&mut frame, arguments))
        .map_err(|error| io::Error::other(error.to_string()))?;
    Ok(frame)
}

/// Copies at once what comes: rsync waits for answers.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length])?;
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_arrive_as_they_are() {
        let arguments = vec![String::from("--server"), String::from("/a b/")];
        let frame = frame(&arguments).expect("framed");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let received: Vec<String> = runtime
            .block_on(stream::receive(&mut &frame[..]))
            .expect("received");
        assert_eq!(received, arguments);
    }

    #[test]
    fn only_plain_directories_are_made() {
        for path in ["/", "relative", "/tmp/../etc"] {
            assert!(Files::new(&[path.into()]).is_err(), "{path}");
        }
        assert!(Files::new(&["/srv/tree".into()]).is_ok());
    }
}
