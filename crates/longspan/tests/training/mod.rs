//! What tests of the training command share: the program in a folder of its own, and a small Mamba-2 that copies.

use std::path::Path;
use std::process::{Command, Stdio};

/// The program, or another that starts it, in a folder and without the user's settings.
pub fn command(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).stdin(Stdio::null());
    command.env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml");
    command
}

/// A configuration: `data`, `train` and `rest` are lines of TOML that tests differ in.
pub fn config(save_every: u64, examples: usize, train: &str, rest: &str) -> String {
    format!(
        r#"
seed = 3
save_every = {save_every}
[model]
kind = "stack"
d_model = 16
layers = 2
mixer = {{ kind = "mamba2", head_dim = 8, state_size = 4, chunk_size = 8 }}
[data]
kind = "task"
task = {{ task = "copy", variant = "cmc", symbols = 5 }}
lengths = [1, 6]
examples = {examples}
[optim]
name = "adamw"
lr = 3e-3
[train]
{train}
{rest}
"#
    )
}

/// What a program printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
