//! Needle in a haystack (paper 57): one sentence hidden in prose, over lengths and depths. In
//! `needle` every text hides one needle, as published; in `needle/shared` one text hides a needle
//! at every depth, and is read once for all its questions.

use super::{attr, largest, texts};
use crate::bench::ruler::Sources;
use crate::error::{EvalError, Result};
use crate::python::{Random, chars};
use crate::task::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens left free besides question and answer, as in the published test.
const BUFFER: usize = 200;
/// Most tokens of an answer.
const MAX_NEW: usize = 32;

const CITIES: [&str; 32] = [
    "Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Dakar", "Perth", "Turin", "Basel",
    "Kyoto", "Tunis", "Riga", "Porto", "Accra", "Delhi", "Bergen", "Nantes", "Zagreb", "Havana",
    "Austin", "Ghent", "Malaga", "Leipzig", "Osaka", "Bogota", "Tbilisi", "Krakow", "Cork",
    "Sofia", "Izmir", "Durban",
];
const VERBS: [&str; 12] = [
    "taste",
    "paint",
    "photograph",
    "borrow",
    "polish",
    "weigh",
    "measure",
    "sketch",
    "follow",
    "repair",
    "count",
    "collect",
];
const THINGS: [&str; 24] = [
    "lanterns",
    "pickled plums",
    "copper kettles",
    "wooden boats",
    "paper kites",
    "blue tiles",
    "marble frogs",
    "silver spoons",
    "tram tickets",
    "glass beads",
    "old globes",
    "clay whistles",
    "brass keys",
    "wool hats",
    "chess pieces",
    "ginger biscuits",
    "velvet chairs",
    "stone owls",
    "garden gnomes",
    "railway clocks",
    "pocket mirrors",
    "cuckoo clocks",
    "rope ladders",
    "salt lamps",
];
const PLACES: [&str; 16] = [
    "behind the observatory",
    "under the viaduct",
    "at the harbour school",
    "near the windmill",
    "in the botanical library",
    "on the ferry deck",
    "beside the ice rink",
    "above the bakery",
    "inside the water tower",
    "along the canal",
    "across from the theatre",
    "by the lighthouse stairs",
    "in the old mint",
    "at the puppet museum",
    "under the town clock",
    "on the castle roof",
];

/// A fact of its own for every seed: (city, what is best done there).
fn fact(random: &mut Random) -> (&'static str, String) {
    let mut pick = |list: &[&'static str]| random.choice(list).copied().unwrap_or("");
    let city = pick(&CITIES);
    (
        city,
        format!("{} {} {}", pick(&VERBS), pick(&THINGS), pick(&PLACES)),
    )
}

fn needle(city: &str, act: &str) -> String {
    format!("The best thing to do in {city} is to {act}.")
}

fn question(city: &str) -> String {
    format!(
        "\n\nWhat is the best thing to do in {city}? Answer in one sentence, from the text alone."
    )
}

fn prefix(city: &str) -> String {
    format!(" The best thing to do in {city} is to")
}

/// Where in `text` a needle at this depth goes: at the share of its characters, moved back to just
/// after the sentence end before it; at the end for 100%, at the start where there is none before.
pub fn place(text: &str, depth: f64) -> usize {
    if depth >= 100.0 {
        return text.len();
    }
    let chars = text.chars().count();
    let at = (chars as f64 * depth / 100.0).floor() as usize;
    let byte = text.char_indices().nth(at).map_or(text.len(), |(at, _)| at);
    let ends = text[..byte].match_indices(['.', '!', '?']);
    // A point inside a number or an abbreviation such as 3.5 ends nothing.
    let after = ends
        .map(|(at, _)| at + 1)
        .filter(|&at| text[at..].starts_with(char::is_whitespace));
    after.fold(0, |_, at| at)
}

/// See the module's text.
pub struct Needle {
    meta: TaskMeta,
    shared: bool,
}

/// `needle` and `needle/shared`.
pub fn tasks() -> Vec<Arc<dyn Task>> {
    [false, true]
        .into_iter()
        .map(|shared| {
            Arc::new(Needle {
                meta: TaskMeta {
                    id: if shared { "needle/shared" } else { "needle" }.into(),
                    version: 1,
                    ability: if shared {
                        "retrieval among needles of one text"
                    } else {
                        "retrieval of a sentence from prose"
                    },
                    metric: "keywords found",
                    higher_is_better: true,
                    best: 1.0,
                    floor: 0.0,
                    unit: Unit::Tokens,
                    lengths: &[1024, 2048, 4096],
                    depths: true,
                    source: "needle-in-a-haystack community test; text and needles made for this program",
                    licence: "generated",
                },
                shared,
            }) as Arc<dyn Task>
        })
        .collect()
}

/// Words that a reply must hold: those of four letters and more.
fn keywords(act: &str) -> impl Iterator<Item = &str> {
    chars::runs(act, chars::is_word)
        .map(|(_, word)| word)
        .filter(|word| word.chars().count() >= 4)
}

impl Needle {
    fn haystack(&self, cx: &SampleCx<'_>) -> Result<String> {
        let prose = match cx.data {
            Some(path) => {
                let all: Vec<String> = texts(path)?.into_iter().map(|(_, text)| text).collect();
                all.join("\n")
            }
            None => Sources::shipped()?.essay.join(" "),
        };
        let one = cx.counter.count(&prose)?.max(1);
        Ok(vec![prose.trim(); cx.length / one + 2].join("\n"))
    }

    fn sample(&self, text: Arc<str>, city: &str, act: &str, depth: f64, repeat: usize) -> Sample {
        let attrs = BTreeMap::from([attr("depth", depth), attr("repeat", repeat)]);
        let mut prompt = Prompt::ask(text, question(city));
        prompt = prompt.prefixed(prefix(city));
        Sample::new(
            prompt,
            Work::Generate(Decode {
                max_new: MAX_NEW,
                stop: vec!["\n".into()],
            }),
            vec![act.to_string()],
            attrs,
            format!(" {act}."),
        )
    }
}

impl Task for Needle {
    fn meta(&self) -> &TaskMeta {
        &self.meta
    }

    fn samples(&self, cx: &SampleCx<'_>) -> Result<Vec<Sample>> {
        let prose = self.haystack(cx)?;
        let count = if self.shared { cx.depths.len() } else { 1 };
        if count > CITIES.len() {
            return Err(EvalError::Input(format!(
                "{}: {count} depths, expected at most {}",
                self.meta.id,
                CITIES.len()
            )));
        }
        let longest = needle("Lisbon", "photograph pickled plums across from the theatre");
        let used = cx
            .counter
            .count(&(question("Lisbon") + &prefix("Lisbon")))?
            + cx.counter.count(&longest)? * count
            + MAX_NEW
            + cx.counter.overhead();
        // Short texts cannot spare the published buffer.
        let room = cx.length.saturating_sub(used + BUFFER.min(cx.length / 8));
        let ends: Vec<usize> = prose
            .char_indices()
            .map(|(at, c)| at + c.len_utf8())
            .collect();
        let chars = largest(ends.len().min(cx.length * 16), room, |n| {
            cx.counter
                .count(&prose[..n.checked_sub(1).map_or(0, |n| ends[n])])
        })?
        .filter(|_| room >= 16);
        let Some(chars) = chars else {
            return Err(EvalError::Input(format!(
                "{}: {} tokens do not hold question, needle and answer; take a longer text",
                self.meta.id, cx.length
            )));
        };
        let text = &prose[..ends[chars.max(1) - 1]];
        let mut all = Vec::new();
        for repeat in 0..cx.samples {
            let seeded = |what: &str| {
                Random::from_text(&format!("needle {what} {} {} {repeat}", cx.seed, cx.length))
            };
            if self.shared {
                let mut random = seeded("shared");
                let mut facts: Vec<(&str, String)> = Vec::new();
                while facts.len() < cx.depths.len() {
                    let fact = fact(&mut random);
                    if facts.iter().all(|(city, _)| *city != fact.0) {
                        facts.push(fact);
                    }
                }
                let mut places: Vec<(usize, usize)> = cx
                    .depths
                    .iter()
                    .enumerate()
                    .map(|(index, &depth)| (place(text, depth), index))
                    .collect();
                places.sort();
                let mut out = String::new();
                let mut last = 0;
                for &(at, index) in &places {
                    let (city, act) = &facts[index];
                    out += &text[last..at];
                    out += if at == 0 { "" } else { " " };
                    out += &needle(city, act);
                    out += if at == 0 { " " } else { "" };
                    last = at;
                }
                out += &text[last..];
                let text: Arc<str> = out.into();
                for (&depth, (city, act)) in cx.depths.iter().zip(&facts) {
                    all.push(self.sample(Arc::clone(&text), city, act, depth, repeat));
                }
            } else {
                for &depth in cx.depths {
                    let (city, act) = fact(&mut seeded(&depth.to_string()));
                    let at = place(text, depth);
                    let (before, after) = text.split_at(at);
                    let out = match at {
                        0 => format!("{} {after}", needle(city, &act)),
                        _ => format!("{before} {}{after}", needle(city, &act)),
                    };
                    all.push(self.sample(out.into(), city, &act, depth, repeat));
                }
            }
        }
        Ok(all)
    }

    fn score(&self, row: &Prediction) -> Scored {
        let reply = row.text.to_lowercase();
        let words: Vec<&str> = row
            .references
            .iter()
            .flat_map(|act| keywords(act))
            .collect();
        let found = words
            .iter()
            .filter(|word| reply.contains(&word.to_lowercase()))
            .count();
        let value = found as f64 / words.len().max(1) as f64;
        let mut scored = Scored::new(
            row,
            value,
            (!reply.trim().is_empty()).then(|| row.text.clone()),
        );
        scored.more.insert(
            "all keywords".into(),
            f64::from(u8::from(found == words.len())),
        );
        scored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_stand_after_sentence_ends() {
        let text = "One is 3.5 long. Two is short! Three";
        assert_eq!(place(text, 0.0), 0);
        assert_eq!(place(text, 30.0), 0);
        assert_eq!(&text[..place(text, 60.0)], "One is 3.5 long.");
        assert_eq!(&text[..place(text, 95.0)], "One is 3.5 long. Two is short!");
        assert_eq!(place(text, 100.0), text.len());
        assert_eq!(place("", 50.0), 0);
    }
}
