//! What people see while they wait: progress, numbers with units, a clean Ctrl-C.

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

static INTERRUPTS: AtomicUsize = AtomicUsize::new(0);

/// The person pressed Ctrl-C; the text says what was kept.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "interrupted: {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Counts Ctrl-C and SIGTERM: the first asks long work to stop cleanly, the second stops at once.
pub fn watch_interrupts() {
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTS.fetch_add(1, Ordering::SeqCst) > 0 {
            std::process::exit(130);
        }
    });
}

/// True once the person asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTS.load(Ordering::SeqCst) > 0
}

/// True if the error is a pipe whose reader has gone.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// A bar on standard error, hidden when that is no terminal or `quiet`.
pub fn bar(total: u64, unit: &str, quiet: bool) -> ProgressBar {
    let target = if quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = match unit {
        "bytes" => "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left".to_string(),
        _ => format!("{{msg}} {{bar:30}} {{human_pos}}/{{human_len}} {unit} {{rate}} {{eta}} left"),
    };
    if let Ok(style) = ProgressStyle::with_template(&template) {
        // The library's own rate has four decimals.
        let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = match state.per_sec() {
                rate if rate < 10.0 => write!(out, "{rate:.1}/s"),
                rate => write!(out, "{}/s", HumanCount(rate as u64)),
            };
        };
        bar.set_style(style.with_key("rate", rate));
    }
    bar
}

/// Writes to standard output at once.
pub fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// An answer that is printed as it is written; stops it on Ctrl-C and when nobody reads on.
pub struct Printed {
    quiet: bool,
    failure: Option<io::Error>,
}

impl Printed {
    /// Prints nothing if `quiet`.
    pub fn new(quiet: bool) -> Printed {
        Printed {
            quiet,
            failure: None,
        }
    }

    /// A piece of the answer.
    pub fn piece(&mut self, text: &str) -> ControlFlow<()> {
        if interrupted() {
            return ControlFlow::Break(());
        }
        if self.quiet {
            return ControlFlow::Continue(());
        }
        match write_out(text) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failure = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// Ends the answer's line.
    ///
    /// # Errors
    /// Standard output could not be written.
    pub fn finish(self) -> io::Result<()> {
        match self.failure {
            Some(error) => Err(error),
            None if self.quiet => Ok(()),
            None => write_out("\n"),
        }
    }
}

/// Reads the next line that a person typed; None at the end or after Ctrl-C.
///
/// # Errors
/// Standard input cannot be read.
pub fn next_line() -> io::Result<Option<String>> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        eprint!("> ");
    }
    let line = stdin.lines().next().transpose()?;
    Ok(line
        .filter(|_| !interrupted())
        .map(|line| line.trim().to_string()))
}

/// Bytes with a unit: "1.5 GB".
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// A count with separators: "1,234,567".
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or(""))
        .collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_carry_units_and_separators() {
        assert_eq!(super::bytes(999), "999 B");
        assert_eq!(super::bytes(1_500_000_000), "1.5 GB");
        assert_eq!(super::count(1_234_567), "1,234,567");
        assert_eq!(super::count(12), "12");
    }
}
