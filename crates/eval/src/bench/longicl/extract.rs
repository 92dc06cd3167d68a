//! What of a response is the answer, for each data set of LongICLBench, and how answers are counted. A model may echo
//! the prompt; then what follows the echoed query counts.

use super::DataSet;
use crate::metric::micro_f1::Counts;
use crate::python::strip;

/// Deleted from Discovery's answers.
const DISCOVERY_DELETED: [char; 5] = ['“', '”', ',', '.', '"'];

/// The text after the last `mark`, or all of it.
fn after_last<'a>(text: &'a str, mark: &str) -> &'a str {
    text.rfind(mark).map_or(text, |at| &text[at + mark.len()..])
}

/// `text.split(mark)[0]`.
fn before<'a>(text: &'a str, mark: &str) -> &'a str {
    text.split(mark).next().unwrap_or("")
}

/// `text.split(mark)[1]`, or all of it where the mark does not occur.
fn second<'a>(text: &'a str, mark: &str) -> &'a str {
    text.split(mark).nth(1).unwrap_or(text)
}

fn first_line(text: &str) -> &str {
    before(text, "\n")
}

/// An answer up to where the next demonstration would start.
fn cued<'a>(response: &'a str, query: &str, start: &str, cue: &str) -> &'a str {
    let answer = if query.is_empty() || !response.contains(query) {
        before(response, start)
    } else {
        let rest = strip(after_last(response, query));
        before(second(rest, cue), start)
    };
    strip(first_line(strip(answer)))
}

/// The answer of a response to a query, for the sets with one label. Lower case, but for TacRED.
pub fn label(set: DataSet, response: &str, query: &str) -> String {
    match set {
        DataSet::Banking77 => {
            cued(response, query, "service query", "intent category:").to_lowercase()
        }
        DataSet::GoEmotions => {
            cued(response, query, "comment: ", "emotion category:").to_lowercase()
        }
        DataSet::Tacred => cued(
            response,
            query,
            "sentence:",
            "the relation between the two entities is:",
        )
        .to_string(),
        DataSet::Discovery => {
            let answer = if query.is_empty() || !response.contains(query) {
                response
            } else {
                second(
                    after_last(response, query),
                    "the most suitable conjunction word in the previous ( ) is ",
                )
            };
            discovery_label(first_line(strip(answer)))
        }
        DataSet::FewNerd | DataSet::DialogRe => strip(response).to_string(),
    }
}

/// Discovery's normal form, of answers and of gold labels: "also," is "also".
pub fn discovery_label(text: &str) -> String {
    let kept: String = text
        .chars()
        .filter(|c| !DISCOVERY_DELETED.contains(c))
        .collect();
    strip(&kept.to_lowercase()).to_string()
}

/// Few-NERD: the entities and their types, of lines "entity: type" up to the first other line. The last of equal
/// entities wins its type.
pub fn entities(response: &str, sentence: &str) -> Vec<(String, String)> {
    let rest = if !sentence.is_empty() && response.contains(sentence) {
        after_last(response, sentence)
    } else {
        response
    };
    let mut found: Vec<(String, String)> = Vec::new();
    for line in strip(rest).split('\n') {
        if line.is_empty()
            || !line.contains(": ")
            || line.starts_with("Sentence")
            || line.starts_with("sentence")
        {
            break;
        }
        let mut fields = line.split(": ");
        let (Some(entity), Some(kind)) = (fields.next(), fields.next()) else {
            break;
        };
        match found.iter_mut().find(|(name, _)| name == entity) {
            Some((_, old)) => *old = kind.into(),
            None => found.push((entity.into(), kind.into())),
        }
    }
    found
}

/// Counts of Few-NERD: an entity is right if its text and its type are.
pub fn entity_counts(predicted: &[(String, String)], gold: &[(String, String)]) -> Counts {
    Counts {
        predicted: predicted.len(),
        gold: gold.len(),
        correct: gold.iter().filter(|pair| predicted.contains(pair)).count(),
    }
}

/// DialogRE: the line of relations.
pub fn relations(response: &str, dialogue: &str, pairs: usize) -> String {
    let cue = format!("The {pairs} respective relations between each entity pair are:");
    let rest = if dialogue.is_empty() {
        response
    } else {
        after_last(response, dialogue)
    };
    let rest = after_last(rest, &cue);
    let rest = before(before(rest, "dialogue"), "Dialogue");
    strip(before(first_line(strip(rest)), "[/INST]")).to_string()
}

/// Counts of DialogRE: relations by place; right where the gold one is part of the predicted one.
pub fn relation_counts(predicted: &str, gold: &[&str], known: &[String]) -> Counts {
    let predicted: Vec<&str> = predicted.split(',').map(strip).collect();
    let is_known = |text: &&&str| known.iter().any(|k| text.contains(k.as_str()));
    let pairs = predicted.iter().zip(gold);
    Counts {
        predicted: predicted.iter().filter(is_known).count(),
        gold: gold.len(),
        correct: pairs.filter(|(p, g)| p.contains(**g)).count(),
    }
}
