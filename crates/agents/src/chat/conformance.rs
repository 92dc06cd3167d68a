//! The laws of the chat seam as one suite, for every implementation alike: the local engine, an endpoint, a script,
//! and our own server seen through the endpoint client.
//!
//! [`run`] checks one model and gives an outcome per law; [`agree`] checks that two models which should be the same give
//! the same replies. Laws about an ability are skipped where the card lacks it, and then the model must refuse.
//! A model under test should write at least four tokens greedily for each prompt of the [`Probe`].

use super::layers::{Budget, Budgeted, CacheMode, CacheStore, Cached, Limit};
use super::local::Finish;
use super::model::{
    Ability, Call, ChatError, ChatModel, Input, Reply, Request, Result as ChatResult, ignore,
};
use super::scripted::Scripted;
use super::template::{Message, Role};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// What a model is asked.
pub struct Probe<'a> {
    /// Texts that it answers with at least four tokens.
    pub prompts: Vec<String>,
    /// Most tokens of most replies; at least 4.
    pub max_tokens: usize,
    /// Calls at a time in the law about budgets.
    pub concurrent: usize,
    /// A folder for a cache.
    pub folder: &'a Path,
    /// Something that is held while a call runs and must be given back, for instance pages of keys and values.
    pub held: Option<&'a (dyn Fn() -> u64 + Sync)>,
    /// How far log probabilities of equal calls may differ.
    pub tolerance: f32,
}

impl<'a> Probe<'a> {
    /// Two prompts, replies of 12 tokens, 64 calls at a time.
    pub fn new(folder: &'a Path) -> Probe<'a> {
        Probe {
            prompts: vec![
                "Tell a story about rain.".into(),
                "What is a window, in words?".into(),
            ],
            max_tokens: 12,
            concurrent: 64,
            folder,
            held: None,
            tolerance: 1e-4,
        }
    }
}

/// How a law fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The law.
    pub law: &'static str,
    /// Why it is broken.
    pub broken: Option<String>,
}

type Law = fn(&Arc<dyn ChatModel>, &Probe<'_>) -> Result<(), String>;

const LAWS: &[(&str, Law)] = &[
    ("equal greedy requests have equal replies", repeats),
    ("the pieces of a reply add up to its text", pieces_add_up),
    ("the count of a prompt is its usage", counts),
    ("a reply has at most the tokens asked for", limits),
    ("stop texts end a reply and are not part of it", stops),
    ("log probabilities belong to the text", logprobs),
    ("scores of a written text are its log probabilities", scores),
    (
        "the next token's distribution tops the greedy choice",
        next_token,
    ),
    ("equal seeds have equal replies", seeds),
    ("a start of the answer is gone on with", answer_prefix),
    ("a reply is stopped by its reader", stopped_by_reader),
    ("a reply is stopped by its caller", stopped_by_caller),
    ("a deadline that has passed ends a call", deadline),
    ("a request beyond the window is refused", overflow),
    ("impossible options are refused by name", bad_options),
    ("abilities that lack are refused", unsupported),
    ("embeddings have one length and one order", embeddings),
    ("reading ahead changes no reply", prepare),
    ("parallel calls never exceed a budget", budget),
    ("a recorded talk replays without its model", replay),
];

/// Checks all laws.
pub fn run(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Vec<Outcome> {
    let check = |&(law, check): &(&'static str, Law)| Outcome {
        law,
        broken: check(model, probe).err(),
    };
    LAWS.iter().map(check).collect()
}

/// The laws that are broken, one a line; empty if all hold.
pub fn broken(outcomes: &[Outcome]) -> String {
    let lines = outcomes.iter().filter_map(|outcome| {
        let why = outcome.broken.as_ref()?;
        Some(format!("{}: {why}\n", outcome.law))
    });
    lines.collect()
}

/// # Errors
/// The first reply, count, score or log probability that two models do not share.
pub fn agree(
    left: &Arc<dyn ChatModel>,
    right: &Arc<dyn ChatModel>,
    probe: &Probe<'_>,
) -> Result<(), String> {
    for prompt in &probe.prompts {
        for request in [Request::user(prompt), Request::text(prompt)] {
            let mut request = request.max_tokens(probe.max_tokens);
            let both = Ability::Logprobs;
            if left.card().can(both) && right.card().can(both) {
                request = request.logprobs(2);
            }
            let (a, b) = (ask(left, &request)?, ask(right, &request)?);
            same("text", &a.text, &b.text)?;
            same("finish", &a.finish, &b.finish)?;
            if a.usage.exact && b.usage.exact {
                same("prompt tokens", &a.usage.prompt, &b.usage.prompt)?;
                same(
                    "completion tokens",
                    &a.usage.completion,
                    &b.usage.completion,
                )?;
            }
            close(&a, &b, probe.tolerance)?;
        }
        if left.card().can(Ability::Score) && right.card().can(Ability::Score) {
            let call = Call::default();
            let score = |model: &Arc<dyn ChatModel>| said(model.score(prompt, " and more", &call));
            let (a, b) = (score(left)?, score(right)?);
            same("scored tokens", &a.len(), &b.len())?;
            for (a, b) in a.iter().zip(&b) {
                same("scored token", &a.token, &b.token)?;
                near("score", a.logprob, b.logprob, probe.tolerance)?;
            }
        }
    }
    Ok(())
}

fn said<T>(result: ChatResult<T>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

fn ask(model: &Arc<dyn ChatModel>, request: &Request) -> Result<Reply, String> {
    said(model.ask(request, &Call::default()))
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, a: &T, b: &T) -> Result<(), String> {
    match a == b {
        true => Ok(()),
        false => Err(format!("{what}: {a:?} and {b:?}")),
    }
}

fn near(what: &str, a: f32, b: f32, tolerance: f32) -> Result<(), String> {
    match (a - b).abs() <= tolerance {
        true => Ok(()),
        false => Err(format!(
            "{what}: {a} and {b}, at most {tolerance} apart expected"
        )),
    }
}

fn close(a: &Reply, b: &Reply, tolerance: f32) -> Result<(), String> {
    same(
        "tokens with log probabilities",
        &a.logprobs.len(),
        &b.logprobs.len(),
    )?;
    for (a, b) in a.logprobs.iter().zip(&b.logprobs) {
        same("token", &a.token, &b.token)?;
        near("log probability", a.logprob, b.logprob, tolerance)?;
    }
    Ok(())
}

fn requests(probe: &Probe<'_>, model: &Arc<dyn ChatModel>) -> Vec<Request> {
    let mut all = Vec::new();
    for prompt in &probe.prompts {
        if model.card().can(Ability::Chat) {
            all.push(Request::user(prompt).max_tokens(probe.max_tokens));
            let talk = vec![
                Message::new(Role::User, "Hello there"),
                Message::new(Role::Assistant, "Good day to you"),
                Message::new(Role::User, prompt.clone()),
            ];
            all.push(Request::chat(talk).max_tokens(probe.max_tokens));
        }
        if model.card().can(Ability::Complete) {
            all.push(Request::text(prompt).max_tokens(probe.max_tokens));
        }
    }
    all
}

fn repeats(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let all = requests(probe, model);
    if all.is_empty() {
        return Err("the model neither chats nor completes".into());
    }
    let first = all
        .iter()
        .map(|request| ask(model, request))
        .collect::<Result<Vec<_>, _>>()?;
    // The other way round: what was asked before must not matter.
    for (request, first) in all.iter().zip(&first).rev() {
        let again = ask(model, request)?;
        same("text", &first.text, &again.text)?;
        same("finish", &first.finish, &again.finish)?;
    }
    Ok(())
}

fn pieces_add_up(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let mut text = String::new();
        let reply = said(model.reply(&request, &Call::default(), &mut |piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        }))?;
        same("pieces and text", &text, &reply.text)?;
        if reply.usage.completion < 4 {
            return Err(format!("the reply {text:?} is too short for this suite"));
        }
        if !(0.0..=reply.total_s).contains(&reply.first_s) {
            return Err(format!(
                "first piece after {} s of {}",
                reply.first_s, reply.total_s
            ));
        }
    }
    Ok(())
}

fn counts(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let count = said(model.count(&request.input))?;
        let usage = ask(model, &request)?.usage;
        if count.exact && usage.exact {
            same("count and usage", &count.tokens, &usage.prompt)?;
        } else if count.planned() * 4 < usage.prompt {
            return Err(format!(
                "{} tokens estimated, {} used",
                count.tokens, usage.prompt
            ));
        }
        if usage.cached > usage.prompt {
            return Err(format!(
                "{} of {} prompt tokens reused",
                usage.cached, usage.prompt
            ));
        }
    }
    Ok(())
}

fn limits(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let whole = ask(model, &request)?;
        let cut = ask(model, &request.clone().max_tokens(3))?;
        same("finish", &Finish::Length, &cut.finish)?;
        if cut.usage.exact {
            same("tokens", &3, &cut.usage.completion)?;
        }
        if !whole
            .text
            .starts_with(cut.text.trim_end_matches('\u{FFFD}'))
        {
            return Err(format!("{:?} does not begin {:?}", cut.text, whole.text));
        }
    }
    Ok(())
}

fn stops(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let whole = ask(model, &request)?.text;
        // A stop text from the middle of what is written, past its beginning.
        let chars: Vec<(usize, char)> = whole.char_indices().collect();
        let Some(&(at, _)) = chars.get(chars.len() / 2) else {
            return Err("the reply is empty".into());
        };
        let stop: String = whole[at..].chars().take(2).collect();
        let end = whole.find(&stop).unwrap_or(at);
        let mut request = request;
        request.stop = vec!["never written \u{1}".into(), stop.clone()];
        let mut text = String::new();
        let reply = said(model.reply(&request, &Call::default(), &mut |piece| {
            text.push_str(piece);
            ControlFlow::Continue(())
        }))?;
        same("text up to the stop", &&whole[..end], &reply.text.as_str())?;
        same("pieces", &text, &reply.text)?;
        same("finish", &Finish::Stop, &reply.finish)?;
    }
    Ok(())
}

fn logprobs(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    if !model.card().can(Ability::Logprobs) {
        return Ok(());
    }
    for request in requests(probe, model) {
        let plain = ask(model, &request)?;
        same("log probabilities not asked for", &0, &plain.logprobs.len())?;
        let request = request.logprobs(3);
        let reply = ask(model, &request)?;
        same("text with and without", &plain.text, &reply.text)?;
        close(&reply, &ask(model, &request)?, probe.tolerance)?;
        let written = reply.usage.completion;
        let listed = reply.logprobs.len();
        // The token that ends a turn has no text and is not listed.
        if reply.usage.exact && listed != written && listed + 1 != written {
            return Err(format!("{listed} tokens listed, {written} written"));
        }
        adds_up(&reply)?;
        for entry in &reply.logprobs {
            let mut last = f32::INFINITY;
            for top in &entry.top_logprobs {
                if !(top.logprob <= last && top.logprob <= 1e-4) {
                    return Err(format!("likeliest tokens out of order: {entry:?}"));
                }
                last = top.logprob;
            }
            let best = entry.top_logprobs.first().map(|top| top.logprob);
            near(
                "the greedy choice and the likeliest",
                best.unwrap_or(f32::NAN),
                entry.logprob,
                1e-4,
            )?;
        }
    }
    Ok(())
}

/// The bytes of the tokens listed are the text. A control token is listed by its name and has none; a character that
/// is cut by the end of the reply is U+FFFD in ours and left out elsewhere, as is the blank that some tokenizers put before it.
fn adds_up(reply: &Reply) -> Result<(), String> {
    let whole = |text: &str| text.replace('\u{FFFD}', "");
    let text = whole(&reply.text);
    let bytes: Option<Vec<&[u8]>> = (reply.logprobs.iter())
        .map(|entry| entry.bytes.as_deref())
        .collect();
    if let Some(bytes) = bytes {
        let listed = whole(&String::from_utf8_lossy(&bytes.concat()));
        if listed != text && listed.strip_prefix(' ') != Some(&text) {
            return Err(format!("tokens of {listed:?} for the text {text:?}"));
        }
        return Ok(());
    }
    // A dialect without bytes: all but names of control tokens must stand in the text, in order.
    let mut rest = text.as_str();
    for entry in &reply.logprobs {
        let token = whole(&entry.token);
        rest = rest
            .strip_prefix(token.as_str())
            .or(rest.strip_prefix(token.trim_start()))
            .unwrap_or(rest);
    }
    match rest.trim().is_empty() {
        true => Ok(()),
        false => Err(format!("{rest:?} of {text:?} is in no token")),
    }
}

fn scores(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let card = model.card();
    if !card.can(Ability::Score) || !card.can(Ability::Complete) || !card.can(Ability::Logprobs) {
        return Ok(());
    }
    for prompt in &probe.prompts {
        let request = Request::text(prompt)
            .max_tokens(probe.max_tokens)
            .logprobs(1);
        let reply = ask(model, &request)?;
        let scores = said(model.score(prompt, &reply.text, &Call::default()))?;
        if scores
            .iter()
            .any(|score| score.logprob.is_nan() || score.logprob > 1e-4)
        {
            return Err(format!("a score above 0: {scores:?}"));
        }
        let tokens: Vec<&str> = scores.iter().map(|score| score.token.as_str()).collect();
        let own: Vec<&str> = reply
            .logprobs
            .iter()
            .map(|entry| entry.token.as_str())
            .collect();
        // A text that was written may be tokenized otherwise than it was written.
        if tokens == own {
            for (score, entry) in scores.iter().zip(&reply.logprobs) {
                near(
                    "score",
                    score.logprob,
                    entry.logprob,
                    probe.tolerance.max(5e-3),
                )?;
            }
        }
        let nothing = said(model.score(prompt, "", &Call::default()))?;
        same("scores of nothing", &0, &nothing.len())?;
    }
    Ok(())
}

fn next_token(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    use longspan_infer::key_context::Distribution;
    if !model.card().can(Ability::Logprobs) {
        return Ok(());
    }
    for request in requests(probe, model) {
        let found = said(model.next_token(&request, &Call::default()))?;
        let (entropy, _) = found.entropy();
        if !(entropy.is_finite() && entropy >= -1e-6) {
            return Err(format!("an entropy of {entropy}"));
        }
        let best = match &found {
            Distribution::Top(top) => top.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            Distribution::Logits(logits) => {
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                -logits
                    .iter()
                    .map(|logit| (logit - top).exp())
                    .sum::<f32>()
                    .ln()
            }
        };
        let reply = ask(model, &request.logprobs(1))?;
        let first = reply.logprobs.first().ok_or("no log probabilities")?;
        near(
            "the first token's log probability",
            best,
            first.logprob,
            probe.tolerance.max(1e-3),
        )?;
    }
    Ok(())
}

fn seeds(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    if !model.card().can(Ability::Seed) {
        return Ok(());
    }
    for request in requests(probe, model) {
        let request = request.temperature(1.0, 7);
        let (a, b) = (ask(model, &request)?, ask(model, &request)?);
        same("texts of one seed", &a.text, &b.text)?;
    }
    Ok(())
}

fn answer_prefix(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let mut all = requests(probe, model);
    if !model.card().can(Ability::AnswerPrefix) {
        all.retain(|request| matches!(request.input, Input::Text(_)));
    }
    for request in all {
        let plain = said(model.count(&request.input))?;
        let mut request = request;
        request.answer_prefix = " Well then,".into();
        let reply = ask(model, &request)?;
        if reply.usage.exact && plain.exact && reply.usage.prompt <= plain.tokens {
            // Scripts do not count it twice; models read it.
            return Err(format!(
                "{} prompt tokens with a start of the answer, {} without",
                reply.usage.prompt, plain.tokens
            ));
        }
        if reply.text.starts_with(&request.answer_prefix) {
            return Err(format!("the given start is part of {:?}", reply.text));
        }
    }
    Ok(())
}

fn held(probe: &Probe<'_>) -> u64 {
    probe.held.map_or(0, |held| held())
}

/// What is held may be given back by another thread.
fn given_back(probe: &Probe<'_>, before: u64) -> Result<(), String> {
    let start = Instant::now();
    while held(probe) > before {
        if start.elapsed().as_secs() > 20 {
            return Err(format!(
                "{} held after a stop, {before} before",
                held(probe)
            ));
        }
        std::thread::yield_now();
    }
    Ok(())
}

fn stopped_by_reader(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let whole = ask(model, &request)?;
        let before = held(probe);
        let mut text = String::new();
        let result = model.reply(&request, &Call::default(), &mut |piece| {
            text.push_str(piece);
            match piece.is_empty() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        let Err(ChatError::Cancelled { partial }) = result else {
            return Err(format!("stopped after {text:?}, found {result:?}"));
        };
        same("what was read and what is reported", &text, &partial)?;
        given_back(probe, before)?;
        let again = ask(model, &request)?;
        same("the reply after a stop", &whole.text, &again.text)?;
    }
    Ok(())
}

fn stopped_by_caller(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let before = held(probe);
        let call = Call::new(|| true);
        let mut pieces = 0;
        let result = model.reply(&request, &call, &mut |piece| {
            pieces += usize::from(!piece.is_empty());
            ControlFlow::Continue(())
        });
        if !matches!(result, Err(ChatError::Cancelled { .. })) || pieces > 0 {
            return Err(format!(
                "stopped beforehand, {pieces} pieces came, found {result:?}"
            ));
        }
        let flag = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&flag);
        let call = Call::new(move || seen.load(Ordering::SeqCst));
        let result = model.reply(&request, &call, &mut |piece| {
            flag.store(
                flag.load(Ordering::SeqCst) || !piece.is_empty(),
                Ordering::SeqCst,
            );
            ControlFlow::Continue(())
        });
        match result {
            Err(ChatError::Cancelled { .. }) => {}
            // The whole text may have come in one piece.
            Ok(reply) if reply.from_cache || reply.usage.completion <= 1 => {}
            other => return Err(format!("stopped after the first piece, found {other:?}")),
        }
        given_back(probe, before)?;
    }
    Ok(())
}

fn deadline(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let mut call = Call::default();
    call.deadline = Some(Instant::now());
    for request in requests(probe, model) {
        let result = model.ask(&request, &call);
        if !matches!(result, Err(ChatError::Timeout { .. })) {
            return Err(format!("found {result:?}"));
        }
    }
    Ok(())
}

fn overflow(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let Some(window) = model.card().window else {
        return Ok(());
    };
    for request in requests(probe, model) {
        let result = model.ask(&request.max_tokens(window), &Call::default());
        match result {
            Err(ChatError::ContextOverflow { tokens, max }) if tokens > max && max == window => {}
            other => {
                return Err(format!(
                    "a reply of {window} tokens in a window of {window}: {other:?}"
                ));
            }
        }
    }
    Ok(())
}

fn bad_options(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let mut wrong = [request.clone().temperature(-1.0, 0), request.clone()];
        wrong[1].sampling.top_p = 0.0;
        for (request, name) in wrong.iter().zip(["temperature", "top_p"]) {
            match model.ask(request, &Call::default()) {
                Err(ChatError::BadRequest(message)) if message.contains(name) => {}
                other => return Err(format!("{name}: {other:?}")),
            }
        }
    }
    if model.card().can(Ability::Chat) {
        let result = model.ask(&Request::chat(Vec::new()).max_tokens(4), &Call::default());
        // Scripts answer anything.
        if model.card().name != "scripted" && !matches!(result, Err(ChatError::BadRequest(_))) {
            return Err(format!("no messages: {result:?}"));
        }
    }
    Ok(())
}

fn unsupported(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let call = Call::default();
    let card = model.card();
    let prompt = probe.prompts.first().ok_or("no prompts")?;
    let mut failures = Vec::new();
    let mut refused = |ability: Ability, error: Option<ChatError>| {
        let fits = matches!(&error, Some(ChatError::Unsupported { ability: found, .. }) if *found == ability);
        if !card.can(ability) && !fits {
            failures.push(format!("{ability}: {error:?}"));
        }
    };
    if !card.can(Ability::Embed) {
        refused(
            Ability::Embed,
            model.embed(std::slice::from_ref(prompt), &call).err(),
        );
    }
    if !card.can(Ability::Score) {
        refused(Ability::Score, model.score(prompt, "x", &call).err());
    }
    if !card.can(Ability::AnswerPrefix) && card.can(Ability::Chat) {
        let mut request = Request::user(prompt).max_tokens(4);
        request.answer_prefix = "x".into();
        refused(Ability::AnswerPrefix, model.ask(&request, &call).err());
    }
    if !card.can(Ability::Decode) && card.can(Ability::Chat) {
        let mut request = Request::user(prompt).max_tokens(4);
        request.decode = longspan_infer::decode::DecodeConfig::Greedy;
        refused(Ability::Decode, model.ask(&request, &call).err());
    }
    match failures.is_empty() {
        true => Ok(()),
        false => Err(failures.join("; ")),
    }
}

fn embeddings(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    if !model.card().can(Ability::Embed) {
        return Ok(());
    }
    let call = Call::default();
    let both = said(model.embed(&probe.prompts, &call))?;
    same("vectors", &probe.prompts.len(), &both.vectors.len())?;
    for (prompt, vector) in probe.prompts.iter().zip(&both.vectors) {
        if vector.is_empty() || vector.iter().any(|x| !x.is_finite()) {
            return Err(format!("the embedding of {prompt:?} has no numbers"));
        }
        let alone = said(model.embed(std::slice::from_ref(prompt), &call))?;
        let alone = alone.vectors.first().ok_or("no embedding")?;
        same("length", &vector.len(), &alone.len())?;
        if let Some(dim) = model.card().embedding_dim {
            same("length and card", &dim, &vector.len())?;
        }
        for (a, b) in vector.iter().zip(alone) {
            near("a component alone and among others", *a, *b, 1e-3)?;
        }
    }
    same(
        "vectors of nothing",
        &0,
        &said(model.embed(&[], &call))?.vectors.len(),
    )
}

fn prepare(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    for request in requests(probe, model) {
        let before = ask(model, &request)?.text;
        let begun = match &request.input {
            Input::Text(text) => Input::Text(text[..first_half(text)].into()),
            Input::Chat(messages) => {
                let mut messages = messages.clone();
                if let Some(last) = messages.last_mut() {
                    last.content.truncate(first_half(&last.content));
                }
                Input::Chat(messages)
            }
        };
        said(model.prepare(&begun, &Call::default()))?;
        same("the reply", &before, &ask(model, &request)?.text)?;
    }
    Ok(())
}

fn first_half(text: &str) -> usize {
    let mut at = text.len() / 2;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn budget(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    let request = requests(probe, model).swap_remove(0).max_tokens(4);
    let count = said(model.count(&request.input))?;
    let each = count.planned() as u64 + 4;
    // Room for some of the calls, not for all.
    let fit = (probe.concurrent as u64 / 8).max(1);
    let limit = Limit {
        tokens: Some(each * fit),
        ..Limit::default()
    };
    let budget = Arc::new(Budget::new(limit));
    let model: Arc<dyn ChatModel> = Arc::new(Budgeted::new(Arc::clone(model), Arc::clone(&budget)));
    let done = AtomicUsize::new(0);
    let failures = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..probe.concurrent)
            .map(|_| {
                scope.spawn(
                    || match model.reply(&request, &Call::default(), &mut ignore) {
                        Ok(_) => {
                            done.fetch_add(1, Ordering::SeqCst);
                            None
                        }
                        Err(ChatError::Budget(_)) => None,
                        Err(error) => Some(error.to_string()),
                    },
                )
            })
            .collect();
        let ends = calls
            .into_iter()
            .filter_map(|call| call.join().unwrap_or(Some("a panic".into())));
        ends.collect::<Vec<_>>()
    });
    if let Some(failure) = failures.first() {
        return Err(failure.clone());
    }
    let spent = budget.spent();
    let tokens = spent.prompt_tokens + spent.completion_tokens;
    let done = done.into_inner() as u64;
    same("calls and ledger", &done, &spent.calls)?;
    if count.exact && (tokens > each * fit || done == 0) {
        return Err(format!(
            "{tokens} tokens spent of {}, {done} calls",
            each * fit
        ));
    }
    Ok(())
}

fn replay(model: &Arc<dyn ChatModel>, probe: &Probe<'_>) -> Result<(), String> {
    // The same identity, but nobody there.
    struct Gone(super::model::Card);
    impl ChatModel for Gone {
        fn card(&self) -> &super::model::Card {
            &self.0
        }
        fn count(&self, input: &Input) -> ChatResult<super::model::TokenCount> {
            Scripted::new(|_| Ok(String::new())).count(input)
        }
        fn count_text(&self, text: &str) -> ChatResult<super::model::TokenCount> {
            Scripted::new(|_| Ok(String::new())).count_text(text)
        }
        fn reply(&self, _: &Request, _: &Call, _: super::model::OnText<'_>) -> ChatResult<Reply> {
            Err(ChatError::Protocol("the model was asked".into()))
        }
    }
    let path = probe.folder.join("conformance-cache.sqlite");
    let store = Arc::new(said(CacheStore::open(&path))?);
    let recorded: Arc<dyn ChatModel> = Arc::new(Cached::new(
        Arc::clone(model),
        Arc::clone(&store),
        CacheMode::Record,
    ));
    let gone: Arc<dyn ChatModel> = Arc::new(Gone(model.card().clone()));
    let replayed: Arc<dyn ChatModel> = Arc::new(Cached::new(gone, store, CacheMode::Replay));
    for request in requests(probe, model) {
        let request = match model.card().can(Ability::Logprobs) {
            true => request.logprobs(2),
            false => request,
        };
        let first = ask(&recorded, &request)?;
        let mut again = ask(&replayed, &request)?;
        same("from the cache", &true, &again.from_cache)?;
        again.from_cache = false;
        same("reply", &first, &again)?;
        let other = request.max_tokens(probe.max_tokens + 1);
        if !matches!(
            replayed.ask(&other, &Call::default()),
            Err(ChatError::Store(_))
        ) {
            return Err("a request that was not recorded has an answer".into());
        }
    }
    Ok(())
}
