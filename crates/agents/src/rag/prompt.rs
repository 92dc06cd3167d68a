//! Passages into a prompt: the worst are dropped until the rest fits, then they are put into order, then
//! written. Long-Context LLMs Meet RAG, arXiv 2410.05983.

use super::reorder::Order;
use crate::chat::model::{ChatError, ChatModel, Input};
use crate::chat::template::{Message, Role};

/// A passage as the prompt shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown<'a> {
    /// Where it is from.
    pub title: &'a str,
    /// What it says.
    pub text: &'a str,
}

/// `Doc i (Title: "...") text`, i from 1.
pub fn render(number: usize, passage: &Shown<'_>) -> String {
    let title = passage.title.replace(['"', '\n'], " ");
    let text = passage.text.trim();
    format!("Doc {number} (Title: \"{title}\") {text}")
}

/// The task, the passages in the order given, the question last.
pub fn question_prompt(passages: &[Shown<'_>], question: &str) -> String {
    let mut prompt = String::from(
        "Answer the question from the documents below. Give only the answer, in a few words, and nothing else.\n\n\
         The following are given documents.\n\n",
    );
    for (index, passage) in passages.iter().enumerate() {
        prompt.push_str(&render(index + 1, passage));
        prompt.push_str("\n\n");
    }
    prompt.push_str(&format!("Question: {question}\nAnswer:"));
    prompt
}

/// A prompt that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The message.
    pub text: String,
    /// `order[position]`: rank (from 0) of the passage that stands there.
    pub order: Vec<usize>,
    /// Its tokens, template included; estimates with their margin.
    pub tokens: usize,
}

/// The prompt of as many of the best passages as fit `budget` tokens, in this order. Exact where the model
/// counts exactly: whole prompts are counted, not sums of pieces.
///
/// # Errors
/// [`ChatError::ContextOverflow`] if the question alone does not fit; what the model's counting says.
pub fn pack(
    model: &dyn ChatModel,
    ranked: &[Shown<'_>],
    question: &str,
    order: Order,
    budget: usize,
) -> Result<Packed, ChatError> {
    let with = |kept: usize| -> Result<Packed, ChatError> {
        let order = order.ranks(kept);
        let shown: Vec<Shown> = order.iter().map(|&rank| ranked[rank]).collect();
        let text = question_prompt(&shown, question);
        let input = Input::Chat(vec![Message::new(Role::User, text.clone())]);
        let tokens = model.count(&input)?.planned();
        Ok(Packed {
            text,
            order,
            tokens,
        })
    };
    let all = with(ranked.len())?;
    if all.tokens <= budget {
        return Ok(all);
    }
    // The greatest number that fits: `fits` are enough room, `over` are too many.
    let mut best = with(0)?;
    if best.tokens > budget {
        return Err(ChatError::ContextOverflow {
            tokens: best.tokens,
            max: budget,
        });
    }
    let (mut fits, mut over) = (0, ranked.len());
    while over - fits > 1 {
        let middle = fits + (over - fits) / 2;
        let packed = with(middle)?;
        if packed.tokens <= budget {
            (fits, best) = (middle, packed);
        } else {
            over = middle;
        }
    }
    Ok(best)
}
