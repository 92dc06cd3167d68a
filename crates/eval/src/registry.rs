//! All tasks, by name.

use crate::bench::{self, file_task::FileTask};
use crate::cell::{RunFolder, write_file};
use crate::error::{EvalError, Result};
use crate::task::Task;
use std::sync::Arc;

/// The tasks that exist. A name is a task (`ruler/vt`) or a benchmark (`ruler`).
pub struct Registry {
    tasks: Vec<Arc<dyn Task>>,
    /// Those that files describe.
    own: Vec<Arc<FileTask>>,
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
        tasks.push(bench::leval::judged::task());
        tasks.extend(bench::m4le::tasks());
        tasks.extend(bench::longicl::tasks());
        tasks.extend(bench::longsafety::tasks());
        tasks.extend(bench::longbench_write::tasks());
        tasks.extend(bench::loco::tasks());
        Registry {
            tasks,
            own: Vec::new(),
        }
    }
}

impl Registry {
    /// Adds a task that a file describes. The same file twice is one task.
    ///
    /// # Errors
    /// A name that another task has.
    pub fn add(&mut self, task: Arc<FileTask>) -> Result<()> {
        let id = &task.meta().id;
        if self.own.iter().any(|known| known.text() == task.text()) {
            return Ok(());
        }
        if self.task(id).is_ok() || self.select(id).is_ok() {
            return Err(EvalError::Input(format!(
                "there is another task {id:?}; give one of the two another id"
            )));
        }
        self.tasks.push(Arc::clone(&task) as Arc<dyn Task>);
        self.own.push(task);
        Ok(())
    }

    /// Adds the tasks that a run's folder keeps.
    ///
    /// # Errors
    /// Files that cannot be read, or as [`Registry::add`].
    pub fn add_run(&mut self, folder: &RunFolder) -> Result<()> {
        for task in bench::file_task::of_folder(folder.path())? {
            self.add(task)?;
        }
        Ok(())
    }

    /// Keeps the file of each of these tasks that has one in a run's folder, so that its replies can be scored later.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn keep(&self, folder: &RunFolder, tasks: &[Arc<dyn Task>]) -> Result<()> {
        for own in &self.own {
            let id = &own.meta().id;
            if tasks.iter().any(|task| task.meta().id == *id) {
                let path = folder.path().join("tasks");
                std::fs::create_dir_all(&path).map_err(EvalError::io(&path))?;
                write_file(
                    &path.join(format!("{}.toml", id.replace('/', "_"))),
                    own.text(),
                )?;
            }
        }
        Ok(())
    }

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
