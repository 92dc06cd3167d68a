//! The three judge roles of LongSafety: a risk analyst, a summariser of the context, and a judge who sees what both
//! found. Four calls a case; the first two and the last two can run at once. The wording is this program's own.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Case;
use crate::bench::judge::{Judge, in_parallel};
use crate::error::{EvalError, Result};
use crate::metric::panel::{self, Parse, Rates, rates};
use crate::python::format_fields;
use crate::stats::wilson;
use crate::task::Prediction;

/// In which slots the judge is shown risks and summary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compat {
    /// As the paper describes it.
    #[default]
    Paper,
    /// As the reference code calls it: each in the other's slot.
    Swapped,
}

/// What stands for a reply of a judge that failed for good.
pub const JUDGE_FAILURE: &str = "Error when calling the judge model.";

static TEMPLATES: LazyLock<BTreeMap<String, String>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("templates.json"))
        .expect("a table that ships with the program")
});

fn filled(name: &str, fields: &[(&str, &str)]) -> Result<String> {
    let template = TEMPLATES.get(name).map_or("", String::as_str);
    let field = |name: &str| {
        let found = fields.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).into())
    };
    format_fields(template, field)
        .map_err(|field| EvalError::Input(format!("longsafety: template {name} has `{field}`")))
}

/// The risk analyst's message.
///
/// # Errors
/// A template with an unknown field.
pub fn risk_message(instruction: &str) -> Result<String> {
    filled("risk", &[("instruction", instruction)])
}

/// The summariser's message.
///
/// # Errors
/// A template with an unknown field.
pub fn environment_message(context: &str, instruction: &str) -> Result<String> {
    filled(
        "environment",
        &[("context", context), ("instruction", instruction)],
    )
}

/// The judge's message. Without a summary, the rules about the context are left out.
///
/// # Errors
/// A template with an unknown field.
pub fn judge_message(
    instruction: &str,
    response: &str,
    risks: &str,
    environment: &str,
    compat: Compat,
) -> Result<String> {
    let (risks, environment) = match compat {
        Compat::Paper => (risks, environment),
        Compat::Swapped => (environment, risks),
    };
    let name = if environment.is_empty() {
        "judge_without_environment"
    } else {
        "judge"
    };
    filled(
        name,
        &[
            ("instruction", instruction),
            ("response", response),
            ("risks", risks),
            ("environment", environment),
        ],
    )
}

/// A case with its two answers; `context` is "" for the control without one, whose single answer stands twice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    #[serde(flatten)]
    pub case: Case,
    pub response_front: String,
    pub response_end: String,
}

/// A judged case: a line of the judged file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    pub id: u64,
    pub safety_type: String,
    pub task_type: String,
    pub response_front: String,
    pub response_end: String,
    pub risks: String,
    pub env_summary: String,
    pub judgment_front: String,
    pub judgment_end: String,
}

/// Pairs stored answers with their cases. Cases without both answers are left out; their ids come back too.
pub fn answered(cases: &[Case], rows: &[Prediction]) -> (Vec<Answered>, Vec<u64>) {
    let mut texts: BTreeMap<(u64, &str), &str> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.error.is_none()) {
        let id = row.attrs.get("case").and_then(Value::as_u64);
        let place = row.attrs.get("place").and_then(Value::as_str);
        if let (Some(id), Some(place)) = (id, place) {
            texts.insert((id, place), &row.text);
        }
    }
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for case in cases {
        let get = |place| texts.get(&(case.id, place)).copied();
        let mut case = case.clone();
        let pair = match (get("front"), get("end"), get("alone")) {
            (Some(front), Some(end), _) => Some((front, end)),
            (_, _, Some(alone)) => {
                case.context.clear();
                Some((alone, alone))
            }
            _ => None,
        };
        match pair {
            Some((front, end)) => found.push(Answered {
                case,
                response_front: front.into(),
                response_end: end.into(),
            }),
            None => missing.push(case.id),
        }
    }
    (found, missing)
}

/// Judges a case with four calls, three if its two answers are one.
///
/// # Errors
/// Those of the judge that end a run.
pub fn judge_case(answered: &Answered, judge: &dyn Judge, compat: Compat) -> Result<Judged> {
    let case = &answered.case;
    let ask = |message: String| judge.ask("", &message);
    let (risks, env_summary) = std::thread::scope(|scope| {
        let risks = scope.spawn(|| ask(risk_message(&case.instruction)?));
        let env = if case.context.is_empty() {
            Ok(String::new())
        } else {
            environment_message(&case.context, &case.instruction).and_then(ask)
        };
        let risks = risks
            .join()
            .unwrap_or_else(|_| Err(EvalError::Target("the judge's thread ended early".into())));
        (risks, env)
    });
    let (risks, env_summary) = (risks?, env_summary?);
    let verdict = |response: &str| -> Result<String> {
        ask(judge_message(
            &case.instruction,
            response,
            &risks,
            &env_summary,
            compat,
        )?)
    };
    let (front, end) = std::thread::scope(|scope| {
        if answered.response_front == answered.response_end {
            let reply = verdict(&answered.response_front);
            return match reply {
                Ok(reply) => (Ok(reply.clone()), Ok(reply)),
                Err(error) => (Err(error), Ok(String::new())),
            };
        }
        let front = scope.spawn(|| verdict(&answered.response_front));
        let end = verdict(&answered.response_end);
        let front = front
            .join()
            .unwrap_or_else(|_| Err(EvalError::Target("the judge's thread ended early".into())));
        (front, end)
    });
    Ok(Judged {
        id: case.id,
        safety_type: case.safety_type.clone(),
        task_type: case.task_type.clone(),
        response_front: answered.response_front.clone(),
        response_end: answered.response_end.clone(),
        risks,
        env_summary,
        judgment_front: front?,
        judgment_end: end?,
    })
}

/// Judges cases, `concurrency` at a time; the result is in their order whatever that is.
///
/// # Errors
/// Those of the judge that end a run.
pub fn judge_all(
    cases: &[Answered],
    judge: &dyn Judge,
    compat: Compat,
    concurrency: usize,
) -> Result<Vec<Judged>> {
    in_parallel(cases, concurrency, |case| judge_case(case, judge, compat))
}

/// Rates of a group of cases.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    pub name: String,
    #[serde(flatten)]
    pub rates: Rates,
    /// Wilson's 95% interval of the safety rate.
    pub interval: Option<(f64, f64)>,
}

/// All figures of a judged run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub parse: Parse,
    pub compat: Compat,
    pub overall: Group,
    pub by_safety_type: Vec<Group>,
    pub by_task_type: Vec<Group>,
    /// Safety type, task type, rates: the cells of the heat map.
    pub cells: Vec<(String, String, Rates)>,
    /// Cases in which a call of the judge failed for good. The official parser takes them as safe.
    pub judge_failures: usize,
}

/// Reads the verdicts and counts.
pub fn report(judged: &[Judged], parse: Parse, compat: Compat) -> Report {
    let group = |name: &str, filter: &dyn Fn(&Judged) -> bool| -> Group {
        let cases: Vec<panel::Case> = judged
            .iter()
            .filter(|j| filter(j))
            .map(|j| panel::Case::read(&j.judgment_front, &j.judgment_end, parse))
            .collect();
        let rates = rates(&cases);
        let read = rates.n - rates.errors;
        let safe = cases
            .iter()
            .filter(|c| c.is_unsafe() == Some(false))
            .count();
        Group {
            name: name.into(),
            rates,
            interval: (read > 0).then(|| wilson(safe, read)),
        }
    };
    let names = |of: &dyn Fn(&Judged) -> &str| -> Vec<String> {
        let set: std::collections::BTreeSet<&str> = judged.iter().map(of).collect();
        set.into_iter().map(str::to_string).collect()
    };
    let safety = names(&|j| &j.safety_type);
    let tasks = names(&|j| &j.task_type);
    let mut cells = Vec::new();
    for s in &safety {
        for t in &tasks {
            let cell = group("", &|j| j.safety_type == *s && j.task_type == *t);
            cells.push((s.clone(), t.clone(), cell.rates));
        }
    }
    let failed = |j: &&Judged| {
        [&j.risks, &j.env_summary, &j.judgment_front, &j.judgment_end]
            .iter()
            .any(|text| *text == JUDGE_FAILURE)
    };
    Report {
        parse,
        compat,
        overall: group("overall", &|_| true),
        by_safety_type: safety
            .iter()
            .map(|s| group(s, &|j| j.safety_type == *s))
            .collect(),
        by_task_type: tasks
            .iter()
            .map(|t| group(t, &|j| j.task_type == *t))
            .collect(),
        cells,
        judge_failures: judged.iter().filter(failed).count(),
    }
}
