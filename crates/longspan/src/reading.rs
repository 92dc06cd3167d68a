//! Reading and answering: `ask`, `prepare`, `generate`, `chat`.

use crate::cli::{Ask, Chat, Generate, Prepare, Reading, Sampling};
use crate::models::{self, Opened};
use crate::options::Common;
use crate::ui::{self, Interrupted};
use anyhow::{Context, Result, bail};
use longspan_agents::chat::local::listed;
use longspan_agents::chat::local_chat::LocalChat;
use longspan_agents::chat::model::{Call, ChatModel, Input, Request};
use longspan_agents::{Finish, Generation, Limits, Message, Role};
use longspan_data::document::{self, Document};
use longspan_data::tokenize::Special;
use longspan_infer::context::ContextConfig;
use longspan_infer::context::auto::{self, Need};
use longspan_infer::decode::{DecodeConfig, SamplingConfig, Strategy};
use longspan_infer::engine::default_kv;
use longspan_infer::session::{KV_NAMES, Mode, SessionDir};
use longspan_infer::{Engine, EngineError, EngineOptions, Sequence};
use longspan_kernels::attention::KvDtype;
use serde_json::json;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between checkpoints of a long reading.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// Tokens left for a question and an answer after a document.
const ROOM: usize = 512;

/// What a reading took.
struct ReadStats {
    tokens: usize,
    resumed_at: usize,
    seconds: f64,
}

/// The type of cached keys and values that the options name.
pub fn kv_dtype(common: &Common) -> Result<KvDtype> {
    // The reference path is exact in the cache too.
    let exact = common.precision == Some(crate::options::Precision::F32);
    let Some(name) = common.kv.as_deref() else {
        return Ok(if exact { KvDtype::F32 } else { default_kv() });
    };
    let names = KV_NAMES.map(|(name, _)| name).join(", ");
    KV_NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, kv)| *kv)
        .with_context(|| format!("--kv {name}: expected one of {names}"))
}

/// The policy for this many tokens, and why.
fn choose(
    common: &Common,
    engine: &Engine,
    kv: KvDtype,
    tokens: usize,
) -> Result<(ContextConfig, String)> {
    match common.context.as_deref() {
        None | Some("auto") => {
            let need = Need {
                tokens: tokens as u64,
                window: engine.window(),
                kv_bytes_per_token: engine.kv_bytes_per_token(kv),
                free_bytes: free_memory(),
                cpu: engine.model().device().is_cpu(),
            };
            Ok(auto::choose(&need))
        }
        Some(text) => Ok((auto::parse(text, engine.window())?, "as asked".into())),
    }
}

/// Bytes of memory that programs can still get.
pub fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// `longspan ask`
pub fn ask(args: &Ask, common: &Common) -> Result<()> {
    if args.workflow.workflow.is_some() || args.workflow.chat_model.is_used() {
        return crate::workflow_ask::ask(args, common);
    }
    let sampling = SamplingArgs::new(&args.sampling, common)?;
    let kv = kv_dtype(common)?;
    let (question, files) = args
        .words
        .split_last()
        .expect("clap asks for one word at least");
    if let Some(path) = &args.session {
        if !files.is_empty() {
            bail!(
                "with --session only the question is given, found {} more words; quote the question",
                files.len()
            );
        }
        return ask_session(path, question, &sampling, common);
    }
    if files.is_empty() {
        bail!(
            "expected FILE... QUESTION, found only {question:?}; name a file (or - for standard input) before the question"
        );
    }
    let documents = read_documents(files, &args.reading)?;
    let opened = models::open(common)?;
    let model = &opened.model;
    let prompt = model.ask(&join(&documents), question)?;
    let window = model.engine.window();
    let total = prompt.document.len() + prompt.question.len() + sampling.limits.max_tokens;
    let (context, why) = choose(common, &model.engine, kv, total)?;
    if prompt.question.len() as u64 + sampling.limits.max_tokens as u64 > window {
        bail!(
            "the question has {} tokens and the answer may have {}; together they exceed the model's window of {window}; shorten the question or lower --max-tokens",
            prompt.question.len(),
            sampling.limits.max_tokens
        );
    }
    let options = EngineOptions { kv, context };
    let directory = (prompt.document.len() > args.reading.disk_above
        && !matches!(options.context, ContextConfig::Full))
    .then(|| cache_session(&opened, &options, &prompt.document))
    .transpose()?;
    if !common.json {
        eprintln!("context: {} ({why})", options.context);
    }
    let note = json!({ "files": files, "tokens": prompt.document.len() });
    let (mut sequence, stats) = read(
        &opened,
        &options,
        &prompt.document,
        directory.as_ref(),
        note,
        common,
    )?;
    answer(
        &opened,
        &mut sequence,
        &prompt.question,
        &sampling,
        common,
        Some((&stats, &why)),
    )?;
    if let Some(directory) = directory {
        directory.delete()?;
    }
    Ok(())
}

fn ask_session(
    path: &Path,
    question: &str,
    sampling: &SamplingArgs,
    common: &Common,
) -> Result<()> {
    let directory = SessionDir::new(path);
    if !directory.exists() {
        bail!(
            "{}: there is no session; make one with `longspan prepare FILE --session {}`",
            path.display(),
            path.display()
        );
    }
    let header = directory.header()?;
    let note = header.note;
    let mut common = common.clone();
    common.rope = common.rope.or(header.rope);
    if common.model.is_none() {
        common.model = note["model"].as_str().map(str::to_string);
    }
    let opened = models::open(&common)?;
    let start = Instant::now();
    let (mut sequence, _) = directory.load(&opened.model.engine, Mode::Read)?;
    if !common.json {
        eprintln!(
            "session: {} tokens under {} in {:.3} s (model {:.3} s)",
            ui::count(sequence.len() as u64),
            sequence.options().context,
            start.elapsed().as_secs_f64(),
            opened.load.as_secs_f64()
        );
    }
    let question = opened.model.question(question)?;
    answer(&opened, &mut sequence, &question, sampling, &common, None)
}

/// `longspan prepare`
pub fn prepare(args: &Prepare, common: &Common) -> Result<()> {
    let documents = read_documents(&args.files, &args.reading)?;
    let opened = models::open(common)?;
    let prompt = opened.model.ask(&join(&documents), "")?;
    let kv = kv_dtype(common)?;
    let (context, why) = choose(
        common,
        &opened.model.engine,
        kv,
        prompt.document.len() + ROOM,
    )?;
    let options = EngineOptions { kv, context };
    if !common.json {
        eprintln!("context: {} ({why})", options.context);
    }
    let note =
        json!({ "files": args.files, "tokens": prompt.document.len(), "model": opened.name });
    let directory = SessionDir::new(&args.session);
    let (sequence, stats) = read(
        &opened,
        &options,
        &prompt.document,
        Some(&directory),
        note,
        common,
    )?;
    let bytes = sequence.kv_bytes();
    if common.json {
        println!(
            "{}",
            json!({ "session": args.session, "tokens": stats.tokens, "seconds": stats.seconds, "kv_memory_bytes": bytes.memory, "kv_disk_bytes": bytes.disk })
        );
    } else {
        println!("{}", args.session.display());
    }
    Ok(())
}

/// Reads a document's tokens, with a bar, checkpoints and a clean stop. A session folder that
/// holds a beginning of the same tokens is gone on with; afterwards it holds them all.
fn read(
    opened: &Opened,
    options: &EngineOptions,
    tokens: &[u32],
    directory: Option<&SessionDir>,
    note: serde_json::Value,
    common: &Common,
) -> Result<(Sequence, ReadStats)> {
    let engine = &opened.model.engine;
    let mut note = note;
    note["model"] = json!(opened.name);
    let mut resumed = None;
    if let Some(directory) = directory.filter(|directory| directory.exists()) {
        // What an earlier command saved is never overwritten by another text's session.
        let at = directory.path().display();
        let advice = format!("{at}: delete the folder or name another one");
        let (sequence, header) = directory
            .load(engine, Mode::Resume)
            .context(advice.clone())?;
        let same = header.context == options.context && sequence.options().kv == options.kv;
        if !same || !tokens.starts_with(sequence.tokens()) {
            bail!("{advice}: it holds a session of another text or policy");
        }
        resumed = Some(sequence);
    }
    let mut sequence = match (resumed, directory) {
        (Some(sequence), _) => {
            eprintln!(
                "going on after {} tokens read before",
                ui::count(sequence.len() as u64)
            );
            sequence
        }
        (None, Some(directory)) => engine.sequence(options, Some(directory.create()?))?,
        (None, None) => engine.sequence(options, None)?,
    };
    sequence.expect_length(tokens.len() + ROOM);
    let resumed_at = sequence.len();
    let bar = ui::bar(tokens.len() as u64, "tokens", common.json);
    bar.set_message("reading");
    bar.set_position(resumed_at as u64);
    bar.reset_eta();
    let start = Instant::now();
    let mut saved = Instant::now();
    let mut failure = None;
    let rest = &tokens[resumed_at..];
    let result = if rest.is_empty() {
        Ok(())
    } else {
        // The document's last token is followed by the question, so nothing is split off here.
        let chunk = sequence.spec().chunk;
        rest.chunks(chunk).try_for_each(|piece| {
            engine.forward(
                &mut [(&mut sequence, piece)],
                longspan_infer::engine::Want::Nothing,
            )?;
            bar.set_position(sequence.len() as u64);
            if let Some(directory) = directory
                && (saved.elapsed() > CHECKPOINT_EVERY || ui::interrupted())
                && let Err(error) = directory.save(engine, &sequence, note.clone())
            {
                failure = Some(error);
                return Err(EngineError::Refused(
                    "the session could not be saved".into(),
                ));
            }
            if saved.elapsed() > CHECKPOINT_EVERY {
                saved = Instant::now();
                if let Some(tier) = directory.and_then(|_| sequence.tier()) {
                    tier.release_memory();
                }
            }
            if ui::interrupted() {
                return Err(EngineError::Cancelled {
                    read: sequence.len(),
                    total: tokens.len(),
                });
            }
            Ok(())
        })
    };
    bar.finish_and_clear();
    if let Some(error) = failure {
        return Err(anyhow::Error::new(error).context("saving the session"));
    }
    match result {
        Err(EngineError::Cancelled { read, total }) => {
            let kept = match directory {
                Some(_) => "; the same command goes on from there",
                None => "",
            };
            return Err(Interrupted(format!(
                "{} of {} tokens were read{kept}",
                ui::count(read as u64),
                ui::count(total as u64)
            ))
            .into());
        }
        result => result?,
    }
    let stats = ReadStats {
        tokens: tokens.len() - resumed_at,
        resumed_at,
        seconds: start.elapsed().as_secs_f64(),
    };
    // Questions follow: policies that index a fixed text do so once, before it is saved.
    engine.seal(&mut sequence)?;
    if let Some(directory) = directory {
        directory.save(engine, &sequence, note)?;
    }
    Ok((sequence, stats))
}

/// Reads the question and streams the answer.
fn answer(
    opened: &Opened,
    sequence: &mut Sequence,
    question: &[u32],
    sampling: &SamplingArgs,
    common: &Common,
    read: Option<(&ReadStats, &str)>,
) -> Result<()> {
    let model = &opened.model;
    let start = Instant::now();
    let logits = model
        .engine
        .prefill(sequence, question, &mut |_, _| Ok(stop_if_interrupted()))?;
    let first_token = start.elapsed();
    let generation = stream_answer(opened, sequence, logits, sampling, common)?;
    let bytes = sequence.kv_bytes();
    let decode = rate(
        generation.choices.len().saturating_sub(1),
        generation.elapsed.as_secs_f64(),
    );
    if common.json {
        let mut value = json!({
            "answer": generation.text,
            "finish_reason": generation.finish,
            "model": opened.name,
            "context": sequence.options().context,
            "question_tokens": question.len(),
            "answer_tokens": generation.choices.len(),
            "first_token_seconds": first_token.as_secs_f64(),
            "decode_tokens_per_second": decode,
            "kv_memory_bytes": bytes.memory,
            "kv_disk_bytes": bytes.disk,
            "policy": sequence.report(),
        });
        if let Some((stats, why)) = read {
            value["document_tokens"] = json!(stats.tokens + stats.resumed_at);
            value["read_seconds"] = json!(stats.seconds);
            value["read_tokens_per_second"] = json!(rate(stats.tokens, stats.seconds));
            value["why"] = json!(why);
        }
        if sampling.config.logprobs.is_some() {
            value["logprobs"] = logprobs(opened, &generation);
        }
        if sampling.decode != DecodeConfig::Plain {
            value["decode"] = json!(sampling.decode);
            value["decode_forwards"] = json!(generation.stats.forwards);
            value["decode_read_tokens"] = json!(generation.stats.tokens);
        }
        if !generation.answers.is_empty() {
            value["answers"] = json!(generation.answers);
        }
        println!("{value}");
    } else {
        let reading = read.map_or(String::new(), |(stats, _)| {
            format!(
                "read {} tokens at {:.0} tok/s, ",
                ui::count((stats.tokens + stats.resumed_at) as u64),
                rate(stats.tokens, stats.seconds)
            )
        });
        let disk = if bytes.disk > 0 {
            format!(" + {} on disk", ui::bytes(bytes.disk))
        } else {
            String::new()
        };
        for (rank, other) in generation.answers.iter().enumerate().skip(1) {
            println!(
                "--- {} (score {:.4})\n{}",
                rank + 1,
                other.score,
                other.text
            );
        }
        let passes = if sampling.decode == DecodeConfig::Plain {
            String::new()
        } else {
            format!(" in {} passes over the model", generation.stats.forwards)
        };
        eprintln!(
            "{reading}first token after {:.3} s, wrote {} tokens at {decode:.1} tok/s{passes}, keys and values {}{disk}",
            first_token.as_secs_f64(),
            generation.choices.len(),
            ui::bytes(bytes.memory)
        );
    }
    if let Some(path) = &sampling.pairs {
        let prompt = model.tokenizer.decode(sequence.tokens());
        write_pair(path, &prompt, &generation)?;
    }
    if generation.finish == Finish::Cancelled {
        return Err(Interrupted("the answer was cut short".into()).into());
    }
    Ok(())
}

/// Appends a line of preference data: {prompt, chosen, rejected, their confidences}.
fn write_pair(path: &Path, prompt: &str, generation: &Generation) -> Result<()> {
    let Some((chosen, rejected)) = &generation.pair else {
        eprintln!(
            "{}: the search found one answer only, no pair",
            path.display()
        );
        return Ok(());
    };
    let line = json!({
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_confidence": chosen.score,
        "rejected_confidence": rejected.score,
    });
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    file.and_then(|mut file| writeln!(file, "{line}"))
        .with_context(|| path.display().to_string())
}

fn stream_answer(
    opened: &Opened,
    sequence: &mut Sequence,
    logits: Vec<f32>,
    sampling: &SamplingArgs,
    common: &Common,
) -> Result<Generation> {
    let mut strategy = sampling.strategy()?;
    let mut printed = ui::Printed::new(common.json);
    let generation = opened.model.generate(
        sequence,
        logits,
        &mut *strategy,
        &sampling.limits,
        &mut |text| printed.piece(text),
    );
    printed.finish()?;
    Ok(generation?)
}

/// `longspan generate`
pub fn generate(args: &Generate, common: &Common) -> Result<()> {
    let sampling = SamplingArgs::new(&args.sampling, common)?;
    let prompt = if args.prompt == "-" {
        io::read_to_string(io::stdin()).context("standard input")?
    } else {
        args.prompt.clone()
    };
    if prompt.is_empty() {
        bail!("the prompt is empty");
    }
    let opened = models::open(common)?;
    let model = &opened.model;
    let tokens = model.tokenizer.encode(&prompt, Special::ParseWithBos)?;
    let kv = kv_dtype(common)?;
    let (context, _) = choose(
        common,
        &model.engine,
        kv,
        tokens.len() + sampling.limits.max_tokens,
    )?;
    let options = EngineOptions { kv, context };
    let mut sequence = model.engine.sequence(&options, None)?;
    sequence.expect_length(tokens.len() + sampling.limits.max_tokens);
    answer(&opened, &mut sequence, &tokens, &sampling, common, None)
}

/// `longspan chat`
pub fn chat(args: &Chat, common: &Common) -> Result<()> {
    let sampling = SamplingArgs::new(&args.sampling, common)?;
    let mut request = Request {
        max_tokens: sampling.limits.max_tokens,
        stop: sampling.limits.stop.clone(),
        sampling: sampling.config.clone(),
        decode: sampling.decode.clone(),
        ..Request::chat(Vec::new())
    };
    if args.memory.memory.is_some() {
        return crate::memory_chat::chat(args, request, common);
    }
    let model: Arc<dyn ChatModel> = if args.chat_model.is_used() {
        crate::chat_model::open(&args.chat_model, common)?
    } else {
        let opened = models::open(common)?;
        let kv = kv_dtype(common)?;
        let (context, _) = match common.context.as_deref() {
            // A talk has no length beforehand: a window's worth in full, then sinks.
            None | Some("auto") => ("sinks".parse()?, String::new()),
            Some(_) => choose(common, &opened.model.engine, kv, 0)?,
        };
        let options = EngineOptions { kv, context };
        let own = Arc::new(opened.model);
        Arc::new(LocalChat::new(own, &opened.name, options, 4 << 30)?)
    };
    let call = Call::new(ui::interrupted);
    let system = args.system.iter();
    let mut messages: Vec<Message> = system
        .map(|text| Message::new(Role::System, text.clone()))
        .collect();
    while let Some(line) = ui::next_line().context("standard input")? {
        if line.is_empty() {
            continue;
        }
        messages.push(Message::new(Role::User, line));
        request.input = Input::Chat(messages.clone());
        let mut printed = ui::Printed::new(common.json);
        let reply = model.reply(&request, &call, &mut |text| printed.piece(text));
        printed.finish()?;
        let reply = match reply {
            Err(_) if ui::interrupted() => return Ok(()),
            reply => reply?,
        };
        if common.json {
            println!(
                "{}",
                json!({
                    "answer": reply.text, "finish_reason": reply.finish, "prompt_tokens": reply.usage.prompt,
                    "read_tokens": reply.usage.prompt - reply.usage.cached,
                })
            );
        }
        messages.push(Message::new(Role::Assistant, reply.text));
    }
    Ok(())
}

fn stop_if_interrupted() -> ControlFlow<()> {
    if ui::interrupted() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

fn rate(tokens: usize, seconds: f64) -> f64 {
    tokens as f64 / seconds.max(1e-9)
}

fn logprobs(opened: &Opened, generation: &Generation) -> serde_json::Value {
    let tokenizer = &opened.model.tokenizer;
    let rows = generation.choices.iter();
    rows.map(|choice| json!(listed(tokenizer, choice)))
        .collect()
}

/// Options of decoding, checked.
struct SamplingArgs {
    config: SamplingConfig,
    decode: DecodeConfig,
    pairs: Option<PathBuf>,
    limits: Limits,
}

impl SamplingArgs {
    fn new(args: &Sampling, common: &Common) -> Result<Self> {
        let config = SamplingConfig {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
            seed: args.seed,
            logit_bias: args.logit_bias.iter().copied().collect(),
            logprobs: args.logprobs,
        };
        let max_tokens = args.max_tokens.or(common.max_tokens).unwrap_or(256);
        if max_tokens == 0 {
            bail!("--max-tokens is 0, expected at least 1");
        }
        let decode: DecodeConfig = args.decode.parse()?;
        if args.pairs.is_some() && decode.name() != "tree" {
            bail!(
                "--pairs takes a better and a worse answer from --decode tree, found --decode {decode}"
            );
        }
        let sampling = SamplingArgs {
            config,
            decode,
            pairs: args.pairs.clone(),
            limits: Limits {
                max_tokens,
                stop: args.stop.clone(),
            },
        };
        sampling.strategy()?;
        Ok(sampling)
    }

    fn strategy(&self) -> Result<Box<dyn Strategy>> {
        Ok(self.decode.build(&self.config, 0, None)?)
    }
}

pub fn read_documents(files: &[String], reading: &Reading) -> Result<Vec<Document>> {
    let limits = document::Limits {
        max_bytes: reading.max_bytes,
        ..document::Limits::default()
    };
    let mut documents = Vec::new();
    for file in files {
        if file == "-" {
            documents.push(document::read_stdin(&limits)?);
        } else {
            documents.push(document::read(Path::new(file), &limits)?);
        }
    }
    for document in &documents {
        for warning in &document.warnings {
            eprintln!("{}: {warning}", document.name);
        }
    }
    Ok(documents)
}

pub fn join(documents: &[Document]) -> String {
    match documents {
        [only] => only.text.clone(),
        many => many
            .iter()
            .map(|document| format!("=== {} ===\n{}\n", document.name, document.text))
            .collect(),
    }
}

/// Where a long reading is kept until it is answered: a folder named by all that decides its state.
fn cache_session(opened: &Opened, options: &EngineOptions, tokens: &[u32]) -> Result<SessionDir> {
    let mut hash = blake3::Hasher::new();
    hash.update(opened.model.engine.fingerprint().as_bytes());
    hash.update(format!("{} {:?}", options.context, options.kv).as_bytes());
    for token in tokens {
        hash.update(&token.to_le_bytes());
    }
    let base = match std::env::var_os("LONGSPAN_SESSIONS") {
        Some(path) => PathBuf::from(path),
        None => longspan_nn::hub::Hub::from_env()?.cache().join("sessions"),
    };
    Ok(SessionDir::new(base.join(&hash.finalize().to_hex()[..16])))
}
