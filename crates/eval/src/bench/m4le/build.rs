//! M4LE's construction: long instances of a wanted length, packed from a pool of short labelled texts, for four
//! abilities and whole documents. For anyone with a pool of their own. The published rows cannot be made again (their
//! ids come from the operating system); here one seed gives the same bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Row;
use super::score::Lang;
use crate::error::{EvalError, Result};
use crate::python::text::split;
use crate::python::{Random, format_fields};

/// What is asked about the packed items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The item with an id: its category, or a question about it.
    ExplicitSingle,
    /// The ids of all items of a category.
    ExplicitMultiple,
    /// A question that one of the items answers, or the id of the item with a title.
    SemanticSingle,
    /// How many items are of a category.
    SemanticMultiple,
    /// One whole document: its category or its summary.
    Global,
}

/// A text of a pool. A pool of one kind has labels, another questions with answers, titles, or summaries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    #[serde(alias = "paragraph")]
    pub text: String,
    #[serde(default)]
    pub label: Option<String>,
    #[serde(default)]
    pub title: Option<String>,
    #[serde(default)]
    pub question: Option<String>,
    #[serde(default)]
    pub answers: Vec<String>,
    #[serde(default)]
    pub summary: Option<String>,
}

/// How instances are made; the names and defaults are the published builder's.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    pub kind: Kind,
    /// Upper ends of length buckets, ascending: words, or characters of Chinese.
    pub buckets: Vec<usize>,
    /// Rows of a bucket.
    pub n_examples: usize,
    pub seed: u64,
    /// Texts are Chinese: lengths in characters, instructions in Chinese.
    pub chinese: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            kind: Kind::ExplicitSingle,
            buckets: vec![1000, 2000, 4000, 6000, 8000],
            n_examples: 200,
            seed: 111,
            chinese: false,
        }
    }
}

/// Tries at a length before the number of items changes.
const TRIES: usize = 200;
/// Changes of the number of items before giving up.
const CHANGES: usize = 40;
/// Items held out of the pool for the worked example.
const HELD_OUT: usize = 3;

/// Wording of one language.
struct Words {
    item: &'static str,
    id_label: (&'static str, &'static str),
    id_question: (&'static str, &'static str),
    multiple: (&'static str, &'static str),
    question: (&'static str, &'static str),
    title: (&'static str, &'static str),
    count: (&'static str, &'static str),
    document_label: (&'static str, &'static str),
    document_summary: (&'static str, &'static str),
    comma: &'static str,
}

const ENGLISH: Words = Words {
    item: "Article {id}: {text}",
    id_label: (
        "Several articles follow, each with an id. Give the category of the article whose id is asked for.",
        "Question: What is the category of article {id}?\nAnswer:",
    ),
    id_question: (
        "Several articles follow, each with an id. Answer the question from the article whose id is given.",
        "Question about article {id}: {question}\nAnswer:",
    ),
    multiple: (
        "Several articles follow, each with an id. Give the ids of all articles of the category that is asked for, in \
         order, separated by commas.",
        "Question: Which articles are about '{label}'?\nAnswer:",
    ),
    question: (
        "Several articles follow. One of them answers the question.",
        "Question: {question}\nAnswer:",
    ),
    title: (
        "Several articles follow, each with an id. Give the id of the article that has the title.",
        "Title: {title}\nAnswer:",
    ),
    count: (
        "Several articles follow. Count those of the category that is asked for.",
        "Question: How many articles are about '{label}'?\nAnswer:",
    ),
    document_label: (
        "Give the category of the document.",
        "Question: What is the category of the document?\nAnswer:",
    ),
    document_summary: ("Summarise the document.", "Summary:"),
    comma: ", ",
};

const CHINESE: Words = Words {
    item: "文章{id}：{text}",
    id_label: (
        "下面有几篇文章，每篇都有编号。请给出所问编号的文章的类别。",
        "问题：文章{id}属于哪个类别？\n回答：",
    ),
    id_question: (
        "下面有几篇文章，每篇都有编号。请根据给定编号的文章回答问题。",
        "关于文章{id}的问题：{question}\n回答：",
    ),
    multiple: (
        "下面有几篇文章，每篇都有编号。请按顺序给出属于所问类别的全部文章的编号，用逗号隔开。",
        "问题：哪些文章属于“{label}”？\n回答：",
    ),
    question: (
        "下面有几篇文章，其中一篇可以回答问题。",
        "问题：{question}\n回答：",
    ),
    title: (
        "下面有几篇文章，每篇都有编号。请给出与标题相符的文章的编号。",
        "标题：{title}\n回答：",
    ),
    count: (
        "下面有几篇文章。请数出属于所问类别的文章有几篇。",
        "问题：有几篇文章属于“{label}”？\n回答：",
    ),
    document_label: ("请给出文章的类别。", "问题：文章属于哪个类别？\n回答："),
    document_summary: ("请概括文章。", "摘要："),
    comma: "，",
};

/// One packed instance before its example and length are known.
struct Instance {
    /// Items and question.
    material: String,
    answers: Vec<String>,
    extra: BTreeMap<String, serde_json::Value>,
}

struct Builder<'a> {
    config: &'a Config,
    words: &'static Words,
    pool: Vec<&'a Item>,
    held_out: Vec<&'a Item>,
    random: Random,
}

/// Rows of all buckets. Every row's `total_length` lies above the bucket before its own and not above its own.
///
/// # Errors
/// A pool that lacks what the kind asks about, or is too small or its texts too long for a bucket.
pub fn build(pool: &[Item], config: &Config) -> Result<Vec<Row>> {
    let wrong = |text: String| EvalError::Input(format!("m4le build: {text}"));
    if config.buckets.is_empty() || !config.buckets.is_sorted_by(|a, b| a < b) {
        return Err(wrong(format!(
            "found buckets {:?}, expected ascending lengths",
            config.buckets
        )));
    }
    let usable: Vec<&Item> = pool
        .iter()
        .filter(|item| usable(config.kind, item))
        .collect();
    if usable.len() < HELD_OUT + 2 {
        return Err(wrong(format!(
            "found {} items that {}, expected at least {}",
            usable.len(),
            needs(config.kind),
            HELD_OUT + 2
        )));
    }
    let mut builder = Builder {
        config,
        words: if config.chinese { &CHINESE } else { &ENGLISH },
        pool: usable,
        held_out: Vec::new(),
        random: Random::new(i64::try_from(config.seed).unwrap_or(i64::MAX)),
    };
    builder.hold_out();
    let mut rows = Vec::new();
    let mut previous = 0;
    for &bucket in &config.buckets {
        rows.extend(match config.kind {
            Kind::Global => builder.whole_documents(previous, bucket)?,
            _ => builder.bucket(previous, bucket)?,
        });
        previous = bucket;
    }
    Ok(rows)
}

fn usable(kind: Kind, item: &Item) -> bool {
    let asked = item.question.is_some() && !item.answers.is_empty();
    match kind {
        Kind::ExplicitSingle => item.label.is_some() || asked,
        Kind::ExplicitMultiple | Kind::SemanticMultiple => item.label.is_some(),
        Kind::SemanticSingle => asked || item.title.is_some(),
        Kind::Global => item.label.is_some() || item.summary.is_some(),
    }
}

fn needs(kind: Kind) -> &'static str {
    match kind {
        Kind::ExplicitSingle => "have a label, or a question with answers",
        Kind::ExplicitMultiple | Kind::SemanticMultiple => "have a label",
        Kind::SemanticSingle => "have a question with answers, or a title",
        Kind::Global => "have a label or a summary",
    }
}

/// Depths of the gold item: 0, then every fifth (every tenth of 200 items or more), counted from 1.
pub fn gold_positions(items: usize) -> Vec<usize> {
    let step = if items >= 200 { 10 } else { 5 };
    std::iter::once(0)
        .chain((step - 1..items).step_by(step))
        .collect()
}

fn fill(template: &str, fields: &[(&str, &str)]) -> String {
    let field = |name: &str| {
        let found = fields.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).into())
    };
    format_fields(template, field).unwrap_or_else(|name| unreachable!("template without {name}"))
}

impl<'a> Builder<'a> {
    fn length(&self, text: &str) -> usize {
        if self.config.chinese {
            text.chars().count()
        } else {
            split(text).count()
        }
    }

    fn lang(&self) -> Lang {
        if self.config.chinese {
            Lang::Zh
        } else {
            Lang::En
        }
    }

    /// Takes the items of the worked example out of the pool: short ones, two of one label where there are.
    fn hold_out(&mut self) {
        let mut order: Vec<usize> = (0..self.pool.len()).collect();
        order.sort_by_key(|&i| (self.length(&self.pool[i].text), i));
        let label = |i: usize| self.pool[i].label.as_deref();
        let mut chosen = vec![order[0]];
        let same = order[1..]
            .iter()
            .find(|&&i| label(i).is_some() && label(i) == label(order[0]));
        chosen.extend(same.copied());
        for &i in &order {
            if chosen.len() < HELD_OUT && !chosen.contains(&i) {
                chosen.push(i);
            }
        }
        self.held_out = chosen.iter().map(|&i| self.pool[i]).collect();
        chosen.sort_unstable();
        for &i in chosen.iter().rev() {
            self.pool.remove(i);
        }
    }

    /// `count` distinct ids of six upper-case hexadecimal digits.
    fn ids(&mut self, count: usize) -> Vec<String> {
        let mut ids: Vec<String> = Vec::with_capacity(count);
        let mut seen = std::collections::HashSet::new();
        while ids.len() < count {
            let id = format!("{:06X}", self.random.getrandbits(24));
            if seen.insert(id.clone()) {
                ids.push(id);
            }
        }
        ids
    }

    /// Packs items around the gold position and asks.
    fn pack(&mut self, items: &[&Item], gold: usize) -> Instance {
        let ids = self.ids(items.len());
        let words = self.words;
        let (item, id) = (items[gold], ids[gold].as_str());
        let mut extra = BTreeMap::from([
            ("n_para".to_string(), json!(items.len())),
            ("gold_index".to_string(), json!(gold)),
        ]);
        let label = item.label.as_deref().unwrap_or("");
        let members: Vec<usize> = (0..items.len())
            .filter(|&i| items[i].label.is_some() && items[i].label == item.label)
            .collect();
        let asked = item
            .question
            .as_deref()
            .filter(|_| !item.answers.is_empty());
        let (question, answers) = match self.config.kind {
            Kind::ExplicitSingle => match (&item.label, asked) {
                (None, Some(question)) => (
                    fill(words.id_question.1, &[("id", id), ("question", question)]),
                    item.answers.clone(),
                ),
                _ => (
                    fill(words.id_label.1, &[("id", id)]),
                    vec![label.to_string()],
                ),
            },
            Kind::ExplicitMultiple => {
                let list: Vec<&str> = members.iter().map(|&i| ids[i].as_str()).collect();
                let mut labels: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
                for (i, item) in items.iter().enumerate() {
                    let label = item.label.as_deref().unwrap_or("");
                    labels.entry(label).or_default().push(&ids[i]);
                }
                extra.insert("labels".into(), json!(labels));
                (
                    fill(words.multiple.1, &[("label", label)]),
                    vec![list.join(words.comma)],
                )
            }
            Kind::SemanticSingle => match asked {
                Some(question) => (
                    fill(words.question.1, &[("question", question)]),
                    item.answers.clone(),
                ),
                None => (
                    fill(
                        words.title.1,
                        &[("title", item.title.as_deref().unwrap_or(""))],
                    ),
                    vec![id.to_string()],
                ),
            },
            Kind::SemanticMultiple => (
                fill(words.count.1, &[("label", label)]),
                vec![members.len().to_string()],
            ),
            Kind::Global => unreachable!("whole documents are not packed"),
        };
        let mut material = String::new();
        for (item, id) in items.iter().zip(&ids) {
            material += &fill(words.item, &[("id", id), ("text", &item.text)]);
            material += "\n\n";
        }
        material += &question;
        Instance {
            material,
            answers,
            extra,
        }
    }

    fn instruction(&self) -> &'static str {
        let words = self.words;
        let first = self.pool[0];
        let asked = first.question.is_some() && !first.answers.is_empty();
        match self.config.kind {
            Kind::ExplicitSingle if first.label.is_none() => words.id_question.0,
            Kind::ExplicitSingle => words.id_label.0,
            Kind::ExplicitMultiple => words.multiple.0,
            Kind::SemanticSingle if asked => words.question.0,
            Kind::SemanticSingle => words.title.0,
            Kind::SemanticMultiple => words.count.0,
            Kind::Global if first.summary.is_some() => words.document_summary.0,
            Kind::Global => words.document_label.0,
        }
    }

    /// The worked example, from items that occur nowhere else.
    fn example(&mut self) -> String {
        let held_out = self.held_out.clone();
        let instance = match self.config.kind {
            Kind::Global => self.document(held_out[0]),
            _ => self.pack(&held_out, 0),
        };
        format!("{} {}\n\n", instance.material, instance.answers[0])
    }

    fn document(&self, item: &Item) -> Instance {
        let (question, answer) = match &item.summary {
            Some(summary) => (self.words.document_summary.1, summary.clone()),
            None => (
                self.words.document_label.1,
                item.label.clone().unwrap_or_default(),
            ),
        };
        Instance {
            material: format!("{}\n\n{question}", item.text),
            answers: vec![answer],
            extra: BTreeMap::new(),
        }
    }

    fn row(&self, instance: Instance, example: &str, bucket: usize) -> Row {
        let instruction = self.instruction();
        let input = format!("{example}{}", instance.material);
        let input_length = self.length(instruction) + self.length(&input);
        let answer = instance.answers.first().map_or(0, |a| self.length(a));
        Row {
            instruction: instruction.into(),
            input,
            answers: instance.answers,
            input_length,
            total_length: input_length + answer,
            length_bucket: bucket,
            extra: instance.extra,
        }
    }

    /// Items of one instance with the gold one at `gold`; `wanted` members of its class for counting.
    fn draw(&mut self, count: usize, gold: usize, wanted: usize) -> Vec<&'a Item> {
        if self.config.kind == Kind::SemanticMultiple {
            let first = self.random.below(self.pool.len() as u64) as usize;
            let label = self.pool[first].label.clone();
            let (members, fillers): (Vec<&Item>, Vec<&Item>) =
                self.pool.iter().partition(|item| item.label == label);
            let wanted = wanted.min(members.len());
            let members = self.random.sample(&members, wanted);
            let fillers = self.random.sample(&fillers, count - wanted.min(count));
            let mut slots = self.random.sample_indices(count, wanted);
            if !slots.contains(&gold) {
                slots[0] = gold;
            }
            let (mut members, mut fillers) = (members.into_iter(), fillers.into_iter());
            return (0..count)
                .filter_map(|i| {
                    if slots.contains(&i) {
                        members.next()
                    } else {
                        fillers.next()
                    }
                })
                .copied()
                .collect();
        }
        let mut items: Vec<&Item> = self
            .random
            .sample(&self.pool, count)
            .into_iter()
            .copied()
            .collect();
        if self.config.kind == Kind::ExplicitMultiple {
            // The class asked for has two members at least, where any class has.
            let of = |item: &Item| items.iter().filter(|i| i.label == item.label).count();
            if let Some(several) = (0..items.len()).find(|&i| of(items[i]) >= 2) {
                items.swap(several, gold);
            }
        }
        items
    }

    fn bucket(&mut self, previous: usize, bucket: usize) -> Result<Vec<Row>> {
        let mut lengths: Vec<usize> = self.pool.iter().map(|i| self.length(&i.text)).collect();
        lengths.sort_unstable();
        let median = lengths[lengths.len() / 2].max(1);
        // As published, a bucket over the median; less what stands around the items, so that fewer are redrawn.
        let example = self.example();
        let around = self.length(self.instruction()) + self.length(&example) + 20;
        let mut count = bucket.saturating_sub(around).div_ceil(median).max(2);
        let mut shortest = usize::MAX;
        let mut longest = 0;
        for _ in 0..CHANGES {
            if count > self.pool.len() {
                count = self.pool.len();
            }
            match self.rows(previous, bucket, count, &example) {
                Ok(rows) => return Ok(rows),
                Err((low, high)) => {
                    (shortest, longest) = (shortest.min(low), longest.max(high));
                    if low > bucket && count > 2 {
                        count -= 1;
                    } else if high <= previous && count < self.pool.len() {
                        count += 1;
                    } else if low <= bucket && high > bucket && count > 2 {
                        count -= 1;
                    } else {
                        break;
                    }
                }
            }
        }
        Err(EvalError::Input(format!(
            "m4le build: no {count} of {} items give a length above {previous} and not above {bucket}; tried instances \
             were {shortest} to {longest} long. Take a larger pool, shorter texts, or other buckets",
            self.pool.len()
        )))
    }

    /// The rows of a bucket with `count` items each, or the range of lengths seen in a series of failures.
    fn rows(
        &mut self,
        previous: usize,
        bucket: usize,
        count: usize,
        example: &str,
    ) -> std::result::Result<Vec<Row>, (usize, usize)> {
        let positions = gold_positions(count);
        let most = 6.min(count.saturating_sub(2)).max(2).min(count);
        let mut rows = Vec::with_capacity(self.config.n_examples);
        for index in 0..self.config.n_examples {
            let gold = positions[index % positions.len()];
            let wanted = index % most + 1;
            let (mut low, mut high) = (usize::MAX, 0);
            let row = (0..TRIES).find_map(|_| {
                let items = self.draw(count, gold, wanted);
                if items.len() < count {
                    // Too few members or fillers of the class drawn.
                    return None;
                }
                let instance = self.pack(&items, gold);
                let row = self.row(instance, example, bucket);
                (low, high) = (low.min(row.total_length), high.max(row.total_length));
                (row.total_length > previous && row.total_length <= bucket).then_some(row)
            });
            match row {
                Some(row) => rows.push(row),
                None => return Err((low, high)),
            }
        }
        Ok(rows)
    }

    /// Documents that fall in the bucket; more than `n_examples` are sampled without replacement.
    fn whole_documents(&mut self, previous: usize, bucket: usize) -> Result<Vec<Row>> {
        let example = self.example();
        let mut rows: Vec<Row> = self
            .pool
            .iter()
            .map(|item| self.row(self.document(item), &example, bucket))
            .filter(|row| row.total_length > previous && row.total_length <= bucket)
            .collect();
        if rows.len() > self.config.n_examples {
            let chosen = self
                .random
                .sample_indices(rows.len(), self.config.n_examples);
            rows = chosen.into_iter().map(|i| rows[i].clone()).collect();
        }
        if rows.is_empty() {
            return Err(EvalError::Input(format!(
                "m4le build: no document of the pool ({}) is longer than {previous} and not longer than {bucket}",
                match self.lang() {
                    Lang::En => "lengths in words",
                    Lang::Zh => "lengths in characters",
                }
            )));
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: [&str; 5] = ["weather", "harbour", "markets", "music", "letters"];

    fn pool(count: usize) -> Vec<Item> {
        let mut random = Random::new(5);
        let nouns = ["gate", "bell", "ledger", "roof", "map", "clock", "crate"];
        (0..count)
            .map(|index| {
                let words = 40 + random.below(40) as usize;
                let label = LABELS[index % LABELS.len()];
                let text = (0..words).map(|_| *random.choice(&nouns).unwrap());
                Item {
                    text: format!(
                        "note {index} of {label} {}",
                        text.collect::<Vec<_>>().join(" ")
                    ),
                    label: Some(label.into()),
                    title: Some(format!("Title {index}")),
                    question: Some(format!("What is note {index}?")),
                    answers: vec![format!("of {label}, number {index}")],
                    summary: None,
                }
            })
            .collect()
    }

    /// Ids and texts of the packed items, read from the text alone; the worked example's come first.
    fn read(input: &str) -> Vec<(String, String)> {
        input
            .split("Article ")
            .skip(1)
            .filter_map(|part| part.split_once(": "))
            .map(|(id, text)| {
                (
                    id.to_string(),
                    text.split("\n\n").next().unwrap().to_string(),
                )
            })
            .filter(|(id, _)| id.len() == 6)
            .collect()
    }

    #[test]
    fn rows_keep_the_laws_and_a_reader_answers_them() {
        let pool = pool(120);
        let label_of = |text: &str| {
            let item = pool
                .iter()
                .find(|item| item.text == text)
                .expect("an item of the pool");
            item.label.clone().unwrap()
        };
        for kind in [
            Kind::ExplicitSingle,
            Kind::ExplicitMultiple,
            Kind::SemanticMultiple,
        ] {
            let config = Config {
                kind,
                buckets: vec![500, 1000, 2000],
                n_examples: 30,
                ..Config::default()
            };
            let rows = build(&pool, &config).unwrap();
            assert_eq!(rows.len(), 90);
            assert_eq!(rows, build(&pool, &config).unwrap(), "one seed, one result");
            for (index, row) in rows.iter().enumerate() {
                let previous = [0, 500, 1000][index / 30];
                let words = |t: &str| split(t).count();
                let length = words(&row.instruction) + words(&row.input) + words(&row.answers[0]);
                assert_eq!(length, row.total_length);
                assert!(length > previous && length <= row.length_bucket, "{length}");
                let all = read(&row.input);
                let (example, items) = all.split_at(HELD_OUT);
                assert_eq!(json!(items.len()), row.extra["n_para"]);
                let mut ids: Vec<&String> = items.iter().map(|(id, _)| id).collect();
                ids.sort();
                ids.dedup();
                assert_eq!(ids.len(), items.len());
                assert!(
                    example
                        .iter()
                        .all(|(_, text)| items.iter().all(|(_, t)| t != text))
                );
                let question = row.input.rsplit("Question: ").next().unwrap();
                let asked = question.split('\'').nth(1);
                let answer = match kind {
                    Kind::ExplicitSingle => {
                        let (_, text) = items.iter().find(|(id, _)| question.contains(id)).unwrap();
                        label_of(text)
                    }
                    Kind::ExplicitMultiple => {
                        let of_class = items.iter().filter(|(_, t)| label_of(t) == asked.unwrap());
                        of_class
                            .map(|(id, _)| id.as_str())
                            .collect::<Vec<_>>()
                            .join(", ")
                    }
                    _ => {
                        let of_class = items.iter().filter(|(_, t)| label_of(t) == asked.unwrap());
                        of_class.count().to_string()
                    }
                };
                assert_eq!(row.answers, [answer]);
            }
            for bucket in rows.chunks(30) {
                let mut by_position: BTreeMap<String, usize> = BTreeMap::new();
                for row in bucket {
                    *by_position
                        .entry(row.extra["gold_index"].to_string())
                        .or_default() += 1;
                }
                let (low, high) = (by_position.values().min(), by_position.values().max());
                assert!(high.unwrap() - low.unwrap() <= 1, "{by_position:?}");
            }
        }
    }

    #[test]
    fn questions_and_titles_find_their_item() {
        let mut pool = pool(60);
        let config = Config {
            kind: Kind::SemanticSingle,
            buckets: vec![800],
            n_examples: 12,
            ..Config::default()
        };
        for row in build(&pool, &config).unwrap() {
            let number = row.answers[0].rsplit(' ').next().unwrap();
            assert!(row.input.contains(&format!("note {number} of")));
            assert!(
                row.input
                    .ends_with(&format!("What is note {number}?\nAnswer:"))
            );
        }
        pool.iter_mut().for_each(|item| item.question = None);
        for row in build(&pool, &config).unwrap() {
            let title = row.input.rsplit("Title: Title ").next().unwrap();
            let number = title.split('\n').next().unwrap();
            let items = read(&row.input);
            let (_, text) = items.iter().rfind(|(id, _)| *id == row.answers[0]).unwrap();
            assert!(text.starts_with(&format!("note {number} of")));
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let config = |buckets: Vec<usize>| Config {
            buckets,
            ..Config::default()
        };
        let text = |pool: &[Item], config: &Config| build(pool, config).unwrap_err().to_string();
        assert!(text(&pool(4), &config(vec![500])).contains("found 4 items"));
        assert!(text(&pool(30), &config(vec![900, 300])).contains("ascending"));
        assert!(text(&pool(30), &config(vec![9000, 20000])).contains("larger pool"));
        let summaries = Config {
            kind: Kind::Global,
            ..config(vec![10])
        };
        assert!(text(&pool(30), &summaries).contains("not longer than 10"));
    }

    #[test]
    fn positions_are_evenly_spread() {
        assert_eq!(gold_positions(12), [0, 4, 9]);
        assert_eq!(gold_positions(3), [0]);
        assert_eq!(gold_positions(210)[..3], [0, 9, 19]);
    }
}
