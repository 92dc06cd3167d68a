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
mod data;
mod eval;
mod judge;
mod memory_chat;
mod models;
mod papers;
mod parity;
mod probe;
mod reading;
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
    let common = settings::Settings::load()?.apply(cli.common)?;
    if let Some(threads) = common.threads {
        longspan_kernels::pool::Pool::request_threads(threads);
    }
    let cores = || longspan_kernels::cpu::allowed_cpus().len();
    let threads = match &cli.command {
        Command::Reproduce(args) if args.jobs(&common) > 1 => 1,
        _ => common.threads.unwrap_or_else(cores),
    };
    // SAFETY: no thread was started yet.
    unsafe { longspan_kernels::cpu::bound_tensor_pools(threads) };
    match cli.command {
        Command::Pull { models } => models::pull(&models, &common),
        Command::Models => models::list(&common),
        Command::Info => models::info(&common),
        Command::Ask(args) => reading::ask(&args, &common),
        Command::Prepare(args) => reading::prepare(&args, &common),
        Command::Generate(args) => reading::generate(&args, &common),
        Command::Chat(args) => reading::chat(&args, &common),
        Command::Memory { what } => memory_chat::kept(&what, &common),
        Command::Search(args) => search::search(&args, &common),
        Command::Write(args) => write::write(&args, &common),
        Command::Summarize(args) => summarize::summarize(&args, &common),
        Command::Serve(args) => serve::serve(&args, &common),
        Command::Trace { what } => trace::run(&what, &common),
        Command::Bench { what } => bench::run(&what, &common),
        Command::Eval(args) => eval::eval(&args, &common),
        Command::Score(args) => scores::score(&args, &common),
        Command::Report(args) => scores::report(&args, &common),
        Command::Compare(args) => scores::compare(&args, &common),
        Command::Judge { what } => judge::run(&what, &common),
        Command::Data(args) => data::data(&args, &common),
        Command::Train(args) => train::train(&args, &common),
        Command::Runs { what } => train::runs(&what, &common),
        Command::Reproduce(args) => train::reproduce(&args, &common),
        Command::Papers { number } => papers::print(number, common.json),
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
