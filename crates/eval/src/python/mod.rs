//! The Python behaviours that published scores and generated data sets depend on: strings, numbers,
//! `difflib`, and the random streams of CPython and numpy. For every benchmark that must agree with a
//! reference written in Python to the last digit or byte; held against CPython 3.11 and numpy 1.26.

pub mod chars;
pub mod difflib;
pub mod number;
pub mod random;
pub mod text;

pub use difflib::SequenceMatcher;
pub use number::{parse_float, repr_float, round};
pub use random::{NumpyRandom, Random};
pub use text::{
    PUNCTUATION, delete_punctuation, format_fields, repr_str, split, splitlines, strip,
};
