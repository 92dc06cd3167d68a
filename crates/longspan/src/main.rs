//! The `longspan` program: arguments in, progress and answers out; all else lives in the library
//! crates.

mod bench;
mod bench_attention;
mod bench_context;
mod bench_context_cell;
mod bench_context_page;
mod bench_decode;
mod bench_depth;
mod bench_dialogue;
mod bench_mixers;
mod bench_questions;
mod bench_rag;
mod bench_train;
mod bench_workflow;
mod chat_model;
mod cli;
#[cfg(feature = "cuda")]
mod cuda;
mod data;
mod eval;
mod judge;
mod memory_chat;
mod models;
mod options;
mod papers;
mod parity;
mod probe;
mod reading;
mod run_folder;
mod scores;
mod search;
mod serve;
mod settings;
mod summarize;
mod trace;
mod train;
mod ui;
mod workflow_ask;
mod write;

use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Candle's own pool spins for new work, on the cores that ours works on.
    const SPINS: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    if std::env::var_os(SPINS).is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(SPINS, "0") };
    }
    let cli = Cli::parse();
    ui::watch_interrupts();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref::<ui::Interrupted>().is_some() => {
            eprintln!("longspan: {error}");
            ExitCode::from(130)
        }
        Err(error) if error.downcast_ref::<eval::Exit>().is_some() => {
            eprintln!("longspan: {error}");
            ExitCode::from(
                error
                    .downcast_ref::<eval::Exit>()
                    .map_or(1, |exit| exit.code),
            )
        }
        // A reader that went away (`| head`) is no failure of ours.
        Err(error) if ui::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("longspan: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Err(message) = longspan_kernels::cpu::Level::forced() {
        anyhow::bail!(message);
    }
    let above = options::Above::load(cli.json)?;
    let with = |options: &options::RunOptions| above.with(options);
    match cli.command {
        Command::Pull { models } => models::pull(&models, &above.plain()),
        Command::Models => models::list(&above.plain()),
        Command::Info(model) => models::info(&above.with(&model)?),
        Command::Ask(it) => reading::ask(&it.args, &with(&it.options)?),
        Command::Prepare(it) => reading::prepare(&it.args, &with(&it.options)?),
        Command::Generate(it) => reading::generate(&it.args, &with(&it.options)?),
        Command::Chat(it) => reading::chat(&it.args, &with(&it.options)?),
        Command::Memory { what } => memory_chat::kept(&what, &above.plain()),
        Command::Search(it) => search::search(&it.args, &above.with(&it.options)?),
        Command::Write(it) => write::write(&it.args, &with(&it.options)?),
        Command::Summarize(it) => summarize::summarize(&it.args, &with(&it.options)?),
        Command::Serve(it) => serve::serve(&it.args, &with(&it.options)?),
        Command::Trace { what } => trace::run(&what, &above.plain()),
        Command::Bench { what } => bench::run(&what, &above),
        Command::Eval(it) => eval::eval(&it.args, &with(&it.options)?),
        Command::Score(args) => scores::score(&args, &above.plain()),
        Command::Report(args) => scores::report(&args, &above.plain()),
        Command::Compare(args) => scores::compare(&args, &above.plain()),
        Command::Judge { what } => judge::run(&what, &above),
        Command::Data(it) => data::data(&it.args, &above.with(&it.options)?),
        Command::Train(it) => train::train(&it.args, &above.with(&it.options)?),
        Command::Runs { what } => train::runs(&what, &above.plain()),
        Command::Reproduce(it) => {
            let one_each = |common: &options::Common| it.args.jobs(common) > 1;
            train::reproduce(&it.args, &above.with_jobs(&it.options, one_each)?)
        }
        Command::Papers { number } => papers::print(number, cli.json),
        Command::Completions { .. } if cli.json => {
            anyhow::bail!("completions: --json is not for scripts of a shell")
        }
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "longspan",
                &mut std::io::stdout(),
            );
            Ok(())
        }
    }
}
