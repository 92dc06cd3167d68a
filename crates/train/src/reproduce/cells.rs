//! Parts of an experiment: a setting with a seed is one. Parts do not depend on each other, so several may run side by side;
//! finished ones are kept, so that a run that was stopped, or asks for more seeds, goes on with what is missing. And the rules
//! by which measured values are judged.

use super::Row;
use crate::error::{At, Result, TrainError};
use crate::run::write_whole;
use crate::trainer::roomy;
use candle_core::Device;
use longspan_kernels::pool::Pool;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

/// What one setting with one seed gave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// By name of the measure.
    pub values: BTreeMap<String, f64>,
    /// A course over steps, to be drawn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<(f64, f64)>,
    /// Trained values of the model.
    pub parameters: usize,
    /// Seconds of training and testing.
    pub seconds: f64,
}

/// Told the share of a part that is done, answers whether to go on.
pub type GoOn<'a> = &'a mut dyn FnMut(f64) -> bool;

/// Told what is being done and the share of all work done, answers whether to go on.
pub type Watch<'a> = &'a mut dyn FnMut(&str, f64) -> bool;

/// A setting with a seed.
pub struct Part<'a> {
    /// The setting.
    pub setting: String,
    /// The seed.
    pub seed: u64,
    /// All that the cell depends on but the seed: a kept cell with another key is made again.
    pub key: Value,
    /// Makes the cell; none when told to stop.
    pub make: Make<'a>,
}

type Make<'a> = Box<dyn Fn(GoOn<'_>) -> Result<Option<Cell>> + Send + Sync + 'a>;

impl Part<'_> {
    fn name(&self) -> String {
        format!("{}, seed {}", self.setting, self.seed)
    }
}

/// What has a name in tables, figures and checks.
pub trait Setting: Serialize + Sync {
    /// The name.
    fn name(&self) -> &str;
}

/// Every setting with every seed, seed by seed: a run that is stopped has compared all settings. `shared` is what cells of
/// all settings depend on.
pub fn grid<'a, S: Setting>(
    shared: Value,
    settings: &'a [S],
    seeds: u64,
    make: impl Fn(&'a S, u64, GoOn<'_>) -> Result<Option<Cell>> + Copy + Send + Sync + 'a,
) -> Vec<Part<'a>> {
    (0..seeds)
        .flat_map(|seed| settings.iter().map(move |setting| (seed, setting)))
        .map(|(seed, setting)| Part {
            setting: setting.name().into(),
            seed,
            key: serde_json::json!([shared, serde_json::to_value(setting).unwrap_or_default()]),
            make: Box::new(move |go_on| make(setting, seed, go_on)),
        })
        .collect()
}

#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    key: Value,
    cell: Cell,
}

/// Finished cells by name, in memory or in a file too.
pub struct Cells {
    path: Option<PathBuf>,
    jobs: usize,
    device: Device,
    kept: BTreeMap<String, Kept>,
}

impl Default for Cells {
    fn default() -> Self {
        Cells {
            path: None,
            jobs: 0,
            device: Device::Cpu,
            kept: BTreeMap::new(),
        }
    }
}

impl Cells {
    /// Keeps nothing beyond this run.
    pub fn in_memory() -> Self {
        Cells::default()
    }

    /// Keeps cells in a file, and takes up what is there.
    pub fn open(path: &Path) -> Result<Self> {
        let kept = match std::fs::read(path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| TrainError::contents(path, error))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).at(path),
        };
        Ok(Cells {
            path: Some(path.into()),
            kept,
            ..Cells::default()
        })
    }

    /// So many parts run side by side, each with kernels on its own thread alone; with one, its kernels use all threads.
    pub fn jobs(mut self, jobs: usize) -> Self {
        self.jobs = jobs;
        self
    }

    /// Models are trained here.
    pub fn device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// Where models are trained.
    pub(super) fn place(&self) -> Device {
        self.device.clone()
    }

    fn known(&self, part: &Part<'_>) -> Option<Cell> {
        let kept = self.kept.get(&part.name())?;
        (kept.key == part.key).then(|| kept.cell.clone())
    }

    fn keep(&mut self, part: &Part<'_>, cell: Cell) -> Result<()> {
        let key = part.key.clone();
        self.kept.insert(part.name(), Kept { key, cell });
        let Some(path) = &self.path else {
            return Ok(());
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).at(folder)?;
        }
        let json = serde_json::to_vec_pretty(&self.kept)
            .map_err(|error| TrainError::contents(path, error))?;
        write_whole(path, &json)
    }

    /// The cells of all parts, each kept as soon as it is made; those that are there are not made again. None when `watch`
    /// said stop. After an error no further part is begun.
    pub fn make(&mut self, parts: &[Part<'_>], watch: Watch<'_>) -> Result<Option<Measured>> {
        enum News {
            Share(f64),
            End(Result<Option<Cell>>),
        }
        let mut cells: Vec<Option<Cell>> = parts.iter().map(|part| self.known(part)).collect();
        let missing: Vec<usize> = (0..parts.len()).filter(|&i| cells[i].is_none()).collect();
        let mut shares: Vec<f64> = cells
            .iter()
            .map(|cell| if cell.is_some() { 1.0 } else { 0.0 })
            .collect();
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (mut stopped, mut failed) = (false, None);
        let jobs = self.jobs.clamp(1, missing.len().max(1));
        std::thread::scope(|scope| -> Result<()> {
            let (tell, told) = mpsc::channel::<(usize, News)>();
            for _ in 0..jobs {
                let (tell, missing, next, stop) = (tell.clone(), &missing, &next, &stop);
                let work = move || {
                    while let Some(&index) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let start = Instant::now();
                        // The receiver lives until all senders are gone.
                        let made = (parts[index].make)(&mut |share| {
                            tell.send((index, News::Share(share))).is_ok()
                                && !stop.load(Ordering::Relaxed)
                        });
                        let made = made.map(|cell| {
                            cell.map(|cell| Cell {
                                seconds: start.elapsed().as_secs_f64(),
                                ..cell
                            })
                        });
                        if tell.send((index, News::End(made))).is_err() {
                            break;
                        }
                    }
                };
                let begun = roomy(scope, "longspan-cell", move || match jobs {
                    1 => work(),
                    _ => Pool::alone(work),
                });
                begun.at(Path::new("a thread of the experiment"))?;
            }
            drop(tell);
            for (index, news) in told {
                match news {
                    News::Share(share) => shares[index] = share.clamp(shares[index], 1.0),
                    News::End(Ok(Some(cell))) => {
                        shares[index] = 1.0;
                        cells[index] = Some(cell.clone());
                        if let Err(error) = self.keep(&parts[index], cell) {
                            failed.get_or_insert(error);
                        }
                    }
                    News::End(Ok(None)) => {}
                    News::End(Err(error)) => {
                        failed.get_or_insert(error);
                    }
                }
                let done = shares.iter().sum::<f64>() / shares.len() as f64;
                stopped |= !watch(&parts[index].name(), done.min(1.0));
                stop.fetch_or(stopped || failed.is_some(), Ordering::Relaxed);
            }
            Ok(())
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        if stopped {
            return Ok(None);
        }
        let mut measured = Measured::new();
        for (part, cell) in parts.iter().zip(cells) {
            let Some(cell) = cell else { return Ok(None) };
            let list = measured.entry(part.setting.clone()).or_default();
            list.push(cell);
        }
        Ok(Some(measured))
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
    /// It is taken off so many times; none = once.
    #[serde(default)]
    pub times: Option<f64>,
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
            value -= check.times.unwrap_or(1.0) * mean(measured, setting, measure);
            let times = check.times.map_or(String::new(), |t| format!("{t} times "));
            name += &format!(" minus {times}{setting}");
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
            times: None,
            at_least: least,
            at_most: most,
        };
        let holds = |check: Check| judge(&[check], &measured).0;
        assert!(holds(check("a", None, "x", Some(2.0), None)));
        assert!(!holds(check("a", None, "x", Some(2.1), None)));
        assert!(holds(check("a", Some("b"), "x", Some(0.4), Some(0.6))));
        let twice = Check {
            times: Some(2.0),
            ..check("a", Some("b"), "x", Some(-1.1), Some(-0.9))
        };
        assert!(holds(twice));
        assert!(!holds(check("a", None, "y", Some(-1e9), None)));
        assert!(!holds(check("c", None, "x", None, Some(1e9))));
        let settings = ["a".to_string()];
        assert!(check_settings(&[check("b", None, "x", Some(0.0), None)], &settings).is_err());
        assert!(check_settings(&[check("a", None, "x", None, None)], &settings).is_err());
    }

    /// Parts a and b, two seeds each, counted when made.
    fn parts<'a>(made: &'a AtomicUsize, key: &str) -> Vec<Part<'a>> {
        let part = |setting: &str, seed: u64| Part {
            setting: setting.into(),
            seed,
            key: key.into(),
            make: Box::new(move |go_on| {
                made.fetch_add(1, Ordering::Relaxed);
                Ok(go_on(0.5).then(|| cell(seed as f64)))
            }),
        };
        let list = [("a", 0), ("b", 0), ("a", 1), ("b", 1)];
        list.map(|(setting, seed)| part(setting, seed)).into()
    }

    #[test]
    fn finished_cells_are_not_made_again_and_jobs_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper").join("x.cells.json");
        let made = AtomicUsize::new(0);
        let count = |expected: usize| assert_eq!(made.swap(0, Ordering::Relaxed), expected);
        let mut all = Vec::new();
        for jobs in [1, 3] {
            let mut cells = Cells::in_memory().jobs(jobs);
            let mut heard = 0.0;
            let got = cells.make(&parts(&made, "k"), &mut |_, share| {
                assert!(share >= heard && share <= 1.0);
                heard = share;
                true
            });
            let mut got = got.unwrap().unwrap();
            assert_eq!(heard, 1.0);
            got.values_mut().flatten().for_each(|c| c.seconds = 0.0);
            all.push(got);
            count(4);
        }
        assert_eq!(all[0], all[1]);
        assert_eq!(values(&all[0], "b", "x"), [0.0, 1.0]);
        // Two seeds first of one setting, then all; then again.
        for (which, expected) in [(0..1, 1), (0..4, 3), (0..4, 0)] {
            let mut cells = Cells::open(&path).unwrap().jobs(2);
            let got = cells.make(&parts(&made, "k")[which], &mut |_, _| true);
            assert!(got.unwrap().is_some());
            count(expected);
        }
        // A part of another key is made again.
        let mut cells = Cells::open(&path).unwrap();
        assert!(
            cells
                .make(&parts(&made, "l"), &mut |_, _| true)
                .unwrap()
                .is_some()
        );
        count(4);
        std::fs::write(&path, "{").unwrap();
        assert!(Cells::open(&path).is_err());
    }

    #[test]
    fn a_stop_is_heard_and_an_error_is_told() {
        let made = AtomicUsize::new(0);
        let mut cells = Cells::in_memory().jobs(2);
        let got = cells.make(&parts(&made, "k"), &mut |_, _| false);
        assert!(got.unwrap().is_none());
        let failing = Part {
            setting: "c".into(),
            seed: 0,
            key: Value::Null,
            make: Box::new(|_| Err(TrainError::option("c", 1, 2))),
        };
        let error = cells.make(&[failing], &mut |_, _| true).unwrap_err();
        assert!(error.to_string().contains('c'), "{error}");
    }
}
