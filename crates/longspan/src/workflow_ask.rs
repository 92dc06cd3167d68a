//! `longspan ask --workflow`: answers that take many calls of a model.

use crate::chat_model::{self, ChatModelArgs, Shown, call, explain};
use crate::cli::Ask;
use crate::options::Common;
use crate::reading::{join, read_documents};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use longspan_agents::chat::model::{ChatModel, Request};
use longspan_agents::rag::{self, RagConfig, Retriever};
use longspan_agents::workflow::baselines::{self, Baseline, direct_prompt};
use longspan_agents::workflow::chain::{Chain, ChainConfig, Paths, ReadOrder, Select, Task};
use longspan_agents::workflow::xl3m::{self, Xl3mConfig};
use longspan_agents::workflow::{Observer, Took};
use longspan_data::document::Document;
use serde_json::{Value, json};
use std::ops::ControlFlow;

/// How the answer is worked out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workflow {
    /// One call where the text fits the window, chain up to 16 windows, rag beyond
    Auto,
    /// Chain of Agents: workers read chunks in order and hand on notes
    Chain,
    /// The best passages by word search
    Rag,
    /// XL3M: the passages after which the model is surest
    Xl3m,
    /// The text with its middle left out
    FullContext,
    /// Every chunk asked alone, then a vote
    Merge,
    /// Every chunk noted alone, then one answer
    Hierarchical,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TaskArg {
    Qa,
    Summary,
    Code,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SelectArg {
    Vote,
    Judge,
}

#[derive(Args, Clone)]
pub struct WorkflowArgs {
    /// Work the answer out in several calls of a chat model
    #[arg(
        long,
        value_enum,
        conflicts_with = "session",
        help_heading = "Workflow"
    )]
    pub workflow: Option<Workflow>,
    /// chain: tokens of a worker's prompt and reply, at most the model's window
    #[arg(
        long,
        default_value_t = 8192,
        value_name = "TOKENS",
        help_heading = "Workflow"
    )]
    pub window: usize,
    /// chain: what is wanted
    #[arg(long, value_enum, default_value = "qa", help_heading = "Workflow")]
    pub task: TaskArg,
    /// chain: order of reading: ltr, rtl, perm:SEED
    #[arg(
        long,
        default_value = "ltr",
        value_name = "ORDER",
        help_heading = "Workflow"
    )]
    pub order: ReadOrder,
    /// chain: several chains: one, bidir, self:N, perm:N
    #[arg(
        long,
        default_value = "one",
        value_name = "PATHS",
        help_heading = "Workflow"
    )]
    pub paths: Paths,
    /// chain: choice among several
    #[arg(long, value_enum, default_value = "vote", help_heading = "Workflow")]
    pub select: SelectArg,
    /// xl3m: tokens of a passage
    #[arg(
        long,
        default_value_t = 512,
        value_name = "TOKENS",
        help_heading = "Workflow"
    )]
    pub segment: usize,
    /// xl3m: most passages kept
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = "Workflow")]
    pub keep: usize,
    /// xl3m: the answer's given start, so that the next token is the first that matters
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        help_heading = "Workflow"
    )]
    pub answer_prefix: String,
    #[command(flatten)]
    pub chat_model: ChatModelArgs,
}

/// `longspan ask --workflow` or `--endpoint`
pub fn ask(args: &Ask, common: &Common) -> Result<()> {
    let options = &args.workflow;
    let (question, files) = args
        .words
        .split_last()
        .expect("clap asks for one word at least");
    if files.is_empty() {
        bail!(
            "expected FILE... QUESTION, found only {question:?}; name a file (or - for standard input) before the question"
        );
    }
    if args.sampling.decode != "plain" || args.sampling.temperature != 0.0 {
        bail!("--workflow answers greedily; take away --decode and --temperature");
    }
    let documents = read_documents(files, &args.reading)?;
    let text = join(&documents);
    let model = chat_model::open(&options.chat_model, common)?;
    let window = model
        .card()
        .window
        .map_or(options.window, |own| own.min(options.window));
    let max_tokens = args.sampling.max_tokens.or(common.max_tokens);
    if max_tokens == Some(0) {
        bail!("--max-tokens is 0, expected at least 1");
    }
    let workflow = match options.workflow.unwrap_or(Workflow::Auto) {
        Workflow::Auto => {
            let request = Request::user(direct_prompt(Task::Qa, "", &text, question));
            let tokens = model.count(&request.input)?.planned() + max_tokens.unwrap_or(256);
            let own = model.card().window.unwrap_or(usize::MAX);
            match tokens {
                tokens if tokens <= own => Workflow::FullContext,
                tokens if tokens <= 16 * window => Workflow::Chain,
                _ => Workflow::Rag,
            }
        }
        asked => asked,
    };
    let run = Run {
        model: &*model,
        text: &text,
        documents: &documents,
        question,
        options,
        max_tokens,
        // One call sees the model's whole window; --window is about chunks.
        window: match workflow {
            Workflow::FullContext => model.card().window.unwrap_or(usize::MAX),
            _ => window,
        },
    };
    let mut shown = Shown::new(common.json);
    if !common.json {
        shown.note(&format!("workflow: {}", name(workflow)));
    }
    let result = run.run(workflow, &mut shown);
    let (answer, took, detail) = match result {
        Ok(found) => found,
        Err(error) => {
            shown.finish("")?;
            return Err(error);
        }
    };
    shown.finish(&answer)?;
    if common.json {
        let value = json!({
            "answer": answer, "workflow": name(workflow), "model": model.card().name,
            "calls": took.calls, "prompt_tokens": took.usage.prompt, "reused_tokens": took.usage.cached,
            "completion_tokens": took.usage.completion, "tokens_exact": took.usage.exact,
            "seconds": took.seconds, "detail": detail,
        });
        println!("{value}");
    } else {
        eprintln!("{}", spent(&took));
    }
    Ok(())
}

/// What a workflow took, for people.
pub fn spent(took: &Took) -> String {
    let about = if took.usage.exact { "" } else { "about " };
    format!(
        "{} calls, {about}{} tokens read ({} of them reused), {about}{} written, {:.1} s",
        took.calls,
        crate::ui::count(took.usage.prompt as u64),
        crate::ui::count(took.usage.cached as u64),
        crate::ui::count(took.usage.completion as u64),
        took.seconds
    )
}

fn name(workflow: Workflow) -> String {
    workflow
        .to_possible_value()
        .map_or(String::new(), |value| value.get_name().into())
}

struct Run<'a> {
    model: &'a dyn ChatModel,
    text: &'a str,
    documents: &'a [Document],
    question: &'a str,
    options: &'a WorkflowArgs,
    max_tokens: Option<usize>,
    window: usize,
}

impl Run<'_> {
    fn chain_config(&self) -> ChainConfig {
        let options = self.options;
        ChainConfig {
            task: match options.task {
                TaskArg::Qa => Task::Qa,
                TaskArg::Summary => Task::Summary,
                TaskArg::Code => Task::Code,
            },
            window: self.window,
            // The paper's 1024 are an eighth of its window.
            max_output: self.max_tokens.unwrap_or((self.window / 8).clamp(16, 1024)),
            order: options.order,
            paths: options.paths,
            select: match options.select {
                SelectArg::Vote => Select::Vote,
                SelectArg::Judge => Select::Judge,
            },
            ..ChainConfig::default()
        }
    }

    fn run(&self, workflow: Workflow, shown: &mut Shown) -> Result<(String, Took, Value)> {
        let call = call();
        let baseline = |baseline: Baseline, shown: &mut Shown| -> Result<(String, Took, Value)> {
            let config = self.chain_config();
            let found = baselines::run(
                baseline,
                self.model,
                &config,
                self.text,
                self.question,
                &call,
                shown,
            )
            .map_err(explain)?;
            if found.truncated {
                shown.note("the text was too long: part of it was left out");
            }
            let detail = json!({ "parts": found.parts, "truncated": found.truncated });
            Ok((found.answer, found.took, detail))
        };
        match workflow {
            Workflow::Auto | Workflow::FullContext => baseline(Baseline::FullContext, shown),
            Workflow::Merge => baseline(Baseline::Merge, shown),
            Workflow::Hierarchical => baseline(Baseline::Hierarchical, shown),
            Workflow::Chain => {
                let chain = Chain::new(self.model, self.chain_config());
                let found = chain
                    .run(self.text, self.question, &call, shown)
                    .map_err(explain)?;
                let detail = json!({ "chunks": found.chunks, "paths": found.paths, "chosen": found.chosen, "events": found.events });
                Ok((found.answer, found.took, detail))
            }
            Workflow::Xl3m => {
                let config = Xl3mConfig {
                    segment: self.options.segment,
                    keep: self.options.keep,
                    answer_prefix: self.options.answer_prefix.clone(),
                    max_tokens: self.max_tokens.unwrap_or(256),
                    ..Xl3mConfig::default()
                };
                let found = xl3m::run(self.model, self.text, self.question, &config, &call, shown)
                    .map_err(explain)?;
                for passage in found.passages.iter().filter(|passage| passage.kept) {
                    shown.note(&format!(
                        "kept bytes {} to {}: entropy {:.3} nats{}",
                        passage.start,
                        passage.end,
                        passage.entropy,
                        if found.approx { ", approximate" } else { "" }
                    ));
                }
                let detail = json!({ "passages": found.passages, "approx": found.approx });
                Ok((found.answer, found.took, detail))
            }
            Workflow::Rag => {
                let config = RagConfig {
                    retriever: Retriever::Bm25,
                    max_tokens: self.max_tokens.unwrap_or(256),
                    window: Some(self.window),
                    ..RagConfig::default()
                };
                shown.step("answering", 0, 1);
                let mut text = |piece: &str| {
                    shown.text(piece);
                    ControlFlow::Continue(())
                };
                let found = rag::answer(
                    self.model,
                    self.documents,
                    self.question,
                    &config,
                    None,
                    &call,
                    &mut text,
                );
                let found = match found {
                    Err(rag::RagError::Chat(error)) => return Err(explain(error)),
                    found => found?,
                };
                let passages: Vec<Value> = found.hits[..found.order.len()]
                    .iter()
                    .map(|hit| json!({ "title": hit.title, "text": hit.text }))
                    .collect();
                let took = Took {
                    calls: 1,
                    usage: found.reply.usage,
                    seconds: found.reply.total_s,
                };
                Ok((
                    found.reply.text.trim().to_string(),
                    took,
                    json!({ "passages": passages }),
                ))
            }
        }
    }
}
