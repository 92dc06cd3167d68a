//! Every command and option, with its help.

use crate::options::{
    EmbedOptions, KeysOptions, LoadOptions, ModelOption, RunOptions, TrainOptions, With,
};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Models that read, remember and write sequences far longer than they were trained for.
#[derive(Parser)]
#[command(name = "longspan", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// Print one JSON object (or one a line) instead of text
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "Examples:
  longspan ask book.txt \"Who is the narrator?\"
  longspan ask src/ README.md \"Where is the cache invalidated?\"
  longspan ask --context infllm:n_local=2048,topk=16 book.pdf \"What happens at the end?\"
  longspan prepare book.epub --session book.session
  longspan ask --session book.session \"And who is his brother?\"
  longspan generate \"Once upon a time\" --max-tokens 100
  longspan bench speed --prefill 512,4096 --decode 0,8192

Settings may stand in ~/.config/longspan/config.toml (see `longspan ask --help`).
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.";

#[derive(Subcommand)]
pub enum Command {
    /// Download models by alias, verified and resumable
    #[command(after_help = "Example: longspan pull smollm2-135m")]
    Pull {
        /// Aliases as `longspan models` prints them; none = the default model
        models: Vec<String>,
    },
    /// List the models known by alias
    Models,
    /// Describe a model: architecture, window, bytes
    #[command(after_help = "Example: longspan info --model path/to/model.gguf")]
    Info(ModelOption),
    /// Ask a question about documents of any length
    #[command(after_help = "Examples:
  longspan ask book.txt \"Who is the narrator?\"
  cat notes.md | longspan ask - \"What is still open?\"
  longspan ask --session book.session \"And his brother?\"

Formats: txt, md, html, pdf, epub, source trees (a folder), - for standard input.
A text that fits the model's window is read whole; a longer one under InfLLM. --context overrides.
A long reading that is interrupted goes on where it stopped when the same command is run again.

In several calls, by a local model or a server:
  longspan ask book.txt \"Who is the narrator?\" --workflow chain --window 4096 --trace calls.jsonl
  longspan ask book.txt \"Who is the narrator?\" --endpoint http://localhost:8000/v1 --workflow rag

Settings file (~/.config/longspan/config.toml):
  model = \"smollm2-135m\"
  threads = 4
  context = \"infllm:n_local=2048\"
  kv = \"bf16\"
  max_tokens = 300")]
    Ask(With<RunOptions, Ask>),
    /// Read documents once and save the session for many questions
    #[command(after_help = "Example: longspan prepare book.txt --session book.session")]
    Prepare(With<RunOptions, Prepare>),
    /// Continue a text
    #[command(after_help = "Examples:
  longspan generate \"Once upon a time\" --temperature 0.8 --seed 7
  longspan generate \"A title for a story about rain:\" --decode dbs:groups=4,n=4 --max-tokens 12
  longspan generate \"The capital of France is\" --decode tree:budget=32 --pairs pairs.jsonl")]
    Generate(With<RunOptions, Generate>),
    /// Talk with a model, line by line
    #[command(after_help = "Examples:
  longspan chat --model qwen2.5-coder-0.5b --context sinks
  longspan chat --model qwen2.5-coder-0.5b --memory scm --memory-file friend.sqlite
  longspan chat --endpoint http://localhost:8080/v1 --memory scm")]
    Chat(With<RunOptions, Chat>),
    /// Look into the memory of a talk (`chat --memory scm`)
    Memory {
        #[command(subcommand)]
        what: crate::memory_chat::Kept,
    },
    /// Find passages in a folder by words and by meaning
    #[command(after_help = "Examples:
  longspan search notes/ \"how was the cache invalidated\"
  longspan search src/ parseConfig --retriever bm25 -k 5
  longspan search books/ \"who betrays the king\" --json

Reads txt, md, html, pdf, epub and source trees, without what git ignores. The index is kept in the user's
cache folder; later searches read only what is new or changed. A build that is stopped goes on.")]
    Search(With<EmbedOptions, crate::search::Search>),
    /// Write a long text: a plan first, then paragraph by paragraph
    #[command(after_help = "Examples:
  longspan write \"A history of the lighthouse, for children\" --words 5000 --out lighthouse.txt
  longspan write \"A manual for beekeepers\" --words 8000 --endpoint http://localhost:8000/v1

With --out, a run that was stopped goes on when the same command is run again.")]
    Write(With<RunOptions, crate::write::Write>),
    /// Summarise documents or a meeting of any length
    #[command(after_help = "Examples:
  longspan summarize book.txt
  longspan summarize meeting.json --out tree.json
  longspan summarize book.epub --cache replies.sqlite

With --cache, a run that was stopped goes on when the same command is run again.")]
    Summarize(With<RunOptions, crate::summarize::Summarize>),
    /// Serve a model over HTTP: OpenAI-compatible, with documents read once, and a page to try it
    #[command(after_help = "Examples:
  longspan serve --model qwen2.5-coder-0.5b
  longspan serve --listen 0.0.0.0:8080 --key-file key.txt --documents kept/
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

The page is at /, the description for programs at /openapi.json, counters at /metrics. See docs/serve.md.")]
    Serve(With<RunOptions, crate::serve::Serve>),
    /// Look into the calls of a workflow
    Trace {
        #[command(subcommand)]
        what: crate::trace::Trace,
    },
    /// Measure speed and fidelity on this machine
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Run benchmarks on a model, several policies, or an endpoint
    #[command(after_help = "Examples:
  longspan eval list
  longspan eval ruler --sample --target oracle
  longspan eval needle/shared passkey --lengths 1k,2k --depths 10 --policy full --policy window:512
  longspan eval ruler/vt --lengths 4k --samples 20 --out runs/vt
  longspan eval threading/single --endpoint http://localhost:8000/v1 --model NAME

Every answer is stored in the run's folder; a run that was stopped goes on with the same --out.
Exit codes: 0 done, 1 failed, 2 bad input, 3 the endpoint does not answer, 130 interrupted.")]
    Eval(With<RunOptions, crate::eval::Eval>),
    /// Score stored answers, without a model
    #[command(after_help = "Examples:
  longspan score runs/vt
  longspan score ruler --pred FOLDER")]
    Score(crate::scores::Score),
    /// Write the report of one or several runs: HTML, Markdown, JSON
    #[command(
        after_help = "Example: longspan report runs/a runs/b --out report --gate limits.toml"
    )]
    Report(crate::scores::ReportArgs),
    /// Have stored answers judged by a model: safety, pairs of answers, quality of long texts
    #[command(after_help = "Examples:
  longspan judge safety runs/safety --data LongSafety --endpoint http://localhost:8000/v1 --endpoint-model NAME
  longspan judge pairs runs/leval runs/baseline --model qwen2.5-coder-0.5b
  longspan judge quality runs/write --script replies.jsonl

Replies are kept beside the answers; the same command goes on where it stopped.")]
    Judge {
        #[command(subcommand)]
        what: crate::judge::Judge,
    },
    /// Write a benchmark's samples as JSON lines, for other programs
    #[command(after_help = "Examples:
  longspan data ruler --lengths 4k,8k --samples 500 --model qwen2.5-coder-0.5b --out ruler
  longspan data threading/single lines --out data
  longspan data m4le --pool texts.jsonl --kind explicit-single --lengths 1000,2000 --out m4le")]
    Data(With<ModelOption, crate::data::Data>),
    /// Compare two runs, or the policies of one, on the same samples
    #[command(after_help = "Example: longspan compare runs/a runs/b --max-drop 0.02")]
    Compare(crate::scores::Compare),
    /// Train a model from a configuration; a run that was stopped goes on
    #[command(after_help = "Examples:
  longspan train examples/train-sort.toml
  longspan train examples/train-sort.toml --out runs/sort

Checkpoints, events and the resolved configuration stand in the run's folder. Whatever stopped a run, the same command
goes on from its newest checkpoint, bit for bit as if it had not stopped.")]
    Train(With<TrainOptions, crate::train::Train>),
    /// List, show and draw training runs
    Runs {
        #[command(subcommand)]
        what: crate::train::Runs,
    },
    /// Test a paper's core claim at small scale: settings, values, verdict, figure
    #[command(after_help = "Examples:
  longspan reproduce s4
  longspan reproduce nope --seeds 1 --out reproduced")]
    Reproduce(With<TrainOptions, crate::train::Reproduce>),
    /// List the papers that Longspan implements
    Papers {
        /// Print the page of this paper
        number: Option<u32>,
    },
    /// Print shell completions
    #[command(after_help = "Example: longspan completions bash > /etc/bash_completion.d/longspan")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// How the answer is decoded.
#[derive(Args, Clone, Default)]
pub struct Sampling {
    /// plain (the options below), greedy, sample:temperature=..,top_p=.., lookahead:decoding_length=..,
    /// branch_length=.., beam:beams=.., dbs:groups=..,lambda=..,term=.., tree:mode=..,budget=..
    #[arg(long, default_value = "plain", value_name = "STRATEGY")]
    pub decode: String,
    /// Append the better and the worse answer to this file, one JSON object a line (tree only)
    #[arg(long, value_name = "FILE")]
    pub pairs: Option<PathBuf>,
    /// Most tokens to write
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// 0 = always the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw from the K likeliest tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the likeliest
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    pub min_p: f32,
    /// Above 1: seen tokens become less likely
    #[arg(long, default_value_t = 1.0, value_name = "R")]
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of seen tokens
    #[arg(
        long,
        default_value_t = 0.0,
        allow_hyphen_values = true,
        value_name = "X"
    )]
    pub presence_penalty: f32,
    /// Subtracted from logits per time a token was seen
    #[arg(
        long,
        default_value_t = 0.0,
        allow_hyphen_values = true,
        value_name = "X"
    )]
    pub frequency_penalty: f32,
    /// Same seed, same draw
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Added to a token's logit; may be repeated
    #[arg(long, value_name = "TOKEN=X", value_parser = parse_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// End the answer at this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// With --json: log-probabilities of the chosen and of this many likeliest tokens
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(token, bias)| Some((token.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| format!("{text:?} is not TOKEN=X, for instance 42=-3.5"))
}

#[derive(Args)]
pub struct Ask {
    /// Documents, then the question; with --session the question only
    #[arg(required = true, value_name = "FILE... QUESTION")]
    pub words: Vec<String>,
    /// Ask about what `longspan prepare` read
    #[arg(long, value_name = "FOLDER")]
    pub session: Option<PathBuf>,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub workflow: crate::workflow_ask::WorkflowArgs,
}

#[derive(Args, Clone)]
pub struct Reading {
    /// Refuse documents larger than this (bytes)
    #[arg(long, default_value_t = 1 << 30, value_name = "BYTES")]
    pub max_bytes: u64,
    /// Texts of more tokens than this keep cold keys and values on disk and can be resumed
    #[arg(long, default_value_t = 65_536, value_name = "TOKENS")]
    pub disk_above: usize,
}

#[derive(Args)]
pub struct Prepare {
    /// Documents
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<String>,
    /// Folder to save the session in
    #[arg(long, value_name = "FOLDER")]
    pub session: PathBuf,
    #[command(flatten)]
    pub reading: Reading,
}

#[derive(Args)]
pub struct Generate {
    /// The text to continue; - reads standard input
    pub prompt: String,
    #[command(flatten)]
    pub sampling: Sampling,
}

#[derive(Args)]
pub struct Chat {
    /// Instructions that stand before the conversation
    #[arg(long)]
    pub system: Option<String>,
    #[command(flatten)]
    pub memory: crate::memory_chat::MemoryArgs,
    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub chat_model: crate::chat_model::ChatModelArgs,
}

#[derive(Subcommand)]
pub enum Bench {
    /// Tokens per second of prefill and decode, with the share of the hardware's limit
    #[command(
        after_help = "Example: longspan bench speed --prefill 512,4096,8192 --decode 0,8192 --json"
    )]
    Speed {
        /// Prompt lengths to prefill from empty
        #[arg(long, value_delimiter = ',', default_value = "512,4096")]
        prefill: Vec<usize>,
        /// Depths to decode at
        #[arg(long, value_delimiter = ',', default_value = "0,4096")]
        decode: Vec<usize>,
        /// Tokens decoded per run
        #[arg(long, default_value_t = 64)]
        tokens: usize,
        /// Runs; the median is printed
        #[arg(long, default_value_t = 3)]
        repeat: usize,
        /// At each level of instructions that this CPU has, one after the other
        #[arg(long)]
        levels: bool,
        #[command(flatten)]
        options: RunOptions,
    },
    /// Context policies and rotary rules beside each other: speed, memory, loss, retrieval
    #[command(after_help = "Examples:
  longspan bench context --text book.txt --lengths 2k,8k,32k --methods full,window:4096,infllm,hip
  longspan bench context --text book.txt --lengths 16k --methods full --ropes own,yarn:2,ntk:2,dynamic:2
  longspan bench context --lengths 32k --measure cost --out runs/speed

A table, the powers of length that costs grow with, and in --out: context.html, context.json and cells.jsonl.
A run that was stopped goes on with the same command.")]
    Context(With<LoadOptions, crate::bench_context::ContextBench>),
    /// One layer's attention alone, on made-up keys at any depth: methods beside full attention
    #[command(
        after_help = "Example: longspan bench attention --lengths 8k,32k,128k --method hip --method squeezed:0.9"
    )]
    Attention(With<KeysOptions, crate::bench_attention::AttentionBench>),
    /// One call and some decoded tokens at a depth, methods beside full attention; the text before is read once
    #[command(
        after_help = "Example: longspan bench depth --text book.txt --depths 2k,8k,32k,128k --method hip"
    )]
    Depth(With<LoadOptions, crate::bench_depth::DepthBench>),
    /// Many questions of one prepared document beside a reading for each: time, and the same first lines
    #[command(
        after_help = "Example: longspan bench questions --text book.txt --length 8k --method squeezed:0.875 --json"
    )]
    Questions(With<LoadOptions, crate::bench_questions::QuestionsBench>),
    /// Long talks with known answers on a cache of fixed size: what is still remembered (SirLLM's three tasks)
    #[command(
        after_help = "Example: longspan bench dialogue --tasks grocery --turns 200 --cache 256 --json"
    )]
    Dialogue(With<LoadOptions, crate::bench_dialogue::DialogueBench>),
    /// A decoding strategy beside plain decoding: same text, passes over the model, speed
    #[command(
        after_help = "Example: longspan bench decode prompts.jsonl --decode lookahead:decoding_length=16"
    )]
    Decode(With<RunOptions, crate::bench_decode::DecodeBench>),
    /// Chain of agents, retrieval, one truncated call, ... on the same documents of any length
    #[command(after_help = "Examples:
  longspan bench workflow needle longbench/hotpotqa m4le/newsqa --lengths 8k,16k --text book.txt --out runs/workflows
  longspan bench workflow needle --lengths 50k --methods full,rag,chain --window 8k --endpoint http://localhost:8080/v1
  longspan report runs/workflows

Needle tasks make texts of the length; LongBench and M4LE rows are surrounded by other prose until they are as long.
--out holds every answer; the same command goes on where it stopped.")]
    Workflow(With<RunOptions, crate::bench_workflow::WorkflowBench>),
    /// How many passages, in which order, beside which wrong ones (Long-Context LLMs Meet RAG)
    #[command(after_help = "Examples:
  longspan bench rag --ks 1,5,10,20,40 --orders rank,ends --questions 20 --out runs/rag
  longspan bench rag --ks 20 --negatives random,bm25,dense --orders random:1 --json

Facts of invented places, each among passages that share its place or its kind; questions in other words.
--out holds every answer; the same command goes on where it stopped.")]
    Rag(With<RunOptions, crate::bench_rag::RagBench>),
    /// Time and memory of each sequence mixer against the length, and the powers of length they grow with
    #[command(
        after_help = "Example: longspan bench mixers s4 mamba2:state_size=64 rnn:cell=lstm --lengths 1024,4096,16384"
    )]
    Mixers(With<TrainOptions, crate::bench_mixers::MixersBench>),
    /// Training throughput of a transformer and a Mamba-2 of 10 M parameters (see scripts/peers/train_torch.py)
    Train(With<TrainOptions, crate::bench_train::TrainBench>),
    /// Agreement with reference logits (see scripts/parity/reference.py)
    Parity {
        /// Safetensors with input_ids and logits, or input_ids and nll
        reference: PathBuf,
        #[command(flatten)]
        options: RunOptions,
    },
    /// Loss of next tokens by position in a text
    #[command(
        after_help = "Example: longspan bench loss book.txt --tokens 12288 --bucket 1024 --rope yarn:2"
    )]
    Loss(With<RunOptions, crate::probe::Loss>),
    /// How well a model repeats the first sentence of texts of some lengths (Llama 2 Long's probe)
    #[command(
        after_help = "Example: longspan bench first-sentence book.txt --lengths 1024,8192 --rope ntk:2"
    )]
    FirstSentence(With<RunOptions, crate::probe::FirstSentence>),
    /// Finding a hidden number from the segments after which the model is surest (XL3M)
    #[command(
        after_help = "Example: longspan bench key-context --length 3000 --segment 150 --keep 2 --window 512"
    )]
    KeyContext(With<RunOptions, crate::probe::KeyContext>),
    /// Accuracy of finding a number hidden in filler text, by policy
    #[command(
        after_help = "Example: longspan bench passkey --length 16384 --context infllm --prompts 10"
    )]
    Passkey {
        /// Tokens of the text
        #[arg(long, default_value_t = 16_384)]
        length: usize,
        /// Number of texts
        #[arg(long, default_value_t = 10)]
        prompts: usize,
        /// The key lies at this share of the text, from..to
        #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.6])]
        depth: Vec<f64>,
        #[command(flatten)]
        options: RunOptions,
    },
}
