//! `longspan reproduce`: a paper's core claim at small scale, from a recipe: settings, seeds, what is compared, the margin.
//!
//! The verdict is computed from the measured values by the recipe's rule. A claim that does not hold is reported so.

mod capacity;
mod cells;
mod collapse;
mod family;
mod hinting;
mod length;
mod orders;
mod pointing;
mod signals;
mod waves;

pub use capacity::Capacity;
pub use cells::{Cell, Cells, Check, Watch};
pub use collapse::{CollapseRecipe, CollapseSetting, CollapseTask, Text};
pub use family::FamilyRecipe;
pub use hinting::{HintRecipe, HintSetting};
pub use length::LengthRecipe;
pub use orders::{OrderRecipe, StarOrder, StarRecipe, StarSetting};
pub use pointing::{PointingRecipe, PointingSetting};
pub use signals::SignalRecipe;
pub use waves::{Memory, WaveRecipe};

use crate::error::{Result, TrainError};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Recipes that ship with the program: (name, TOML).
pub const RECIPES: [(&str, &str); 10] = [
    ("nope", include_str!("../../../../recipes/nope.toml")),
    (
        "rnn-review",
        include_str!("../../../../recipes/rnn-review.toml"),
    ),
    ("s4", include_str!("../../../../recipes/s4.toml")),
    ("lssl", include_str!("../../../../recipes/lssl.toml")),
    ("longvq", include_str!("../../../../recipes/longvq.toml")),
    (
        "mamba-360",
        include_str!("../../../../recipes/mamba-360.toml"),
    ),
    (
        "stuffed-mamba",
        include_str!("../../../../recipes/stuffed-mamba.toml"),
    ),
    (
        "order-matters",
        include_str!("../../../../recipes/order-matters.toml"),
    ),
    (
        "pointer-networks",
        include_str!("../../../../recipes/pointer-networks.toml"),
    ),
    (
        "task-hinting",
        include_str!("../../../../recipes/task-hinting.toml"),
    ),
];

/// A recipe file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The paper's slug.
    pub paper: String,
    /// What the paper says, and what is tested of it.
    pub claim: String,
    /// How many times each setting is trained, with seeds 0, 1, ...
    pub seeds: u64,
    /// What is trained.
    pub experiment: Experiment,
}

/// Kinds of experiments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Experiment {
    /// Models of real-valued sequences, compared by their test error.
    Signals(SignalRecipe),
    /// Language models on a token task, compared by exact match at lengths they were not trained at.
    Length(LengthRecipe),
    /// Models that answer with positions of their input.
    Pointing(PointingRecipe),
    /// Orders of sets that are read and written.
    Orders(OrderRecipe),
    /// Sorting with helper tasks.
    Hinting(HintRecipe),
    /// Waveforms at another sampling rate than trained.
    Waves(WaveRecipe),
    /// Mixers of one backbone on streams of tokens.
    Family(FamilyRecipe),
    /// States that never learned to forget, and what they hold.
    Collapse(CollapseRecipe),
}

impl Experiment {
    /// As many optimiser steps for every training.
    pub fn set_steps(&mut self, steps: u64) {
        match self {
            Experiment::Signals(signals) => signals.steps = steps,
            Experiment::Length(length) => length.steps = steps,
            Experiment::Pointing(pointing) => pointing.set_steps(steps),
            Experiment::Orders(orders) => orders.set_steps(steps),
            Experiment::Hinting(hinting) => hinting.set_steps(steps),
            Experiment::Waves(waves) => waves.set_steps(steps),
            Experiment::Family(family) => family.set_steps(steps),
            Experiment::Collapse(collapse) => collapse.set_steps(steps),
        }
    }

    /// Files are named relative to this folder.
    fn set_folder(&mut self, folder: &Path) {
        if let Experiment::Collapse(collapse) = self {
            collapse.set_folder(folder);
        }
    }

    /// Refuses what cannot run.
    pub fn check(&self) -> Result<()> {
        match self {
            Experiment::Signals(signals) => signals.check(),
            Experiment::Length(length) => length.check(),
            Experiment::Pointing(pointing) => pointing.check(),
            Experiment::Orders(orders) => orders.check(),
            Experiment::Hinting(hinting) => hinting.check(),
            Experiment::Waves(waves) => waves.check(),
            Experiment::Family(family) => family.check(),
            Experiment::Collapse(collapse) => collapse.check(),
        }
    }
}

/// One setting's measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The setting.
    pub name: String,
    /// Trained values of the model.
    pub parameters: usize,
    /// One value per seed.
    pub values: Vec<f64>,
    /// Seconds of training and testing, all seeds.
    pub seconds: f64,
}

impl Row {
    /// Mean over seeds.
    pub fn mean(&self) -> f64 {
        self.values.iter().sum::<f64>() / self.values.len().max(1) as f64
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The paper's slug.
    pub paper: String,
    /// The claim tested.
    pub claim: String,
    /// Task, sizes, steps, seeds.
    pub setting: String,
    /// What the values are.
    pub measure: String,
    /// What knowing nothing scores.
    pub baseline: String,
    /// The rule of the verdict.
    pub required: String,
    /// One per setting.
    pub rows: Vec<Row>,
    /// Whether the rule holds.
    pub holds: bool,
    /// The rule with the measured numbers in it.
    pub verdict: String,
    /// SVG.
    pub figure: String,
}

/// The recipe of this name, or of a TOML file; files that it names lie in the current folder, or beside the TOML file.
pub fn recipe(name: &str) -> Result<Recipe> {
    let (path, text) = match RECIPES.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => (format!("recipes/{name}.toml"), text.to_string()),
        None if name.ends_with(".toml") => {
            let text = std::fs::read_to_string(name).map_err(|source| TrainError::File {
                path: name.into(),
                source,
            })?;
            (name.to_string(), text)
        }
        None => {
            let known: Vec<&str> = RECIPES.iter().map(|(name, _)| *name).collect();
            let expected = format!("one of {}, or a TOML file", known.join(", "));
            return Err(TrainError::option("recipe", name, expected));
        }
    };
    let path = Path::new(&path);
    let mut recipe: Recipe =
        toml::from_str(&text).map_err(|error| TrainError::contents(path, error))?;
    if name.ends_with(".toml") {
        recipe
            .experiment
            .set_folder(path.parent().unwrap_or(Path::new("")));
    }
    Ok(recipe)
}

/// Runs a recipe. `watch` hears what is being done, with the share of the work done, and answers whether to go on.
pub fn run(recipe: &Recipe, watch: Watch<'_>) -> Result<Option<Report>> {
    run_kept(recipe, &mut Cells::in_memory(), watch)
}

/// As [`run`], with finished parts kept in `cells`: a run that was stopped goes on with what is missing.
pub fn run_kept(recipe: &Recipe, cells: &mut Cells, watch: Watch<'_>) -> Result<Option<Report>> {
    if recipe.seeds == 0 {
        return Err(TrainError::option("seeds", 0, "1 or more"));
    }
    let gpu = matches!(
        recipe.experiment,
        Experiment::Signals(_)
            | Experiment::Length(_)
            | Experiment::Family(_)
            | Experiment::Collapse(_)
    );
    if !cells.place().is_cpu() && !gpu {
        return Err(TrainError::option(
            "device",
            format!("a GPU for the recipe {}", recipe.paper),
            "cpu: only recipes of the kinds signals, length, family and collapse run on a GPU",
        ));
    }
    match &recipe.experiment {
        Experiment::Signals(signals) => signals.run(recipe, cells, watch),
        Experiment::Length(length) => length.run(recipe, cells, watch),
        Experiment::Pointing(pointing) => pointing.run(recipe, cells, watch),
        Experiment::Orders(orders) => orders.run(recipe, cells, watch),
        Experiment::Hinting(hinting) => hinting.run(recipe, cells, watch),
        Experiment::Waves(waves) => waves.run(recipe, cells, watch),
        Experiment::Family(family) => family.run(recipe, cells, watch),
        Experiment::Collapse(collapse) => collapse.run(recipe, cells, watch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_parses_and_names_what_exists() {
        for (name, _) in RECIPES {
            let recipe = recipe(name).unwrap();
            assert_eq!(recipe.paper, name);
            assert!(recipe.seeds >= 2, "{name}");
            recipe.experiment.check().unwrap();
        }
        let error = super::recipe("nothing").unwrap_err().to_string();
        assert!(error.contains("s4"), "{error}");
    }

    /// A recipe small enough for a test; the claim may hold or not, the report must be right about it.
    fn small(text: &str) -> Report {
        let recipe: Recipe = toml::from_str(text).unwrap();
        let mut heard = 0.0;
        let report = run(&recipe, &mut |_, share| {
            assert!(share >= heard && share <= 1.0, "{share} after {heard}");
            heard = share;
            true
        });
        let report = report.unwrap().unwrap();
        assert!(report.figure.starts_with("<svg"));
        assert!(!run(&recipe, &mut |_, _| false).is_ok_and(|r| r.is_some()));
        report
    }

    #[test]
    fn a_small_lag_is_learned_and_the_verdict_follows_from_the_values() {
        let text = |factor: f64| {
            format!(
                r#"
paper = "s4"
claim = "test"
seeds = 2
[experiment]
kind = "signals"
task = {{ task = "lag", steps = 48, lag = 6, band = 4 }}
steps = 60
examples = 4
test_examples = 16
lr = 0.01
claimed = ["S4D"]
controls = ["nothing"]
factor = {factor}
[[experiment.models]]
name = "S4D"
stack = {{ d_model = 4, layers = 1, norm = false, residual = false, mixer = {{ kind = "s4", mode = "diag", init = "lin", n_ssm = 1, d_state = 16, dt_min = 0.02, dt_max = 0.2, glu = false, l_max = 48 }} }}
[[experiment.models]]
name = "nothing"
stack = {{ d_model = 1, layers = 1, norm = false, residual = false, mixer = {{ kind = "rnn", cell = "relu" }} }}
"#
            )
        };
        let report = small(&text(1.0));
        assert_eq!(report.rows.len(), 2);
        assert_eq!(report.rows[0].values.len(), 2);
        assert!(
            report.rows[0].mean() < report.rows[1].mean(),
            "{:?}",
            report.rows
        );
        assert!(report.holds, "{}", report.verdict);
        let strict = small(&text(1e-9));
        assert!(!strict.holds, "{}", strict.verdict);
        assert_eq!(
            strict.rows[0].values, report.rows[0].values,
            "same seeds, same values"
        );
    }

    #[test]
    fn lengths_are_compared_and_a_margin_that_is_missed_is_said() {
        let report = small(
            r#"
paper = "nope"
claim = "test"
seeds = 1
[experiment]
kind = "length"
tasks = [{ task = "copy", variant = "rsc", symbols = 3 }]
train_lengths = [1, 4]
test_lengths = [2, 6]
test_examples = 8
steps = 30
examples = 8
lr = 0.003
claimed = ["none"]
controls = ["sinusoid"]
margin = 2.0
[[experiment.models]]
name = "none"
stack = { d_model = 16, layers = 1, mlp_ratio = 2.0, mixer = { kind = "attention", heads = 2 } }
[[experiment.models]]
name = "sinusoid"
stack = { d_model = 16, layers = 1, mlp_ratio = 2.0, sinusoid = true, mixer = { kind = "attention", heads = 2 } }
"#,
        );
        assert!(!report.holds, "a margin of 200 points cannot be met");
        assert_eq!(report.rows.len(), 2);
        assert!(report.verdict.contains("MRR"), "{}", report.verdict);
    }
}
