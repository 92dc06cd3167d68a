//! Reads golden tensors: reference results that tests of any crate compare against.
//!
//! Include it from an integration test with `#[path = "../../../tests/golden.rs"] mod golden;`. Every
//! safetensors file below the golden folder names its `paper` and its `case`, and carries the
//! configuration of the case as JSON, so that a file dropped into the folder is tested without a word of
//! code. The folder is `tests/golden` of the workspace, or the one in `LONGSPAN_GOLDEN`.
//!
//! Everything here panics with the file and the tensor at fault: in a test that is the right answer.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

/// One tensor of a case. Integers up to 2^53 are exact in `values` too.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    /// As safetensors spells it: `F32`, `I64`, ...
    pub dtype: String,
    /// Row-major.
    pub values: Vec<f64>,
    /// Row-major; empty for floating-point tensors.
    pub integers: Vec<i64>,
}

/// One golden file.
#[derive(Debug, Clone)]
pub struct Case {
    pub path: PathBuf,
    /// Slug of the paper.
    pub paper: String,
    /// Kind of the case: decides how to run it.
    pub case: String,
    /// All configuration values, `paper` and `case` left out.
    pub meta: Map<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
}

/// The golden folder.
pub fn root() -> PathBuf {
    match std::env::var_os("LONGSPAN_GOLDEN") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
    }
}

/// All cases of a paper, sorted by path. Panics if there is none: a test without cases proves nothing.
pub fn cases(paper: &str) -> Vec<Case> {
    let mut files = Vec::new();
    walk(&root(), &mut files);
    files.sort();
    let cases: Vec<Case> = files
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .filter(|path| metadata(path).get("paper").is_some_and(|p| p == paper))
        .map(|path| read(path))
        .collect();
    assert!(
        !cases.is_empty(),
        "no golden case of paper `{paper}` below {}; check LONGSPAN_GOLDEN",
        root().display()
    );
    cases
}

/// All cases of a paper of one kind; panics if there is none.
pub fn cases_of(paper: &str, case: &str) -> Vec<Case> {
    let mut found = cases(paper);
    found.retain(|c| c.case == case);
    assert!(
        !found.is_empty(),
        "paper `{paper}` has no golden case `{case}`"
    );
    found
}

/// A JSON file of rules or strings, by paper and file name.
pub fn json(paper: &str, file: &str) -> Value {
    let path = root().join(paper).join(file);
    let text = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file of one JSON value a line, by paper and file name.
pub fn jsonl(paper: &str, file: &str) -> Vec<Value> {
    let path = root().join(paper).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines: Vec<Value> = text
        .split('\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        })
        .collect();
    assert!(!lines.is_empty(), "{} is empty", path.display());
    lines
}

impl Case {
    /// Whether the file holds this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| {
            let names: Vec<&String> = self.tensors.keys().collect();
            panic!("{}: no tensor `{name}` among {names:?}", self.at())
        })
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensor(name).shape
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.tensor(name).values.iter().map(|&v| v as f32).collect()
    }

    pub fn f64(&self, name: &str) -> Vec<f64> {
        self.tensor(name).values.clone()
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        let tensor = self.tensor(name);
        let floating = tensor.dtype.starts_with('F') || tensor.dtype.starts_with('B');
        assert!(!floating, "{}: `{name}` is {}", self.at(), tensor.dtype);
        tensor.integers.clone()
    }

    /// A configuration value.
    pub fn meta(&self, key: &str) -> &Value {
        self.meta.get(key).unwrap_or_else(|| {
            let keys: Vec<&String> = self.meta.keys().collect();
            panic!("{}: no configuration `{key}` among {keys:?}", self.at())
        })
    }

    pub fn meta_f64(&self, key: &str) -> f64 {
        let value = self.meta(key);
        value
            .as_f64()
            .unwrap_or_else(|| panic!("{}: `{key}` is {value}, not a number", self.at()))
    }

    pub fn meta_usize(&self, key: &str) -> usize {
        let number = self.meta_f64(key);
        assert!(
            number >= 0.0 && number.fract() == 0.0,
            "{}: `{key}` is {number}, not a whole number",
            self.at()
        );
        number as usize
    }

    pub fn meta_str(&self, key: &str) -> &str {
        let value = self.meta(key);
        value
            .as_str()
            .unwrap_or_else(|| panic!("{}: `{key}` is {value}, not a string", self.at()))
    }

    /// The stated tolerance of an output tensor: |error| <= atol + rtol * |golden|. `atol` and `rtol`
    /// map tensors to numbers, or are one number for all; a missing one is 0.
    pub fn tolerance(&self, name: &str) -> (f64, f64) {
        let stated = |key: &str| {
            let value = self.meta.get(key)?;
            value.as_f64().or_else(|| value.get(name)?.as_f64())
        };
        let (atol, rtol) = (stated("atol"), stated("rtol"));
        assert!(
            atol.is_some() || rtol.is_some(),
            "{}: no tolerance is stated for `{name}`",
            self.at()
        );
        (atol.unwrap_or(0.0), rtol.unwrap_or(0.0))
    }

    /// Asserts that `found` agrees with the golden tensor within its stated tolerance.
    pub fn assert_close<T: Copy + Into<f64>>(&self, name: &str, found: &[T]) {
        let (atol, rtol) = self.tolerance(name);
        self.assert_within(name, found, |_, golden| atol + rtol * golden.abs());
    }

    /// Asserts |error| <= `tolerance(index, golden)` for every element.
    pub fn assert_within<T: Copy + Into<f64>>(
        &self,
        name: &str,
        found: &[T],
        tolerance: impl Fn(usize, f64) -> f64,
    ) {
        let golden = &self.tensor(name).values;
        assert_eq!(
            found.len(),
            golden.len(),
            "{}: number of values of `{name}`",
            self.at()
        );
        for (index, (&found, &golden)) in found.iter().zip(golden).enumerate() {
            let (found, allowed) = (found.into(), tolerance(index, golden));
            // Written so that a NaN fails.
            let close = found == golden || (found - golden).abs() <= allowed;
            assert!(
                close,
                "{}: `{name}`[{index}] is {found}, expected {golden} within {allowed:e}",
                self.at()
            );
        }
    }

    fn at(&self) -> String {
        self.path.display().to_string()
    }
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|e| panic!("golden folder {}: {e}", folder.display()));
    for entry in entries {
        let path = entry.expect("entry of the golden folder").path();
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

/// The string map in the header of a safetensors file, without reading its tensors.
fn metadata(path: &Path) -> BTreeMap<String, String> {
    let fail = |what: &str| -> ! { panic!("{}: {what}", path.display()) };
    let mut file = fs::File::open(path).unwrap_or_else(|e| fail(&e.to_string()));
    let mut length = [0; 8];
    let read = file.read_exact(&mut length);
    read.unwrap_or_else(|e| fail(&e.to_string()));
    let mut header = Vec::new();
    let limit = u64::from_le_bytes(length);
    let read = file.take(limit).read_to_end(&mut header);
    read.unwrap_or_else(|e| fail(&e.to_string()));
    let mut header: Map<String, Value> =
        serde_json::from_slice(&header).unwrap_or_else(|e| fail(&e.to_string()));
    match header.remove("__metadata__") {
        Some(map) => serde_json::from_value(map).unwrap_or_else(|e| fail(&e.to_string())),
        None => BTreeMap::new(),
    }
}

fn read(path: &Path) -> Case {
    let mut strings = metadata(path);
    let mut plain = |key: &str| {
        strings
            .remove(key)
            .unwrap_or_else(|| panic!("{}: metadata has no `{key}`", path.display()))
    };
    let (paper, case) = (plain("paper"), plain("case"));
    let meta = strings
        .into_iter()
        .map(|(key, text)| match serde_json::from_str(&text) {
            Ok(value) => (key, value),
            Err(e) => panic!("{}: metadata `{key}` is not JSON: {e}", path.display()),
        })
        .collect();
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file =
        SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let tensors = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = values(view.dtype(), view.data(), path, &name);
            let (values, integers) = match values {
                Values::Float(values) => (values, Vec::new()),
                Values::Integer(list) => (list.iter().map(|&v| v as f64).collect(), list),
            };
            let tensor = Tensor {
                shape: view.shape().to_vec(),
                dtype: format!("{:?}", view.dtype()),
                values,
                integers,
            };
            (name, tensor)
        })
        .collect();
    Case {
        path: path.into(),
        paper,
        case,
        meta,
        tensors,
    }
}

enum Values {
    Float(Vec<f64>),
    Integer(Vec<i64>),
}

fn values(dtype: Dtype, data: &[u8], path: &Path, name: &str) -> Values {
    macro_rules! list {
        ($type:ty, $to:ty) => {
            data.chunks_exact(size_of::<$type>())
                .map(|b| <$type>::from_le_bytes(b.try_into().expect("exact chunk")) as $to)
                .collect()
        };
    }
    match dtype {
        Dtype::F64 => Values::Float(list!(f64, f64)),
        Dtype::F32 => Values::Float(list!(f32, f64)),
        Dtype::BF16 => {
            let bits: Vec<u16> = list!(u16, u16);
            let wide = bits.iter().map(|&b| f32::from_bits(u32::from(b) << 16));
            Values::Float(wide.map(f64::from).collect())
        }
        Dtype::I64 => Values::Integer(list!(i64, i64)),
        Dtype::I32 => Values::Integer(list!(i32, i64)),
        Dtype::I16 => Values::Integer(list!(i16, i64)),
        Dtype::I8 => Values::Integer(list!(i8, i64)),
        Dtype::U32 => Values::Integer(list!(u32, i64)),
        Dtype::U16 => Values::Integer(list!(u16, i64)),
        Dtype::U8 | Dtype::BOOL => Values::Integer(list!(u8, i64)),
        other => panic!("{}: `{name}` has dtype {other:?}", path.display()),
    }
}
