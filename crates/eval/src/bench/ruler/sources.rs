//! Texts and words that RULER's generators draw from: what ships with the program (made for it),
//! or a folder with the official files.

use crate::error::{EvalError, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

const SHIPPED: &str = include_str!("../../../assets/ruler-sources.json");

/// A question with its documents, as indices into a document list.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The question.
    pub query: String,
    /// Accepted answers.
    pub outputs: Vec<String>,
    /// Documents that hold the answer.
    pub context: Vec<usize>,
    /// Documents of the same article.
    pub more: Vec<usize>,
}

/// Questions and all documents, sorted and without repeats.
#[derive(Clone, Debug, Default)]
pub struct QaSet {
    /// In file order.
    pub questions: Vec<Question>,
    /// Document texts.
    pub documents: Vec<String>,
}

/// All sources.
pub struct Sources {
    /// The essay's words: the text split at whitespace.
    pub essay: Vec<String>,
    /// `adjective-noun` keys, sorted.
    pub keys: Vec<String>,
    /// Nouns, adjectives and verbs, sorted, without repeats.
    pub words: Vec<String>,
    /// The big list for texts that need more words.
    pub english: Vec<String>,
    /// qa_1.
    pub squad: QaSet,
    /// qa_2.
    pub hotpotqa: QaSet,
}

#[derive(Deserialize)]
struct Raw {
    essay: String,
    nouns: Vec<String>,
    adjectives: Vec<String>,
    verbs: Vec<String>,
    english_words: Vec<String>,
    squad: Value,
    hotpotqa: Value,
}

impl Sources {
    /// What ships with the program.
    ///
    /// # Errors
    /// None in practice: the file is part of the program.
    pub fn shipped() -> Result<Sources> {
        Sources::from_text(SHIPPED, Path::new("ruler-sources.json"))
    }

    /// Sources from one JSON text: `essay`, `nouns`, `adjectives`, `verbs`, `english_words`,
    /// `squad`, `hotpotqa`.
    ///
    /// # Errors
    /// Missing or wrong fields; `path` names the text in messages.
    pub fn from_text(text: &str, path: &Path) -> Result<Sources> {
        let raw: Raw = serde_json::from_str(text).map_err(|error| EvalError::Row {
            path: path.into(),
            line: error.line(),
            reason: error.to_string(),
        })?;
        build(raw, path)
    }

    /// Sources from a folder: `sources.json` as shipped, or the official files
    /// `PaulGrahamEssays.json`, `english_words.json`, `squad.json`, `hotpotqa.json` and the word
    /// lists `nounlist.txt`, `adjectivelist.txt`, `verblist.txt`.
    ///
    /// # Errors
    /// Missing or wrong files.
    pub fn from_folder(folder: &Path) -> Result<Sources> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(EvalError::io(&path))
        };
        let one = folder.join("sources.json");
        if one.is_file() {
            return Sources::from_text(&read("sources.json")?, &one);
        }
        let json = |name: &str| -> Result<Value> {
            serde_json::from_str(&read(name)?).map_err(|error| EvalError::Row {
                path: folder.join(name),
                line: error.line(),
                reason: error.to_string(),
            })
        };
        let lines = |name: &str| -> Result<Vec<String>> {
            let text = read(name)?;
            let words = text.lines().map(str::trim).filter(|word| !word.is_empty());
            Ok(words.map(str::to_string).collect())
        };
        let english = json("english_words.json")?;
        let values = english.as_object().into_iter().flat_map(|map| map.values());
        let raw = Raw {
            essay: json("PaulGrahamEssays.json")?["text"]
                .as_str()
                .unwrap_or("")
                .into(),
            nouns: lines("nounlist.txt")?,
            adjectives: lines("adjectivelist.txt")?,
            verbs: lines("verblist.txt")?,
            english_words: values
                .filter_map(|v| v.as_str().map(str::to_string))
                .collect(),
            squad: json("squad.json")?,
            hotpotqa: json("hotpotqa.json")?,
        };
        build(raw, folder)
    }
}

fn build(raw: Raw, path: &Path) -> Result<Sources> {
    let keys: BTreeSet<String> = raw
        .adjectives
        .iter()
        .flat_map(|a| raw.nouns.iter().map(move |n| format!("{a}-{n}")))
        .collect();
    let words: BTreeSet<String> = raw
        .nouns
        .iter()
        .chain(&raw.adjectives)
        .chain(&raw.verbs)
        .cloned()
        .collect();
    let mut essay = String::new();
    let mut space = false;
    for c in raw.essay.chars() {
        if crate::python::chars::is_space(c) {
            space = true;
        } else {
            if std::mem::take(&mut space) {
                essay.push(' ');
            }
            essay.push(c);
        }
    }
    if space {
        essay.push(' ');
    }
    let sources = Sources {
        essay: essay.split(' ').map(str::to_string).collect(),
        keys: keys.into_iter().collect(),
        words: words.into_iter().collect(),
        english: raw.english_words,
        squad: squad(&raw.squad),
        hotpotqa: hotpotqa(&raw.hotpotqa),
    };
    let empty = [
        ("essay", raw.essay.is_empty()),
        ("nouns or adjectives", sources.keys.is_empty()),
        ("squad", sources.squad.questions.is_empty()),
        ("hotpotqa", sources.hotpotqa.questions.is_empty()),
    ];
    match empty.iter().find(|(_, empty)| *empty) {
        Some((name, _)) => Err(EvalError::Input(format!(
            "{}: {name}: found nothing usable",
            path.display()
        ))),
        None => Ok(sources),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("").to_string()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Documents sorted without repeats, and where each is.
fn index(documents: BTreeSet<String>) -> (Vec<String>, HashMap<String, usize>) {
    let documents: Vec<String> = documents.into_iter().collect();
    let at = documents
        .iter()
        .cloned()
        .enumerate()
        .map(|(i, d)| (d, i))
        .collect();
    (documents, at)
}

fn squad(value: &Value) -> QaSet {
    let paragraphs = || list(&value["data"]).flat_map(|d| list(&d["paragraphs"]));
    let (documents, at) = index(paragraphs().map(|p| text(&p["context"])).collect());
    let mut questions = Vec::new();
    for article in list(&value["data"]) {
        let of_article: Vec<usize> = list(&article["paragraphs"])
            .map(|p| at[&text(&p["context"])])
            .collect();
        for paragraph in list(&article["paragraphs"]) {
            let own = at[&text(&paragraph["context"])];
            for qa in list(&paragraph["qas"]) {
                if qa["is_impossible"].as_bool().unwrap_or(false) {
                    continue;
                }
                questions.push(Question {
                    query: text(&qa["question"]),
                    outputs: list(&qa["answers"]).map(|a| text(&a["text"])).collect(),
                    context: vec![own],
                    more: of_article.iter().copied().filter(|&i| i != own).collect(),
                });
            }
        }
    }
    QaSet {
        questions,
        documents,
    }
}

fn hotpotqa(value: &Value) -> QaSet {
    let document = |pair: &Value| {
        let sentences: String = list(&pair[1]).map(text).collect();
        format!("{}\n{sentences}", text(&pair[0]))
    };
    let all = list(value).flat_map(|d| list(&d["context"])).map(document);
    let (documents, at) = index(all.collect());
    let questions = list(value)
        .map(|d| Question {
            query: text(&d["question"]),
            outputs: vec![text(&d["answer"])],
            context: list(&d["context"])
                .map(|pair| at[&document(pair)])
                .collect(),
            more: Vec::new(),
        })
        .collect();
    QaSet {
        questions,
        documents,
    }
}
