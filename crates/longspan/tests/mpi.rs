//! Training by several processes: 2 and 4 processes of `mpirun` give the bits of one, also after an interruption.
#![cfg(feature = "mpi")]

use std::path::Path;
use std::process::Command;

const CONFIG: &str = r#"
seed = 3
save_every = 4
[model]
kind = "stack"
d_model = 16
layers = 2
mixer = { kind = "mamba2", head_dim = 8, state_size = 4, chunk_size = 8 }
[data]
kind = "task"
task = { task = "copy", variant = "cmc", symbols = 5 }
lengths = [1, 6]
examples = 2
[optim]
name = "adamw"
lr = 3e-3
[train]
steps = STEPS
micro_batches = 5
ranks = RANKS
"#;

fn train(folder: &Path, run: &str, processes: usize, ranks: usize, steps: usize) {
    let config = CONFIG
        .replace("STEPS", &steps.to_string())
        .replace("RANKS", &ranks.to_string());
    std::fs::write(folder.join(format!("{run}.toml")), config).unwrap();
    let program = env!("CARGO_BIN_EXE_longspan");
    let words = [
        "train",
        &format!("{run}.toml"),
        "--out",
        run,
        "--threads",
        "1",
    ];
    let mut command = Command::new(if processes == 0 { program } else { "mpirun" });
    if processes > 0 {
        let count = processes.to_string();
        command.args([
            "--allow-run-as-root",
            "--oversubscribe",
            "-n",
            &count,
            program,
        ]);
    }
    command.args(words).current_dir(folder);
    command.env("LONGSPAN_CONFIG", "/nonexistent/longspan.toml");
    let output = command
        .output()
        .expect("mpirun starts; Debian: openmpi-bin");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{processes} processes: {error}");
}

fn result(folder: &Path, run: &str) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| std::fs::read(folder.join(run).join("step-000010").join(name)).unwrap();
    (read("model.safetensors"), read("optim.safetensors"))
}

#[test]
fn two_and_four_processes_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    train(folder, "one", 0, 1, 10);
    let one = result(folder, "one");
    for (processes, ranks) in [(1, 1), (2, 1), (4, 1), (2, 2)] {
        let run = format!("p{processes}r{ranks}");
        train(folder, &run, processes, ranks, 10);
        assert!(
            result(folder, &run) == one,
            "{processes} processes of {ranks}"
        );
    }
    // What one number of processes began, another ends.
    train(folder, "turn", 2, 1, 10);
    let turn = folder.join("turn");
    std::fs::remove_dir_all(turn.join("step-000010")).unwrap();
    std::fs::write(turn.join("latest"), "step-000008").unwrap();
    train(folder, "turn", 4, 1, 10);
    assert!(result(folder, "turn") == one, "resumed by four");
}

#[test]
fn a_failing_process_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("bad.toml"),
        CONFIG.replace("STEPS", "10").replace("RANKS", "9"),
    )
    .unwrap();
    let output = Command::new("mpirun")
        .args(["--allow-run-as-root", "--oversubscribe", "-n", "2"])
        .arg(env!("CARGO_BIN_EXE_longspan"))
        .args(["train", "bad.toml"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && error.contains("ranks"),
        "{error}"
    );
}
