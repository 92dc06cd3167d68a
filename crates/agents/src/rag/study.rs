//! A corpus with known answers for measuring readers of many passages: facts of invented places, each among passages
//! that share its place, its kind, or the words of its question. For curves over the number of passages, the effect of
//! their order and of hard negatives. Long-Context LLMs Meet RAG, arXiv 2410.05983, sections 3 and 4.

use super::chunk::ChunkConfig;
use super::embed::Embedder;
use super::index::{Index, IndexError, Retriever};
use super::negatives::{contains, exact_match, fisher_yates, hard_negatives};
use super::prompt::{Shown, pack, question_prompt};
use super::reorder::Order;
use super::retrieve::Bm25Config;
use crate::chat::model::{Call, ChatError, ChatModel, Request};
use longspan_data::document::{Document, Format};
use longspan_data::random::Random;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;

/// A passage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// The place.
    pub title: String,
    /// What it says.
    pub text: String,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// In other words than the passage.
    pub text: String,
    /// The only right answer.
    pub answer: String,
    /// Which passage holds it.
    pub gold: usize,
}

/// Passages and questions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// In no order that matters.
    pub passages: Vec<Passage>,
    /// About some of them.
    pub questions: Vec<Question>,
}

/// What a value is.
#[derive(Clone, Copy)]
enum Value {
    Person,
    Year,
    Code,
    Thing,
}

/// (statement, question, a remark that has the question's words and no answer, value). `E` is the place, `V` the value.
const KINDS: [(&str, &str, &str, Value); 8] = [
    (
        "The lighthouse of E is kept by V, who climbs its stairs each evening.",
        "Who looks after the lighthouse of E?",
        "Visitors like to ask who looks after the lighthouse of E, and are sent to the town hall for a reply.",
        Value::Person,
    ),
    (
        "Work on the stone bridge of E ended in V, after two floods.",
        "When was the bridge at E finished?",
        "Nobody at E agrees when the bridge was finished, and the parish book that told it was burnt.",
        Value::Year,
    ),
    (
        "The archive of E opens with the number V on its brass lock.",
        "Which code unlocks the archive in E?",
        "A sign in E warns that the code which unlocks the archive must not be told to strangers.",
        Value::Code,
    ),
    (
        "Traders from E sell above all V, which they pack in straw.",
        "What is the chief export of E?",
        "The chief export of E is a matter of pride there, and each family claims to have begun the trade.",
        Value::Thing,
    ),
    (
        "The school of E was founded by V with money from the salt tax.",
        "Who established the school in E?",
        "Children in E learn early to ask who established the school, since its portrait has no name.",
        Value::Person,
    ),
    (
        "The railway first reached E in V, on a day of heavy rain.",
        "In what year did trains begin to serve E?",
        "In what year trains began to serve E is asked in every quiz, and seldom answered.",
        Value::Year,
    ),
    (
        "The ferry that leaves from E carries the number V on its bow.",
        "What is written on the front of E's ferry?",
        "What is written on the front of E's ferry can be read from the pier on clear days only.",
        Value::Code,
    ),
    (
        "On the coat of arms of E one sees V under a crown.",
        "Which object does the shield of E show?",
        "Which object the shield of E should show was debated for three winters by its council.",
        Value::Thing,
    ),
];

const FIRST: [&str; 16] = [
    "Al", "Bren", "Cor", "Dor", "Esk", "Fen", "Gal", "Hol", "Ist", "Kel", "Lor", "Mir", "Nor",
    "Os", "Pel", "Tar",
];
const MIDDLE: [&str; 8] = ["a", "e", "i", "o", "ua", "ei", "ou", "ia"];
const LAST: [&str; 12] = [
    "dra", "mond", "vik", "stad", "wyn", "thal", "bury", "low", "mar", "ness", "port", "gate",
];
const GIVEN: [&str; 20] = [
    "Marta", "Ivo", "Selma", "Anton", "Runa", "Tilde", "Oskar", "Hanne", "Jorin", "Vera", "Emil",
    "Lotte", "Nils", "Greta", "Arvid", "Stina", "Pavel", "Dunja", "Rolf", "Ilse",
];
const FAMILY: [&str; 24] = [
    "Venn", "Okoro", "Halder", "Marsh", "Quist", "Tobin", "Arlo", "Benda", "Crewe", "Dahl",
    "Eklund", "Frost", "Gorman", "Holt", "Ilves", "Joyce", "Kemp", "Lunde", "Moreau", "Nagel",
    "Orme", "Pryor", "Rask", "Sorel",
];
const THINGS: [&str; 24] = [
    "copper kettles",
    "blue tiles",
    "paper kites",
    "glass beads",
    "stone owls",
    "wool hats",
    "cuckoo clocks",
    "salt lamps",
    "clay whistles",
    "silver spoons",
    "rope ladders",
    "garden gnomes",
    "velvet chairs",
    "ginger biscuits",
    "brass keys",
    "marble frogs",
    "wooden boats",
    "pickled plums",
    "tin soldiers",
    "linen sails",
    "walnut tables",
    "ink wells",
    "goose feathers",
    "honey jars",
];
const LOOKS: [&str; 12] = [
    "red", "large", "small", "old", "painted", "carved", "heavy", "plain", "striped", "pale",
    "fine", "rough",
];
const FILLER: [&str; 10] = [
    "In spring the fields around E stand under water for a week.",
    "Most houses of E have slate roofs and a bench beside the door.",
    "A market is held in E on the first Monday of the month.",
    "The road from E to the coast is narrow and lined with poplars.",
    "E has two inns, of which the older is closed in winter.",
    "People in E speak slowly and like to be asked for the way.",
    "The church of E lost its spire in a storm and never got another.",
    "A choir from E travels through the province in late summer.",
    "Fog lies over E on many mornings until the bells ring.",
    "The mayor of E is elected by show of hands behind the mill.",
];

impl Corpus {
    /// `places` places with a passage for every kind of fact, and for every question three passages that hold its words
    /// and no answer. Equal seeds give equal corpora.
    pub fn new(places: usize, questions: usize, seed: u64) -> Corpus {
        let mut random = Random::new(seed, "rag study");
        let mut names: Vec<String> = FIRST
            .iter()
            .flat_map(|first| MIDDLE.iter().map(move |middle| format!("{first}{middle}")))
            .flat_map(|begin| LAST.iter().map(move |last| format!("{begin}{last}")))
            .collect();
        fisher_yates(&mut names, || random.uniform());
        names.truncate(places.max(2));
        let mut pick = |list: &[&str]| {
            let at = (random.uniform() * list.len() as f64) as usize;
            list[at.min(list.len() - 1)].to_string()
        };
        let mut passages = Vec::new();
        let mut facts = Vec::new();
        let mut used = std::collections::HashSet::new();
        for name in &names {
            for (statement, question, _, value) in KINDS {
                // Values are seldom used twice; questions whose answer is in two passages are left out below.
                let mut tries = 0;
                let value = loop {
                    let value = match value {
                        Value::Person => format!("{} {}", pick(&GIVEN), pick(&FAMILY)),
                        Value::Year => format!("1{}", digits(&mut pick, 3)),
                        Value::Code => digits(&mut pick, 5),
                        Value::Thing => format!("{} {}", pick(&LOOKS), pick(&THINGS)),
                    };
                    tries += 1;
                    if used.insert(value.clone()) || tries > 50 {
                        break value;
                    }
                };
                // Names have no V of their own.
                let statement = statement.replace('E', name).replace('V', &value);
                facts.push((passages.len(), question.replace('E', name), value));
                let before = pick(&FILLER).replace('E', name);
                let after = pick(&FILLER).replace('E', name);
                passages.push(Passage {
                    title: name.clone(),
                    text: format!("{before} {statement} {after}"),
                });
            }
        }
        let mut random = Random::new(seed, "rag study questions");
        fisher_yates(&mut facts, || random.uniform());
        // One question for an answer.
        let once = |answer: &str| {
            let holds = passages.iter().filter(|p| contains(&p.text, &[answer]));
            holds.count() == 1
        };
        let mut asked = Vec::new();
        for (gold, text, answer) in facts {
            if asked.len() >= questions {
                break;
            }
            if once(&answer) {
                asked.push(Question { text, answer, gold });
            }
        }
        for question in &asked {
            let (kind, name) = (
                question.gold % KINDS.len(),
                &passages[question.gold].title.clone(),
            );
            for decoy in 0..3 {
                let mut around = Vec::new();
                for _ in 0..2 {
                    let at = (random.uniform() * FILLER.len() as f64) as usize;
                    around.push(FILLER[at.min(FILLER.len() - 1)].replace('E', name));
                }
                let remark = KINDS[kind].2.replace('E', name);
                let other = &names[(question.gold / KINDS.len() + decoy + 1) % names.len()];
                passages.push(Passage {
                    title: name.clone(),
                    text: match decoy {
                        0 => format!("{remark} {}", around[0]),
                        1 => format!("{} {remark} {}", around[0], around[1]),
                        _ => format!("{remark} They say the same of {other}. {}", around[1]),
                    },
                });
            }
        }
        Corpus {
            passages,
            questions: asked,
        }
    }

    /// An index of the passages, one each.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn index(&self, embedder: Option<&dyn Embedder>) -> Result<Index, IndexError> {
        // No passage is cut.
        let mut index = Index::in_memory(ChunkConfig { words: 1000 })?;
        let documents: Vec<Document> = self
            .passages
            .iter()
            .enumerate()
            .map(|(number, passage)| Document {
                name: number.to_string(),
                source: Format::Text,
                text: format!("{}: {}", passage.title, passage.text),
                warnings: Vec::new(),
            })
            .collect();
        index.add(&documents, embedder, &mut |_| ControlFlow::Continue(()))?;
        Ok(index)
    }

    /// The `k` passages that a retriever finds best for a question, best first.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn ranked(
        &self,
        index: &Index,
        question: &Question,
        k: usize,
        retriever: Retriever,
        embedder: Option<&dyn Embedder>,
    ) -> Result<Vec<usize>, IndexError> {
        let bm25 = Bm25Config::default();
        let hits = index.search(&question.text, k, retriever, &bm25, embedder)?;
        Ok(hits
            .iter()
            .filter_map(|hit| hit.document.parse().ok())
            .collect())
    }
}

fn digits(pick: &mut impl FnMut(&[&str]) -> String, count: usize) -> String {
    let first = pick(&["1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    let all = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    (1..count).fold(first, |text, _| text + &pick(&all))
}

/// Where the wrong passages of a prompt come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Negatives {
    /// Any passages.
    Random,
    /// Those that share most words with the question.
    Bm25,
    /// Those that are nearest to it in meaning.
    Dense,
}

/// Which passages a prompt shows, and in which order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "passages")]
pub enum Condition {
    /// The best `k` of a retriever, the right one wherever it stands among them, if it does.
    Retrieved {
        /// Which.
        retriever: Retriever,
        /// How many.
        k: usize,
        /// Their order in the prompt.
        order: Order,
    },
    /// The right one and `k - 1` hard negatives, shuffled (algorithm 1).
    Planted {
        /// Where the others come from.
        negatives: Negatives,
        /// How many in all.
        k: usize,
        /// Shuffles.
        seed: u64,
    },
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condition::Retrieved {
                retriever,
                k,
                order,
            } => write!(f, "{retriever} k={k} order={order}"),
            Condition::Planted { negatives, k, .. } => write!(f, "gold among {negatives} k={k}"),
        }
    }
}

impl fmt::Display for Negatives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Negatives::Random => "random",
            Negatives::Bm25 => "bm25",
            Negatives::Dense => "dense",
        })
    }
}

impl FromStr for Negatives {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "random" => Ok(Negatives::Random),
            "bm25" => Ok(Negatives::Bm25),
            "dense" => Ok(Negatives::Dense),
            _ => Err(format!(
                "negatives {text:?}: random, bm25 or dense expected"
            )),
        }
    }
}

/// How one question fared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Which question, from 0.
    pub question: usize,
    /// What was shown.
    #[serde(flatten)]
    pub condition: Condition,
    /// Passages shown.
    pub shown: usize,
    /// Place of the right one in the prompt, from 0; None if it was not shown.
    pub gold_at: Option<usize>,
    /// Its rank among the retrieved, from 0.
    pub gold_rank: Option<usize>,
    /// The reply.
    pub reply: String,
    /// A right answer occurs in it.
    pub right: bool,
    /// It is the right answer and nothing else.
    pub exact: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Seconds.
    pub seconds: f64,
}

/// Why a question has no row.
#[derive(Debug, thiserror::Error)]
pub enum StudyError {
    /// Retrieval.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The model.
    #[error(transparent)]
    Chat(#[from] ChatError),
}

/// Asks one question under one condition.
///
/// # Errors
/// See [`StudyError`].
pub fn ask(
    model: &dyn ChatModel,
    corpus: &Corpus,
    index: &Index,
    embedder: Option<&dyn Embedder>,
    number: usize,
    condition: &Condition,
    max_tokens: usize,
    call: &Call,
) -> Result<Row, StudyError> {
    let question = &corpus.questions[number];
    let shown = |list: &[usize]| -> Vec<Shown<'_>> {
        list.iter()
            .map(|&at| Shown {
                title: &corpus.passages[at].title,
                text: &corpus.passages[at].text,
            })
            .collect()
    };
    let all = corpus.passages.len();
    let (prompt, gold_rank, order) = match condition {
        Condition::Retrieved {
            retriever,
            k,
            order,
        } => {
            let ranked = corpus.ranked(index, question, *k, *retriever, embedder)?;
            let window = model.card().window.unwrap_or(usize::MAX);
            let budget = window.saturating_sub(max_tokens);
            let packed = pack(model, &shown(&ranked), &question.text, *order, budget)?;
            let rank = ranked.iter().position(|&at| at == question.gold);
            let order: Vec<usize> = packed.order.iter().map(|&rank| ranked[rank]).collect();
            (packed.text, rank, order)
        }
        Condition::Planted { negatives, k, seed } => {
            let mut random = Random::new(*seed, &format!("planted {number}"));
            let ranked = match negatives {
                Negatives::Random => {
                    let mut order: Vec<usize> = (0..all).collect();
                    fisher_yates(&mut order, || random.uniform());
                    order
                }
                Negatives::Bm25 => corpus.ranked(index, question, all, Retriever::Bm25, None)?,
                Negatives::Dense => {
                    corpus.ranked(index, question, all, Retriever::Dense, embedder)?
                }
            };
            let rank = ranked.iter().position(|&at| at == question.gold);
            let mut list = ranked;
            // Words that no passage shares rank none of them.
            if rank.is_none() {
                list.push(question.gold);
            }
            let gold = rank.unwrap_or(list.len() - 1);
            let texts: Vec<&str> = list
                .iter()
                .map(|&at| corpus.passages[at].text.as_str())
                .collect();
            let chosen = hard_negatives(&texts, gold, &[&question.answer], *k);
            let mut order: Vec<usize> = chosen.into_iter().map(|at| list[at]).collect();
            fisher_yates(&mut order, || random.uniform());
            (question_prompt(&shown(&order), &question.text), rank, order)
        }
    };
    let request = Request::user(prompt).max_tokens(max_tokens);
    let call = call.step("rag-study", format!("{condition} question {number}"));
    let reply = model.ask(&request, &call)?;
    Ok(Row {
        question: number,
        condition: condition.clone(),
        shown: order.len(),
        gold_at: order.iter().position(|&at| at == question.gold),
        gold_rank,
        right: contains(&reply.text, &[&question.answer]),
        exact: exact_match(&reply.text, &[&question.answer]),
        reply: reply.text,
        prompt_tokens: reply.usage.prompt,
        seconds: reply.total_s,
    })
}

/// What reordering should gain by the readers' own curve: the mean over ranks i of the right passage of
/// acc(place of i under `ends`) - acc(place i), where `accuracy[place]` was measured with the right passage there.
pub fn predicted_gain(ranks: &[usize], accuracy: &[f64]) -> f64 {
    let k = accuracy.len();
    let mut place = vec![0; k];
    for (position, &rank) in Order::Ends.ranks(k).iter().enumerate() {
        place[rank] = position;
    }
    let within: Vec<usize> = ranks.iter().copied().filter(|&rank| rank < k).collect();
    let gain: f64 = within
        .iter()
        .map(|&rank| accuracy[place[rank]] - accuracy[rank])
        .sum();
    gain / ranks.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::scripted::Scripted;
    use crate::rag::HashedWords;

    #[test]
    fn answers_are_in_one_passage_and_questions_in_other_words() {
        let corpus = Corpus::new(24, 30, 5);
        assert_eq!(corpus, Corpus::new(24, 30, 5));
        assert_ne!(corpus, Corpus::new(24, 30, 6));
        assert_eq!(corpus.questions.len(), 30);
        assert_eq!(corpus.passages.len(), 24 * 8 + 90);
        for question in &corpus.questions {
            let holds: Vec<usize> = (0..corpus.passages.len())
                .filter(|&at| contains(&corpus.passages[at].text, &[&question.answer]))
                .collect();
            assert_eq!(holds, [question.gold], "{question:?}");
            let title = &corpus.passages[question.gold].title;
            assert!(question.text.contains(title.as_str()), "{question:?}");
            assert!(!question.text.contains(&question.answer));
        }
    }

    /// Reads the first and the last two passages, nothing between.
    fn reader(answers: Vec<String>) -> Scripted {
        Scripted::new(move |request| {
            let text = request.input.plain();
            let parts: Vec<&str> = text.split("\n\nDoc ").collect();
            let seen = match parts.len() {
                n if n > 4 => [&parts[1..2], &parts[n - 2..]].concat().join(" "),
                _ => text.clone(),
            };
            // All answers that it sees: whose question it was does not matter to it.
            let said = answers
                .iter()
                .filter(|answer| seen.contains(answer.as_str()));
            Ok(said.cloned().collect::<Vec<_>>().join(", "))
        })
    }

    #[test]
    fn order_and_number_of_passages_matter_to_a_reader_of_ends() {
        let corpus = Corpus::new(12, 20, 1);
        let embedder = HashedWords::default();
        let index = corpus.index(Some(&embedder)).unwrap();
        let answers = corpus.questions.iter().map(|q| q.answer.clone()).collect();
        let model = reader(answers);
        let run = |condition: Condition| -> Vec<Row> {
            (0..20)
                .map(|number| {
                    ask(
                        &model,
                        &corpus,
                        &index,
                        Some(&embedder),
                        number,
                        &condition,
                        16,
                        &Call::default(),
                    )
                    .unwrap()
                })
                .collect()
        };
        let retrieved = |k, order| Condition::Retrieved {
            retriever: Retriever::Bm25,
            k,
            order,
        };
        let right = |rows: &[Row]| rows.iter().filter(|row| row.right).count();
        let (rank, ends) = (
            run(retrieved(20, Order::Rank)),
            run(retrieved(20, Order::Ends)),
        );
        for (a, b) in rank.iter().zip(&ends) {
            assert_eq!((a.gold_rank, a.gold_at), (b.gold_rank, a.gold_rank));
            assert_eq!((a.shown, b.shown), (20, 20));
        }
        // Decoys hold the question's words, so that the right passage is seldom the first.
        let ranks: Vec<usize> = rank.iter().filter_map(|row| row.gold_rank).collect();
        assert!(
            ranks.iter().filter(|&&rank| rank > 0).count() >= 10,
            "{ranks:?}"
        );
        let mut accuracy = vec![0.0; 20];
        for place in [0, 18, 19] {
            accuracy[place] = 1.0;
        }
        let gain = (right(&ends) as f64 - right(&rank) as f64) / 20.0;
        let predicted = predicted_gain(&ranks, &accuracy) * ranks.len() as f64 / 20.0;
        assert!((gain - predicted).abs() < 1e-9, "{gain} {predicted}");
        for negatives in [Negatives::Random, Negatives::Bm25, Negatives::Dense] {
            let rows = run(Condition::Planted {
                negatives,
                k: 10,
                seed: 3,
            });
            assert!(
                rows.iter()
                    .all(|row| row.shown == 10 && row.gold_at.is_some())
            );
            // What is shown decides: right wherever the passage stands at an end.
            for row in &rows {
                let end = matches!(row.gold_at, Some(0 | 8 | 9));
                assert_eq!(row.right, end, "{row:?}");
            }
        }
        let one = run(retrieved(1, Order::Rank));
        assert!(
            one.iter()
                .all(|row| row.right == (row.gold_rank == Some(0)))
        );
    }

    #[test]
    fn rows_are_read_as_they_are_written() {
        let row = Row {
            question: 3,
            condition: Condition::Retrieved {
                retriever: Retriever::Hybrid,
                k: 5,
                order: Order::Random(2),
            },
            shown: 5,
            gold_at: None,
            gold_rank: None,
            reply: "x".into(),
            right: false,
            exact: false,
            prompt_tokens: 9,
            seconds: 0.5,
        };
        let text = serde_json::to_string(&row).unwrap();
        assert_eq!(serde_json::from_str::<Row>(&text).unwrap(), row, "{text}");
    }
}
