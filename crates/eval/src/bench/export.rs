//! A task's samples as JSON lines, for other programs: RULER's rows as its generators write them, all others in one
//! plain form (`input`, `answer_prefix`, `outputs`, `max_new`, `stop`, `attrs`).

use serde::Serialize;
use serde_json::json;

use super::ruler;
use crate::error::{EvalError, Result};
use crate::task::{SampleCx, Segment, Task, Work};

/// Where a task's rows of one length belong below a folder: RULER's as its scripts look for them.
pub fn path(task: &str, length: usize) -> String {
    match task.strip_prefix("ruler/") {
        Some(name) => format!("{length}/{name}/validation.jsonl"),
        None => format!("{length}/{}.jsonl", task.replace('/', "_")),
    }
}

/// The rows of a task at one length, one text each.
///
/// # Errors
/// Those of the task.
pub fn rows(task: &dyn Task, cx: &SampleCx<'_>) -> Result<Vec<String>> {
    let id = task.meta().id.as_str();
    if let Some(name) = id.strip_prefix("ruler/") {
        let rows = ruler::published(name, cx)?;
        return rows.iter().map(line).collect();
    }
    let samples = task.samples(cx)?;
    let rows = samples.iter().map(|sample| {
        let text = |prefix: bool| -> String {
            let segments = sample.prompt.segments.iter();
            segments
                .filter(|s| matches!(s, Segment::AnswerPrefix(_)) == prefix)
                .map(Segment::text)
                .collect()
        };
        let mut row = json!({
            "id": sample.id, "task": id, "version": task.meta().version, "length": cx.length, "input": text(false),
            "answer_prefix": text(true), "outputs": sample.references, "attrs": sample.attrs,
        });
        match &sample.work {
            Work::Generate(decode) => {
                row["max_new"] = json!(decode.max_new);
                row["stop"] = json!(decode.stop);
            }
            Work::Likelihood { protocol, tokens } => {
                row["likelihood"] = json!({ "protocol": protocol, "tokens": tokens });
            }
            Work::Search { documents } => {
                let ids: Vec<&str> = documents.list.iter().map(|d| d.pid.as_str()).collect();
                row["documents"] = json!(ids);
            }
        }
        line(&row)
    });
    rows.collect()
}

/// A row as one line, fields in their written order.
///
/// # Errors
/// What JSON cannot hold.
pub fn line(row: &impl Serialize) -> Result<String> {
    serde_json::to_string(row).map_err(|e| EvalError::Input(e.to_string()))
}

/// One line for each row.
///
/// # Errors
/// As [`line`].
pub fn lines(rows: &[impl Serialize]) -> Result<String> {
    rows.iter().map(|row| Ok(line(row)? + "\n")).collect()
}
