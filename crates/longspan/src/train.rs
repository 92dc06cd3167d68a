//! `longspan train`, `longspan runs`, `longspan reproduce`: learning, what was learned, and papers' claims at small scale.

use crate::options::{Common, Numbers};
use crate::ui;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use longspan_train::comm::Comm;
use longspan_train::config::{self, TrainConfig};
use longspan_train::figure::{self, Curve};
use longspan_train::reproduce;
use longspan_train::run::{self, Event};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

#[derive(Args)]
pub struct Train {
    /// Model, data, optimiser and loop as TOML
    #[arg(value_name = "CONFIG.toml")]
    pub config: PathBuf,
    /// Folder of the run; default runs/NAME, by the configuration's file name
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
    /// Print every so many steps
    #[arg(long, default_value_t = 10, value_name = "STEPS")]
    pub print_every: u64,
    /// Types of weights, activations and products
    #[arg(long, value_enum, default_value_t)]
    pub numbers: Numbers,
}

#[derive(Subcommand)]
pub enum Runs {
    /// List the runs of a folder
    Ls {
        /// Folder of runs
        #[arg(default_value = "runs")]
        folder: PathBuf,
    },
    /// Print where a run is and how it went
    Show {
        /// Folder of the run
        run: PathBuf,
    },
    /// Draw the loss of one or several runs: SVG, or HTML if the file's name ends so
    #[command(after_help = "Example: longspan runs plot runs/a runs/b --out loss.html")]
    Plot {
        /// Folders of runs
        #[arg(required = true, value_name = "RUN")]
        runs: Vec<PathBuf>,
        /// The file to write
        #[arg(long, value_name = "FILE", default_value = "loss.svg")]
        out: PathBuf,
    },
}

#[derive(Args)]
pub struct Reproduce {
    /// longvq, lssl, mamba-360, nope, order-matters, pointer-networks, rnn-review, s4, stuffed-mamba, task-hinting, or a
    /// recipe file
    #[arg(value_name = "PAPER")]
    pub paper: String,
    /// Folder for the report and the figure
    #[arg(long, value_name = "FOLDER", default_value = "reproduced")]
    pub out: PathBuf,
    /// Seeds to run instead of the recipe's number
    #[arg(long, value_name = "N")]
    pub seeds: Option<u64>,
    /// Optimiser steps instead of the recipe's number: for a quick look, not for the claim
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Trainings that run side by side, each on one thread; default one for each thread of `--threads`. Finished ones are
    /// kept in the folder of `--out`, and the same command goes on with what is missing
    #[arg(long, value_name = "N")]
    pub jobs: Option<usize>,
}

impl Reproduce {
    /// Trainings side by side.
    pub fn jobs(&self, common: &Common) -> usize {
        let cores = || longspan_kernels::cpu::allowed_cpus().len();
        self.jobs.or(common.threads).unwrap_or_else(cores).max(1)
    }
}

/// The processes that `mpirun` started with this one.
#[cfg(feature = "mpi")]
fn processes() -> Result<Arc<dyn Comm>> {
    Ok(match longspan_train::comm::Mpi::join()? {
        Some(mpi) => Arc::new(mpi),
        None => Arc::new(longspan_train::comm::Alone),
    })
}

/// This process alone; under `mpirun` each process would train a model of its own into the same folder.
#[cfg(not(feature = "mpi"))]
fn processes() -> Result<Arc<dyn Comm>> {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some_and(|size| size != "1") {
        bail!("this build has no MPI; build with `cargo build --release --features mpi`");
    }
    Ok(Arc::new(longspan_train::comm::Alone))
}

/// Trains, or goes on training.
pub fn train(args: &Train, common: &Common) -> Result<()> {
    longspan_kernels::cpu::keep_freed_memory();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    let config = TrainConfig::parse(&text, &args.config)?;
    let name = args.config.file_stem().unwrap_or_default();
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(name));
    let bar = ui::bar(config.train.steps, "steps", common.json);
    let every = args.print_every.max(1);
    let place = crate::models::place(common, args.numbers)?;
    let processes = processes()?;
    let report = config::train_with(&config, &out, place, processes.clone(), &mut |event| {
        match event {
            Event::Step(step) => {
                bar.set_position(step.step);
                bar.set_message(format!("loss {:.4}", step.loss));
                let shown = step.step.is_multiple_of(every) || step.step == config.train.steps;
                if common.json && shown {
                    println!("{}", serde_json::to_string(event).unwrap_or_default());
                } else if shown {
                    let line = format!(
                        "step {:>7}  loss {:.4}  norm {:.3}{}  lr {:.2e}  {:.0} tokens/s  {} left{}",
                        step.step,
                        step.loss,
                        step.grad_norm,
                        if step.clipped { " (clipped)" } else { "" },
                        step.lr,
                        step.tokens_per_second,
                        duration(step.seconds_left),
                        if step.skipped {
                            "  NOT FINITE, skipped"
                        } else {
                            ""
                        },
                    );
                    bar.suspend(|| println!("{line}"));
                }
            }
            Event::Eval { step, values } => {
                let text = serde_json::to_string(event).unwrap_or_default();
                if common.json {
                    println!("{text}");
                } else {
                    let list: Vec<String> =
                        values.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                    bar.suspend(|| println!("step {step:>7}  {}", list.join("  ")));
                }
            }
        }
        !ui::interrupted()
    });
    let report = match report {
        Err(error) if processes.size() > 1 => {
            eprintln!("error: process {}: {error}", processes.rank());
            processes.abort(1)
        }
        report => report?,
    };
    bar.finish_and_clear();
    if processes.rank() > 0 {
        return Ok(());
    }
    if !report.finished {
        return Err(ui::Interrupted(format!(
            "{} holds a checkpoint of step {}; the same command goes on",
            out.display(),
            report.step
        ))
        .into());
    }
    if !common.json {
        println!(
            "{} parameters, {} steps, in {}",
            ui::count(report.parameters as u64),
            report.step,
            out.display()
        );
    }
    Ok(())
}

/// Lists, shows or draws runs.
pub fn runs(what: &Runs, common: &Common) -> Result<()> {
    match what {
        Runs::Ls { folder } => {
            let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
                .with_context(|| format!("cannot read {}", folder.display()))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.join("events.jsonl").is_file())
                .collect();
            found.sort();
            if found.is_empty() {
                bail!("{} holds no runs", folder.display());
            }
            found.iter().try_for_each(|path| show(path, common, false))
        }
        Runs::Show { run } => show(run, common, true),
        Runs::Plot { runs, out } => {
            let mut lines = Vec::new();
            for path in runs {
                let events = run::events(path)?;
                lines.push(Curve {
                    name: path
                        .file_name()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into(),
                    points: config::steps(&events)
                        .iter()
                        .map(|step| (step.step as f64, step.loss))
                        .collect(),
                });
            }
            let svg = figure::curves("training loss", "step", "loss", &lines, false);
            let text = if out.extension().is_some_and(|e| e == "html") {
                format!(
                    "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Runs</title>{svg}</html>\n"
                )
            } else {
                svg
            };
            run::write_whole(out, text.as_bytes())?;
            println!("{}", out.display());
            Ok(())
        }
    }
}

fn show(path: &Path, common: &Common, long: bool) -> Result<()> {
    let events = run::events(path)?;
    let steps = config::steps(&events);
    let last = steps.last();
    let saved = run::checkpoints(path)?;
    if common.json {
        let value = serde_json::json!({
            "run": path, "step": last.map(|s| s.step), "tokens": last.map(|s| s.tokens),
            "loss": last.map(|s| s.loss), "seconds": steps.iter().map(|s| s.seconds).sum::<f64>(), "checkpoints": saved,
        });
        println!("{value}");
        return Ok(());
    }
    let Some(last) = last else {
        println!("{}  no step yet", path.display());
        return Ok(());
    };
    println!(
        "{}  step {}  loss {:.4}  {} tokens  {}",
        path.display(),
        last.step,
        last.loss,
        ui::count(last.tokens),
        duration(steps.iter().map(|s| s.seconds).sum())
    );
    if long {
        let clipped = steps.iter().filter(|s| s.clipped).count();
        let skipped = steps.iter().filter(|s| s.skipped).count();
        println!("  first loss {:.4}", steps[0].loss);
        println!(
            "  {clipped} of {} steps clipped, {skipped} skipped",
            steps.len()
        );
        println!("  checkpoints: {}", saved.join(", "));
        for event in &events {
            if let Event::Eval { step, values } = event {
                println!("  step {step}: {}", serde_json::to_string(values)?);
            }
        }
    }
    Ok(())
}

/// Runs a recipe and says whether the claim held.
pub fn reproduce(args: &Reproduce, common: &Common) -> Result<()> {
    longspan_kernels::cpu::keep_freed_memory();
    let mut recipe = reproduce::recipe(&args.paper)?;
    if let Some(seeds) = args.seeds {
        recipe.seeds = seeds;
    }
    if let Some(steps) = args.steps {
        recipe.experiment.set_steps(steps);
    }
    let bar = ui::bar(1000, "thousandths", common.json);
    let start = Instant::now();
    let kept = args.out.join(format!("{}.cells.json", recipe.paper));
    let device = crate::models::device(common)?;
    let mut cells = reproduce::Cells::open(&kept)?
        .jobs(args.jobs(common))
        .device(&device);
    let report = reproduce::run_kept(&recipe, &mut cells, &mut |what, share| {
        bar.set_position((1000.0 * share) as u64);
        bar.set_message(what.to_string());
        !ui::interrupted()
    })?;
    bar.finish_and_clear();
    let Some(report) = report else {
        let kept = match kept.exists() {
            true => format!("the same command goes on from {}", kept.display()),
            false => "nothing was written".into(),
        };
        return Err(ui::Interrupted(kept).into());
    };
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make {}", args.out.display()))?;
    let (figure, json) = (
        args.out.join(format!("{}.svg", report.paper)),
        args.out.join(format!("{}.json", report.paper)),
    );
    run::write_whole(&figure, report.figure.as_bytes())?;
    run::write_whole(&json, serde_json::to_string_pretty(&report)?.as_bytes())?;
    if common.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!("claim:    {}", report.claim);
    println!("setting:  {}", report.setting);
    println!("measure:  {}", report.measure);
    println!("baseline: {}", report.baseline);
    println!();
    for row in &report.rows {
        let values: Vec<String> = row.values.iter().map(|v| format!("{v:.4}")).collect();
        println!(
            "  {:<14} {:>9} parameters  mean {:.4}  ({})  {:.0} s",
            row.name,
            ui::count(row.parameters as u64),
            row.mean(),
            values.join(", "),
            row.seconds
        );
    }
    println!();
    println!("required: {}", report.required);
    println!("found:    {}", report.verdict);
    println!(
        "verdict:  {}",
        if report.holds {
            "holds"
        } else {
            "DOES NOT HOLD here"
        }
    );
    println!(
        "figure:   {}   ({:.0} s in all)",
        figure.display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Seconds as "1 h 05 min", "3 min 20 s", "12 s".
fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations_have_units() {
        assert_eq!(super::duration(12.4), "12 s");
        assert_eq!(super::duration(200.0), "3 min 20 s");
        assert_eq!(super::duration(3900.0), "1 h 05 min");
    }
}
