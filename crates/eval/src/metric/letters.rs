//! Reading the chosen letters, A to D, out of a free reply: L-Eval's rules for its exams, and LongBench v2's.

use std::collections::BTreeSet;

use crate::python::chars::is_space;
use crate::python::text::split;

const LETTERS: [char; 4] = ['A', 'B', 'C', 'D'];

fn is_letter(c: char) -> bool {
    LETTERS.contains(&c)
}

/// The letters of a reply, each once, in order; "None" for a blank reply, "A" where nothing is found.
/// `several`: the exam has questions with more than one right letter (Coursera).
pub fn predicted(reply: &str, several: bool) -> String {
    if reply.chars().all(is_space) {
        return "None".into();
    }
    if "ABCD".contains(reply) {
        return reply.into();
    }
    if !several && let Some(letter) = reply.chars().find(|&c| is_letter(c)) {
        return letter.into();
    }
    let lead = reply.find(|c| !is_letter(c)).unwrap_or(reply.len());
    let (lead, rest) = reply.split_at(lead);
    let mut letters: BTreeSet<char> = lead.chars().collect();
    if lead.len() <= 1 {
        let rest = rest.split("Question").next().unwrap_or("");
        letters.extend(standing_alone(rest).filter(|&c| is_letter(c)));
        if letters.is_empty() {
            let run = rest.chars().skip_while(|&c| !is_letter(c));
            letters.extend(run.take_while(|&c| is_letter(c)));
        }
    }
    if letters.is_empty() {
        return "A".into();
    }
    letters.into_iter().collect()
}

/// Upper-case ASCII letters before whitespace, a full stop or a closing parenthesis.
fn standing_alone(text: &str) -> impl Iterator<Item = char> + '_ {
    text.chars()
        .zip(text.chars().skip(1))
        .filter(|&(c, next)| {
            c.is_ascii_uppercase() && (is_space(next) || matches!(next, '.' | ')'))
        })
        .map(|(c, _)| c)
}

/// The letters of a gold answer: those in its first word; "A" where there are none.
pub fn gold(answer: &str) -> String {
    let first = split(answer).next().unwrap_or("");
    let letters: String = first.chars().filter(|&c| is_letter(c)).collect();
    if letters.is_empty() {
        "A".into()
    } else {
        letters
    }
}

/// LongBench v2: the letter of "The correct answer is (X)", or of the same without parentheses; asterisks are
/// dropped first. `None` where neither occurs.
pub fn correct_answer_is(reply: &str) -> Option<char> {
    let reply = reply.replace('*', "");
    let after = |phrase: &str, close: &str| {
        reply.match_indices(phrase).find_map(|(at, _)| {
            let mut rest = reply[at + phrase.len()..].chars();
            let letter = rest.next().filter(|&c| is_letter(c))?;
            rest.as_str().starts_with(close).then_some(letter)
        })
    };
    after("The correct answer is (", ")").or_else(|| after("The correct answer is ", ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_reads_both_forms() {
        assert_eq!(
            correct_answer_is("**The correct answer is (C)**"),
            Some('C')
        );
        assert_eq!(correct_answer_is("The correct answer is B."), Some('B'));
        assert_eq!(
            correct_answer_is("The correct answer is (E). The correct answer is (A)"),
            Some('A')
        );
        assert_eq!(correct_answer_is("The answer is A"), None);
    }
}
