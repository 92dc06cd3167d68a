//! Parts of an experiment that are kept when they are finished (a setting with a seed is one), so that a run that was stopped
//! goes on where it was; and the rules by which measured values are judged.

use super::Row;
use crate::error::{At, Result, TrainError};
use crate::run::write_whole;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What one setting with one seed gave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// By name of the measure.
    pub values: BTreeMap<String, f64>,
    /// Trained values of the model.
    pub parameters: usize,
    /// Seconds of training and testing.
    pub seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    recipe: serde_json::Value,
    cells: BTreeMap<String, Cell>,
}

/// Finished cells by name, in memory or in a file too.
#[derive(Default)]
pub struct Cells {
    path: Option<PathBuf>,
    recipe: serde_json::Value,
    cells: BTreeMap<String, Cell>,
}

impl Cells {
    /// Keeps nothing beyond this run.
    pub fn in_memory() -> Self {
        Cells::default()
    }

    /// Keeps cells in a file. What is there is taken up if it belongs to the same recipe (the number of seeds may differ);
    /// cells of another recipe are dropped.
    pub fn open(path: &Path, recipe: &super::Recipe) -> Result<Self> {
        let mut recipe = recipe.clone();
        recipe.seeds = 0;
        let recipe =
            serde_json::to_value(&recipe).map_err(|error| TrainError::contents(path, error))?;
        let cells = match std::fs::read(path) {
            Ok(bytes) => {
                let stored: Stored = serde_json::from_slice(&bytes)
                    .map_err(|error| TrainError::contents(path, error))?;
                if stored.recipe == recipe {
                    stored.cells
                } else {
                    BTreeMap::new()
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).at(path),
        };
        Ok(Cells {
            path: Some(path.into()),
            recipe,
            cells,
        })
    }

    /// The cell of this name, made and kept if it is not there; none when `make` was asked to stop.
    pub fn get(
        &mut self,
        name: &str,
        make: impl FnOnce() -> Result<Option<Cell>>,
    ) -> Result<Option<Cell>> {
        if let Some(cell) = self.cells.get(name) {
            return Ok(Some(cell.clone()));
        }
        let start = std::time::Instant::now();
        let Some(mut cell) = make()? else {
            return Ok(None);
        };
        cell.seconds = start.elapsed().as_secs_f64();
        self.cells.insert(name.into(), cell.clone());
        if let Some(path) = &self.path {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).at(folder)?;
            }
            let stored = Stored {
                recipe: self.recipe.clone(),
                cells: self.cells.clone(),
            };
            let json = serde_json::to_vec_pretty(&stored)
                .map_err(|error| TrainError::contents(path, error))?;
            write_whole(path, &json)?;
        }
        Ok(Some(cell))
    }
}

/// A condition on measured means over seeds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// The measure.
    pub measure: String,
    /// The setting.
    pub of: String,
    /// Another setting whose mean is taken off.
    #[serde(default)]
    pub minus: Option<String>,
    /// The measure taken off, if it is another one.
    #[serde(default)]
    pub minus_measure: Option<String>,
    /// Holds from here on.
    #[serde(default)]
    pub at_least: Option<f64>,
    /// Holds up to here.
    #[serde(default)]
    pub at_most: Option<f64>,
}

/// Cells of all settings: setting, then seeds.
pub type Measured = BTreeMap<String, Vec<Cell>>;

/// Values of a measure over seeds; empty when it was not taken.
pub fn values(measured: &Measured, setting: &str, measure: &str) -> Vec<f64> {
    let cells = measured.get(setting).map_or(&[][..], Vec::as_slice);
    cells
        .iter()
        .filter_map(|cell| cell.values.get(measure).copied())
        .collect()
}

/// Mean over seeds; not a number when there is none.
pub fn mean(measured: &Measured, setting: &str, measure: &str) -> f64 {
    let list = values(measured, setting, measure);
    list.iter().sum::<f64>() / list.len() as f64
}

/// Judges all checks: whether all hold, what was required, what was found.
pub fn judge(checks: &[Check], measured: &Measured) -> (bool, String, String) {
    let (mut holds, mut required, mut found) = (true, Vec::new(), Vec::new());
    for check in checks {
        let mut name = format!("{}, {}", check.of, check.measure);
        let mut value = mean(measured, &check.of, &check.measure);
        if check.minus.is_some() || check.minus_measure.is_some() {
            let setting = check.minus.as_ref().unwrap_or(&check.of);
            let measure = check.minus_measure.as_ref().unwrap_or(&check.measure);
            value -= mean(measured, setting, measure);
            name += &format!(" minus {setting}");
            if check.minus_measure.is_some() {
                name += &format!(", {measure}");
            }
        }
        let mut fits = value.is_finite();
        let mut rule = name.clone();
        if let Some(least) = check.at_least {
            fits &= value >= least;
            rule += &format!(" at least {least}");
        }
        if let Some(most) = check.at_most {
            fits &= value <= most;
            rule += &format!(" at most {most}");
        }
        holds &= fits;
        required.push(rule);
        let word = if fits { "holds" } else { "does not hold" };
        found.push(format!("{name}: {value:.3} ({word})"));
    }
    (holds, required.join("; "), found.join("; "))
}

/// Rows of a report: every setting with each of these measures that was taken.
pub fn rows(measured: &Measured, settings: &[String], measures: &[String]) -> Vec<Row> {
    let mut out = Vec::new();
    for setting in settings {
        for measure in measures {
            let list = values(measured, setting, measure);
            let Some(cells) = measured.get(setting).filter(|_| !list.is_empty()) else {
                continue;
            };
            out.push(Row {
                name: format!("{setting}: {measure}"),
                parameters: cells.first().map_or(0, |cell| cell.parameters),
                values: list,
                seconds: cells.iter().map(|cell| cell.seconds).sum(),
            });
        }
    }
    out
}

/// Refuses checks of settings that do not exist, and checks without a bound.
pub fn check_settings(checks: &[Check], settings: &[String]) -> Result<()> {
    if checks.is_empty() {
        return Err(TrainError::option("checks", "none", "one or more"));
    }
    for check in checks {
        for name in [Some(&check.of), check.minus.as_ref()]
            .into_iter()
            .flatten()
        {
            if !settings.contains(name) {
                let expected = format!("one of the settings {}", settings.join(", "));
                return Err(TrainError::option(
                    "checks.of, checks.minus",
                    name,
                    expected,
                ));
            }
        }
        if check.at_least.is_none() && check.at_most.is_none() {
            let expected = "at_least or at_most";
            return Err(TrainError::option("checks", &check.measure, expected));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(value: f64) -> Cell {
        Cell {
            values: [("x".to_string(), value)].into(),
            ..Cell::default()
        }
    }

    #[test]
    fn checks_are_judged_by_means_and_missing_values_never_hold() {
        let measured: Measured = [
            ("a".to_string(), vec![cell(1.0), cell(3.0)]),
            ("b".to_string(), vec![cell(1.5)]),
        ]
        .into();
        let check = |of: &str, minus: Option<&str>, measure: &str, least, most| Check {
            measure: measure.into(),
            of: of.into(),
            minus: minus.map(String::from),
            minus_measure: None,
            at_least: least,
            at_most: most,
        };
        let holds = |check: Check| judge(&[check], &measured).0;
        assert!(holds(check("a", None, "x", Some(2.0), None)));
        assert!(!holds(check("a", None, "x", Some(2.1), None)));
        assert!(holds(check("a", Some("b"), "x", Some(0.4), Some(0.6))));
        assert!(!holds(check("a", None, "y", Some(-1e9), None)));
        assert!(!holds(check("c", None, "x", None, Some(1e9))));
        let settings = ["a".to_string()];
        assert!(check_settings(&[check("b", None, "x", Some(0.0), None)], &settings).is_err());
        assert!(check_settings(&[check("a", None, "x", None, None)], &settings).is_err());
    }

    #[test]
    fn finished_cells_are_not_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper").join("x.cells.json");
        let mut recipe = super::super::recipe("s4").unwrap();
        let mut made = 0;
        for seeds in [1, 2] {
            recipe.seeds = seeds;
            let mut cells = Cells::open(&path, &recipe).unwrap();
            let got = cells.get("one", || {
                made += 1;
                Ok(Some(cell(4.0)))
            });
            assert_eq!(got.unwrap().unwrap().values["x"], 4.0);
            assert!(cells.get("stopped", || Ok(None)).unwrap().is_none());
        }
        assert_eq!(made, 1);
        // Another recipe does not use them.
        recipe.claim += "!";
        let mut cells = Cells::open(&path, &recipe).unwrap();
        assert!(cells.get("one", || Ok(None)).unwrap().is_none());
        std::fs::write(&path, "{").unwrap();
        assert!(Cells::open(&path, &recipe).is_err());
    }
}
