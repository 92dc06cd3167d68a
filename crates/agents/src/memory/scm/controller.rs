//! Which old turns a request activates, and in which form: the published code's loop, the paper's scores,
//! and the plain selection both are compared with. Pure decisions over counts and scores; the questions to
//! the model are the caller's.

use super::{Combine, ScmConfig, ScmError};
use std::cmp::Ordering;

/// A turn as the controller sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Tokens of the whole turn.
    pub text_tokens: usize,
    /// Tokens of its summary.
    pub summary_tokens: usize,
    /// Cosine of its embedding with the input's.
    pub relevance: f32,
    /// Turns since it was last looked at.
    pub age: usize,
}

/// How a turn enters the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Word for word.
    Text,
    /// Its summary.
    Summary,
}

impl Candidate {
    fn tokens(&self, form: Form) -> usize {
        match form {
            Form::Text => self.text_tokens,
            Form::Summary => self.summary_tokens,
        }
    }
}

/// What the controller decided.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Activation {
    /// Turns by position in the stream, in chronological order.
    pub items: Vec<(usize, Form)>,
    /// The same turns, most relevant first.
    pub by_relevance: Vec<usize>,
    /// Questions asked.
    pub questions: usize,
    /// Of those, replies that were neither yes nor no; the turn was kept.
    pub unclear: usize,
    /// Turns left out because even their summaries did not fit.
    pub left_out: usize,
    /// Why nothing or little is activated, in words.
    pub reason: String,
}

/// Asks whether turn `item` in this form can answer the input: yes, no, or neither.
pub type Judge<'a> = &'a mut dyn FnMut(usize, Form) -> Result<Option<bool>, ScmError>;

/// Turns by ascending score; of equals the later one counts as the better.
fn ascending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].partial_cmp(&scores[b]).unwrap_or(Ordering::Equal));
    order
}

fn relevances(candidates: &[Candidate]) -> Vec<f64> {
    candidates.iter().map(|c| f64::from(c.relevance)).collect()
}

/// The last `k` of these.
fn best(mut order: Vec<usize>, k: usize) -> Vec<usize> {
    order.split_off(order.len().saturating_sub(k))
}

fn activation(choices: &[(usize, Option<Form>)]) -> Activation {
    let mut items: Vec<(usize, Form)> = (choices.iter())
        .filter_map(|&(item, form)| Some((item, form?)))
        .collect();
    let by_relevance = items.iter().rev().map(|entry| entry.0).collect();
    items.sort_unstable_by_key(|entry| entry.0);
    Activation {
        items,
        by_relevance,
        ..Activation::default()
    }
}

/// Tokens that the turn before takes from the budget.
pub fn flash_budget(last: &Candidate, flash_tokens: usize) -> usize {
    match last.text_tokens <= flash_tokens {
        true => last.text_tokens,
        false => last.summary_tokens,
    }
}

/// The form of the turn before in the prompt. (At the limit itself the published code counts the whole text
/// in [`flash_budget`] and shows the summary; so do we.)
pub fn flash_form(last: &Candidate, flash_tokens: usize) -> Form {
    match last.text_tokens < flash_tokens {
        true => Form::Text,
        false => Form::Summary,
    }
}

/// The published code's controller: the `k` most similar turns, whole while they fit; else each is judged,
/// least similar first, and later shortened, until they fit `history` tokens together with the turn before.
///
/// # Errors
/// What the judge says.
pub fn code(
    candidates: &[Candidate],
    flash: usize,
    k: usize,
    history: usize,
    judge: Judge<'_>,
) -> Result<Activation, ScmError> {
    let selected = best(ascending(&relevances(candidates)), k);
    let mut choices: Vec<(usize, Option<Form>)> = selected
        .iter()
        .map(|&item| (item, Some(Form::Text)))
        .collect();
    let (mut questions, mut unclear, mut left_out) = (0, 0, 0);
    let over = |choices: &[(usize, Option<Form>)]| {
        let tokens = |&(item, form): &(usize, Option<Form>)| {
            form.map_or(0, |form| candidates[item].tokens(form))
        };
        choices.iter().map(tokens).sum::<usize>() + flash > history
    };
    let mut round = 1;
    while over(&choices) {
        let before = choices.clone();
        for at in 0..choices.len() {
            let (item, form) = choices[at];
            if round > 1 {
                if form == Some(Form::Text) {
                    choices[at].1 = Some(Form::Summary);
                }
                if !over(&choices) {
                    break;
                }
                continue;
            }
            // The most similar turn is kept unasked.
            if at + 1 < choices.len() {
                let mut ask = |form| -> Result<Option<bool>, ScmError> {
                    questions += 1;
                    let answer = judge(item, form)?;
                    unclear += usize::from(answer.is_none());
                    Ok(answer)
                };
                choices[at].1 = match ask(Form::Text)? {
                    Some(false) => None,
                    None => Some(Form::Text),
                    Some(true) => match ask(Form::Summary)? {
                        Some(true) => Some(Form::Summary),
                        _ => Some(Form::Text),
                    },
                };
            }
        }
        // The published loop never ends when all summaries together do not fit.
        if round > 1 && choices == before {
            match choices.iter_mut().find(|choice| choice.1.is_some()) {
                Some(choice) => choice.1 = None,
                None => break,
            }
            left_out += 1;
        }
        round += 1;
    }
    Ok(Activation {
        questions,
        unclear,
        left_out,
        ..activation(&choices)
    })
}

/// No controller: the `k` most similar turns word for word, most similar first, up to the first that does
/// not fit. The flag says that the only turn is longer than the budget and must be cut to 2000 characters.
pub fn naive(candidates: &[Candidate], k: usize, history: usize) -> (Activation, bool) {
    let selected = best(ascending(&relevances(candidates)), k);
    let mut total = 0;
    let mut choices = Vec::new();
    for &item in selected.iter().rev() {
        total += candidates[item].text_tokens;
        if total >= history {
            break;
        }
        choices.push((item, Some(Form::Text)));
    }
    let cut = choices.is_empty() && !selected.is_empty();
    if let (true, Some(&first)) = (cut, selected.last()) {
        choices.push((first, Some(Form::Text)));
    }
    choices.reverse();
    (activation(&choices), cut)
}

/// What the paper ranks by: relevance and recency. Recency falls with the turns since the item was last
/// activated, not since it was said.
pub fn scores(candidates: &[Candidate], config: &ScmConfig) -> Vec<f64> {
    let mut relevance = relevances(candidates);
    let mut recency: Vec<f64> = (candidates.iter())
        .map(|candidate| config.decay.powi(candidate.age.min(1 << 20) as i32))
        .collect();
    if config.normalise {
        scale(&mut relevance);
        scale(&mut recency);
    }
    let combined = relevance.iter().zip(&recency);
    combined
        .map(|(relevance, recency)| match config.combine {
            Combine::Sum => relevance + config.recency_weight * recency,
            Combine::Product => relevance * recency,
        })
        .collect()
}

/// To 0..1 by the least and greatest.
fn scale(values: &mut [f64]) {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let width = most - least;
    for value in values {
        *value = if width > 0.0 {
            (*value - least) / width
        } else {
            1.0
        };
    }
}

/// Whether the turns of these indices answer the question; none = unclear.
pub type Suffices<'a> = dyn FnMut(&[usize]) -> Result<Option<bool>, ScmError> + 'a;

/// The paper's controller: does the input need memory beyond the turn before; the `k` best by [`scores`]; do
/// their summaries suffice. What does not fit `history` is shortened, then left out, worst first.
///
/// # Errors
/// What the questions say.
pub fn paper(
    candidates: &[Candidate],
    flash: usize,
    history: usize,
    config: &ScmConfig,
    needed: &mut dyn FnMut() -> Result<Option<bool>, ScmError>,
    suffices: &mut Suffices,
) -> Result<Activation, ScmError> {
    let (mut questions, mut unclear, mut left_out) = (0, 0, 0);
    if candidates.is_empty() {
        return Ok(Activation::default());
    }
    if config.activation_question {
        questions += 1;
        match needed()? {
            Some(false) => {
                return Ok(Activation {
                    questions,
                    reason: "the input needs no memory".into(),
                    ..Activation::default()
                });
            }
            Some(true) => {}
            None => unclear += 1,
        }
    }
    let selected = best(ascending(&scores(candidates, config)), config.k);
    let shorter = |&&item: &&usize| candidates[item].summary_tokens < candidates[item].text_tokens;
    let mut form = Form::Text;
    if config.sufficiency_question && selected.iter().any(|item| shorter(&item)) {
        questions += 1;
        let mut chronological = selected.clone();
        chronological.sort_unstable();
        match suffices(&chronological)? {
            Some(true) => form = Form::Summary,
            Some(false) => {}
            None => unclear += 1,
        }
    }
    // Best first: whole (or as a summary) while it fits, else its summary, else not.
    let mut room = history.saturating_sub(flash);
    let mut choices = Vec::new();
    for &item in selected.iter().rev() {
        let fitting = [form, Form::Summary]
            .into_iter()
            .find(|&form| candidates[item].tokens(form) <= room);
        match fitting {
            Some(form) => room -= candidates[item].tokens(form),
            None => left_out += 1,
        }
        choices.push((item, fitting));
    }
    choices.reverse();
    Ok(Activation {
        questions,
        unclear,
        left_out,
        ..activation(&choices)
    })
}

/// A reply to a question with the answers (A) yes and (B) no. Anything that names both or neither is
/// neither.
pub fn yes_or_no(reply: &str) -> Option<bool> {
    let upper = reply.to_uppercase();
    match (upper.contains("(A)"), upper.contains("(B)")) {
        (true, false) => return Some(true),
        (false, true) => return Some(false),
        (true, true) => return None,
        (false, false) => {}
    }
    let first = upper
        .split(|c: char| !c.is_alphanumeric())
        .find(|word| !word.is_empty())?;
    match first {
        "A" | "YES" => Some(true),
        "B" | "NO" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(sizes: &[(usize, usize, f32, usize)]) -> Vec<Candidate> {
        let turn = |&(text_tokens, summary_tokens, relevance, age): &(usize, usize, f32, usize)| {
            Candidate {
                text_tokens,
                summary_tokens,
                relevance,
                age,
            }
        };
        sizes.iter().map(turn).collect()
    }

    #[test]
    fn replies_are_read_without_guessing() {
        for (reply, want) in [
            ("(A)", Some(true)),
            (" (b) No, it cannot.", Some(false)),
            ("A", Some(true)),
            ("B. no", Some(false)),
            ("Yes, because ...", Some(true)),
            ("no", Some(false)),
            ("(A) or (B)", None),
            ("Perhaps yes", None),
            ("Apples", None),
            ("", None),
        ] {
            assert_eq!(yes_or_no(reply), want, "{reply:?}");
        }
    }

    #[test]
    fn the_loop_ends_for_any_sizes() {
        let mut random = longspan_data::random::Random::new(3, "sizes");
        for _ in 0..1000 {
            let count = random.between(0, 9);
            let candidates: Vec<Candidate> = (0..count)
                .map(|_| Candidate {
                    text_tokens: random.between(0, 2000),
                    summary_tokens: random.between(0, 2000),
                    relevance: random.uniform() as f32,
                    age: random.between(0, 50),
                })
                .collect();
            let (history, flash) = (random.between(0, 3000), random.between(0, 600));
            let mut answers = random;
            let mut judge =
                |_: usize, _: Form| Ok([Some(true), Some(false), None][answers.between(0, 2)]);
            let by_code = code(&candidates, flash, 6, history, &mut judge).unwrap();
            let config = ScmConfig::default();
            let (mut yes, mut no) = (|| Ok(None), |_: &[usize]| Ok(Some(false)));
            let by_paper = paper(&candidates, flash, history, &config, &mut yes, &mut no).unwrap();
            for activation in [by_code, by_paper] {
                let tokens: usize = (activation.items.iter())
                    .map(|&(item, form)| candidates[item].tokens(form))
                    .sum();
                assert!(activation.items.is_empty() || tokens + flash <= history);
                assert!(activation.items.is_sorted_by_key(|entry| entry.0));
                assert!(activation.items.len() <= 6);
            }
        }
    }

    #[test]
    fn under_budget_nothing_is_asked_and_everything_is_whole() {
        let candidates = turns(&[(10, 5, 0.1, 1), (10, 5, 0.9, 1), (10, 5, 0.5, 1)]);
        let mut judge = |_: usize, _: Form| -> Result<Option<bool>, ScmError> { panic!("asked") };
        let all = code(&candidates, 10, 6, 1000, &mut judge).unwrap();
        assert_eq!(
            all.items,
            [(0, Form::Text), (1, Form::Text), (2, Form::Text)]
        );
        assert_eq!(all.by_relevance, [1, 2, 0]);
        let two = code(&candidates, 10, 2, 1000, &mut judge).unwrap();
        assert_eq!(two.items, [(1, Form::Text), (2, Form::Text)]);
    }

    #[test]
    fn recency_decides_between_equals_and_is_counted_from_the_last_access() {
        let candidates = turns(&[(10, 5, 0.5, 200), (10, 5, 0.5, 3)]);
        let paper = ScmConfig {
            recency_weight: 1.0,
            ..ScmConfig::default()
        };
        let scores = scores(&candidates, &paper);
        assert!((scores[0] - (0.5 + 0.995f64.powi(200))).abs() < 1e-12 && scores[1] > scores[0]);
        let product = ScmConfig {
            combine: Combine::Product,
            ..ScmConfig::default()
        };
        assert!((super::scores(&candidates, &product)[1] - 0.5 * 0.995f64.powi(3)).abs() < 1e-12);
        let none = ScmConfig {
            recency_weight: 0.0,
            ..ScmConfig::default()
        };
        assert_eq!(super::scores(&candidates, &none), [0.5, 0.5]);
    }

    #[test]
    fn the_paper_asks_first_whether_and_then_how() {
        let candidates = turns(&[(100, 10, 0.2, 1), (100, 10, 0.9, 1), (100, 10, 0.4, 1)]);
        let config = ScmConfig {
            k: 2,
            ..ScmConfig::default()
        };
        let run = |need: Option<bool>, enough: Option<bool>, history: usize| {
            let (mut needed, mut suffices) = (|| Ok(need), |_: &[usize]| Ok(enough));
            paper(&candidates, 0, history, &config, &mut needed, &mut suffices).unwrap()
        };
        assert!(run(Some(false), None, 500).items.is_empty());
        let whole = run(Some(true), Some(false), 500);
        assert_eq!(whole.items, [(1, Form::Text), (2, Form::Text)]);
        let short = run(Some(true), Some(true), 500);
        assert_eq!(short.items, [(1, Form::Summary), (2, Form::Summary)]);
        let unclear = run(None, None, 500);
        assert_eq!((unclear.items.len(), unclear.unclear), (2, 2));
        // The best is whole, the next shortened; then left out.
        assert_eq!(
            run(Some(true), Some(false), 120).items,
            [(1, Form::Text), (2, Form::Summary)]
        );
        let tight = run(Some(true), Some(false), 105);
        assert_eq!((tight.items, tight.left_out), (vec![(1, Form::Text)], 1));
    }
}
