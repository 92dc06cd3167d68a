//! Examples of LongICLBench and the exact text in which they stand in a prompt.

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::DataSet;
use crate::bench::dataset::Row;
use crate::error::Result;

/// A relation between two entities.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Relation {
    pub relation: String,
    #[serde(rename = "subject_entity")]
    pub subject: String,
    #[serde(rename = "object_entity")]
    pub object: String,
}

/// An object's fields in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs(pub Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// An example of any of the data sets.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// BANKING77: a query; GoEmotions: a comment.
    Text {
        set: DataSet,
        text: String,
        labels: Vec<String>,
    },
    /// Discovery: two sentences and the connective between them.
    Pair {
        first: String,
        second: String,
        label: String,
    },
    /// TacRED.
    Sentence {
        sentence: String,
        relation: Relation,
    },
    /// Few-NERD.
    Entities { sentence: String, entities: Pairs },
    /// DialogRE.
    Dialogue {
        dialogue: String,
        relations: Vec<Relation>,
    },
}

/// A label that is a number (an index of `labels`) or its name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Index(usize),
    Name(String),
}

/// Reads a row of a data set.
///
/// # Errors
/// Missing fields, or a label outside the list.
pub fn parse(set: DataSet, row: &Row, labels: &[String]) -> Result<Example> {
    let name = |label: Label| match label {
        Label::Name(name) => Ok(name),
        Label::Index(index) => labels.get(index).cloned().ok_or_else(|| {
            row.wrong(format!(
                "found label {index}, expected one below {}",
                labels.len()
            ))
        }),
    };
    Ok(match set {
        DataSet::Banking77 => {
            #[derive(Deserialize)]
            struct Fields {
                text: String,
                label: Label,
            }
            let fields: Fields = row.parse()?;
            Example::Text {
                set,
                text: fields.text,
                labels: vec![name(fields.label)?],
            }
        }
        DataSet::GoEmotions => {
            #[derive(Deserialize)]
            struct Fields {
                text: String,
                labels: Vec<Label>,
            }
            let fields: Fields = row.parse()?;
            Example::Text {
                set,
                text: fields.text,
                labels: fields.labels.into_iter().map(name).collect::<Result<_>>()?,
            }
        }
        DataSet::Discovery => {
            #[derive(Deserialize)]
            struct Fields {
                sentence1: String,
                sentence2: String,
                label: Label,
            }
            let fields: Fields = row.parse()?;
            Example::Pair {
                first: fields.sentence1,
                second: fields.sentence2,
                label: name(fields.label)?,
            }
        }
        DataSet::Tacred => {
            #[derive(Deserialize)]
            struct Fields {
                sentence: String,
                #[serde(flatten)]
                relation: Relation,
            }
            let fields: Fields = row.parse()?;
            Example::Sentence {
                sentence: fields.sentence,
                relation: fields.relation,
            }
        }
        DataSet::FewNerd => {
            #[derive(Deserialize)]
            struct Fields {
                sentence: String,
                entities: Pairs,
            }
            let fields: Fields = row.parse()?;
            Example::Entities {
                sentence: fields.sentence,
                entities: fields.entities,
            }
        }
        DataSet::DialogRe => {
            #[derive(Deserialize)]
            struct Fields {
                dialogue: String,
                relations: Option<Vec<Relation>>,
                relation: Option<String>,
                subject_entity: Option<String>,
                object_entity: Option<String>,
            }
            let fields: Fields = row.parse()?;
            let one = (fields.relation, fields.subject_entity, fields.object_entity);
            let relations = match (fields.relations, one) {
                (Some(list), _) => list,
                (None, (Some(relation), Some(subject), Some(object))) => vec![Relation {
                    relation,
                    subject,
                    object,
                }],
                _ => {
                    return Err(row.wrong(
                        "expected `relations`, or `relation`, `subject_entity` and `object_entity`",
                    ));
                }
            };
            Example::Dialogue {
                dialogue: fields.dialogue,
                relations,
            }
        }
    })
}

impl Example {
    /// What the answer follows.
    pub fn stub(&self) -> String {
        match self {
            Example::Text { set, text, .. } if *set == DataSet::GoEmotions => {
                format!("comment: {text}\nemotion category: ")
            }
            Example::Text { text, .. } => format!("service query: {text}\nintent category: "),
            Example::Pair { first, second, .. } => format!(
                "{first} ( ) {second}\nthe most suitable conjunction word in the previous ( ) is  "
            ),
            Example::Sentence { sentence, relation } => format!(
                "sentence: {sentence}\nthe subject is {} and the object is {}\nthe relation between the two entities \
                 is: ",
                relation.subject, relation.object
            ),
            Example::Entities { sentence, .. } => format!("Sentence: {sentence}\n"),
            Example::Dialogue {
                dialogue,
                relations,
            } => {
                let pairs: Vec<String> = relations.iter().map(Relation::pair).collect();
                format!(
                    "Dialogue: \n{dialogue}\nThe list of {k} entity pairs are {}\nThe {k} respective relations \
                     between each entity pair are: ",
                    pairs.join(", "),
                    k = relations.len()
                )
            }
        }
    }

    /// The example with its answer.
    pub fn demonstration(&self) -> String {
        let stub = self.stub();
        match self {
            Example::Entities { entities, .. } => {
                let mut text = stub;
                for (entity, kind) in &entities.0 {
                    text += &format!("{entity}: {kind}\n");
                }
                text
            }
            Example::Dialogue { relations, .. } => {
                let list: Vec<&str> = relations.iter().map(|r| r.relation.as_str()).collect();
                format!("{stub}{}\n", list.join(", "))
            }
            _ => format!("{stub}{}\n", self.first_label()),
        }
    }

    /// The references to store, and a reply that is right.
    pub fn answer(&self) -> (Vec<String>, String) {
        match self {
            Example::Entities { entities, .. } => {
                let object: Vec<String> = entities
                    .0
                    .iter()
                    .map(|(e, k)| format!("{}:{}", quoted(e), quoted(k)))
                    .collect();
                let lines: Vec<String> = entities
                    .0
                    .iter()
                    .map(|(e, k)| format!("{e}: {k}"))
                    .collect();
                (vec![format!("{{{}}}", object.join(","))], lines.join("\n"))
            }
            Example::Dialogue { relations, .. } => {
                let list: Vec<String> = relations.iter().map(|r| r.relation.clone()).collect();
                let oracle = list.join(", ");
                (list, oracle)
            }
            _ => {
                let label = self.first_label().to_string();
                (vec![label.clone()], label)
            }
        }
    }

    /// Its labels; a dialogue or a sentence with entities has none that selection goes by.
    pub fn labels(&self) -> Vec<&str> {
        match self {
            Example::Text { labels, .. } => labels.iter().map(String::as_str).collect(),
            Example::Pair { label, .. } => vec![label],
            Example::Sentence { relation, .. } => vec![&relation.relation],
            Example::Entities { .. } | Example::Dialogue { .. } => Vec::new(),
        }
    }

    /// The first of its labels, "" without one.
    pub fn first_label(&self) -> &str {
        match self {
            Example::Text { labels, .. } => labels.first().map_or("", String::as_str),
            Example::Pair { label, .. } => label,
            Example::Sentence { relation, .. } => &relation.relation,
            Example::Entities { .. } | Example::Dialogue { .. } => "",
        }
    }

    /// The text that an echo of the prompt is found by.
    pub fn query_text(&self) -> &str {
        match self {
            Example::Text { text, .. } => text,
            Example::Pair { second, .. } => second,
            Example::Sentence { sentence, .. } | Example::Entities { sentence, .. } => sentence,
            Example::Dialogue { dialogue, .. } => dialogue,
        }
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// All of the prompt before the query: the task, the label list where one is given, and the demonstrations.
pub fn head(set: DataSet, demonstrations: &[Example], labels: Option<&[String]>) -> String {
    const EXACT: &str =
        "The predict answer must come from the demonstration examples with the exact format.";
    let task = match set {
        DataSet::Banking77 => {
            format!("Given a customer service query, please predict the intent of the query. {EXACT}")
        }
        DataSet::GoEmotions => format!(
            "Given a comment, please predict the emotion category of this comment. {EXACT}"
        ),
        DataSet::Discovery => format!(
            "Given two sentence1 and sentence2, please predict the conjunction word between the two sentences. {EXACT}"
        ),
        DataSet::Tacred => "Given a sentence and a pair of subject and object entities within the sentence, please \
                            predict the relation between the given entities."
            .into(),
        DataSet::FewNerd => "Given a sentence, find its entities and the type of each. Write one line for every \
                             entity, the entity first and its type after a colon."
            .into(),
        DataSet::DialogRe => "Given a dialogue and a list of entity pairs that occur in it, predict the relation \
                              between the entities of each pair."
            .into(),
    };
    let mut text = task;
    if let Some(labels) = labels {
        text += match set {
            DataSet::Discovery => " You can only select from the following words: ",
            DataSet::Tacred => " The predicted relationship must come from these classes: ",
            _ => "You can only make prediction from the following categories: ",
        };
        text += &labels.join(", ");
        text += ".\n";
    }
    text += " The examples are as follows: \n";
    for example in demonstrations {
        text += &example.demonstration();
    }
    text
}
