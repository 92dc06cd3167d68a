//! All tasks, by name.

use crate::bench;
use crate::error::{EvalError, Result};
use crate::task::Task;
use std::sync::Arc;

/// The tasks that exist. A name is a task (`ruler/vt`) or a benchmark (`ruler`).
pub struct Registry {
    tasks: Vec<Arc<dyn Task>>,
}

impl Default for Registry {
    fn default() -> Self {
        let mut tasks = vec![bench::passkey::Passkey::task()];
        tasks.extend(bench::needle::tasks());
        tasks.extend(bench::ruler::tasks());
        tasks.extend(bench::perplexity::tasks());
        tasks.extend(bench::threading::tasks());
        tasks.push(bench::lines::Lines::task());
        tasks.push(bench::altered::AlteredQa::task());
        tasks.extend(bench::longbench::tasks());
        tasks.extend(bench::leval::tasks());
        tasks.extend(bench::m4le::tasks());
        tasks.extend(bench::longicl::tasks());
        tasks.extend(bench::longsafety::tasks());
        tasks.extend(bench::longbench_write::tasks());
        Registry { tasks }
    }
}

impl Registry {
    /// All tasks, in listing order.
    pub fn tasks(&self) -> &[Arc<dyn Task>] {
        &self.tasks
    }

    /// A task by its id.
    ///
    /// # Errors
    /// There is none; the text lists what there is.
    pub fn task(&self, id: &str) -> Result<Arc<dyn Task>> {
        let found = self.tasks.iter().find(|task| task.meta().id == id);
        found.cloned().ok_or_else(|| self.unknown(id))
    }

    /// A task, or the tasks of a benchmark.
    ///
    /// # Errors
    /// As [`Registry::task`].
    pub fn select(&self, name: &str) -> Result<Vec<Arc<dyn Task>>> {
        if let Ok(task) = self.task(name) {
            return Ok(vec![task]);
        }
        let prefix = format!("{name}/");
        let found: Vec<Arc<dyn Task>> = self
            .tasks
            .iter()
            .filter(|task| task.meta().id.starts_with(&prefix))
            .cloned()
            .collect();
        if found.is_empty() {
            return Err(self.unknown(name));
        }
        Ok(found)
    }

    fn unknown(&self, name: &str) -> EvalError {
        let mut names: Vec<&str> = self
            .tasks
            .iter()
            .map(|task| task.meta().id.split('/').next().unwrap_or(""))
            .collect();
        names.dedup();
        EvalError::Input(format!(
            "there is no benchmark {name:?}; expected one of {}, or a task such as ruler/vt (`longspan eval list`)",
            names.join(", ")
        ))
    }
}
