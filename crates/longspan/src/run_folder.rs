//! Running jobs into a folder that `longspan report` and `longspan compare` read: what `eval` and `bench workflow` share.

use crate::ui;
use clap::Args;
use longspan_eval::Result;
use longspan_eval::cell::{Cell, RunConfig, RunFolder};
use longspan_eval::registry::Registry;
use longspan_eval::report::{self, Report};
use longspan_eval::run::{self, Job, Observer, Outcome, RunOptions};
use longspan_eval::task::Task;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Args)]
pub struct RunFolderArgs {
    /// Decides all random choices
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Folder of the run; the same command with the same folder goes on where it stopped
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
    /// Stop after this time; the run can go on later
    #[arg(long, value_name = "MINUTES")]
    pub max_minutes: Option<f64>,
}

/// Where a run goes, and when it began.
pub struct Place {
    pub path: PathBuf,
    created: u64,
    limit: Option<Duration>,
}

impl RunFolderArgs {
    /// The folder named, else one of this name and the time.
    pub fn place(&self, name: &str) -> Place {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let path = self.out.clone().unwrap_or_else(|| {
            let name = name.replace('/', "_");
            Path::new("runs").join(format!("{}-{name}", report::stamp(created)))
        });
        Place {
            path,
            created,
            limit: self
                .max_minutes
                .map(|minutes| Duration::from_secs_f64(minutes.max(0.0) * 60.0)),
        }
    }
}

/// What a run's head says beside its cells.
pub struct Head {
    /// What counted tokens.
    pub tokenizer: String,
    /// All that decides the outputs of each target.
    pub targets: Vec<String>,
    /// Options in words.
    pub options: Vec<(String, String)>,
}

/// Shows progress, notices Ctrl-C.
struct Bar(indicatif::ProgressBar);

impl Observer for Bar {
    fn start(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
        // What earlier runs did says nothing about this one's speed.
        self.0.reset_eta();
    }

    fn progress(&self, done: u64, _total: u64, cell: &Cell) {
        self.0.set_position(done);
        self.0.set_message(format!("{} {}", cell.task, cell.policy));
    }

    fn cancelled(&self) -> bool {
        ui::interrupted()
    }
}

/// A run as it ended: its folder, its report (written there), and whether all is done.
pub struct Done {
    pub folder: RunFolder,
    pub report: Report,
    pub outcome: Result<Outcome>,
}

impl Place {
    /// Runs the jobs and reports on what is there, also where the run was stopped.
    pub fn run(
        &self,
        jobs: &[Job],
        head: Head,
        (registry, tasks): (&Registry, &[Arc<dyn Task>]),
        options: RunOptions<'_>,
        (unit, json): (&str, bool),
    ) -> Result<Done> {
        let config = RunConfig {
            harness: env!("CARGO_PKG_VERSION").into(),
            compat: "official".into(),
            cells: jobs
                .iter()
                .map(|job| (job.cell.clone(), job.samples.len()))
                .collect(),
            tokenizer: head.tokenizer,
            targets: head.targets,
            options: head.options,
            created: self.created,
        };
        let folder = RunFolder::create(&self.path, &config)?;
        registry.keep(&folder, tasks)?;
        let bar = ui::bar(0, unit, json);
        let options = RunOptions {
            limit: self.limit,
            ..options
        };
        let outcome = run::run(&folder, jobs, &options, &Bar(bar.clone()));
        bar.finish_and_clear();
        let report = Report::build(std::slice::from_ref(&folder), registry, true)?;
        report.write(folder.path())?;
        Ok(Done {
            folder,
            report,
            outcome,
        })
    }

    /// Says how to go on with a run that its time limit ended.
    pub fn say_left(&self, outcome: Outcome) {
        if outcome.out_of_time {
            eprintln!(
                "longspan: {} of {} samples are done; the same command with --out {} goes on",
                outcome.done,
                outcome.total,
                self.path.display()
            );
        }
    }
}
