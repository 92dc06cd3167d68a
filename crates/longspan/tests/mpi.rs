//! Training by several processes: 2 and 4 processes of `mpirun` give the bits of one, also after an interruption.
#![cfg(feature = "mpi")]

mod training;

use std::path::Path;
use training::{command, config, text};

const PROGRAM: &str = env!("CARGO_BIN_EXE_longspan");
/// Of `mpirun`, whose machine may have fewer cores than a test has processes.
const ANYWHERE: [&str; 3] = ["--allow-run-as-root", "--oversubscribe", "-n"];

fn write(folder: &Path, run: &str, steps: usize, ranks: usize) {
    let train = format!("steps = {steps}\nmicro_batches = 5\nranks = {ranks}");
    let config = config(4, 2, &train, "");
    std::fs::write(folder.join(format!("{run}.toml")), config).unwrap();
}

fn train(folder: &Path, run: &str, processes: usize, ranks: usize, steps: usize) {
    write(folder, run, steps, ranks);
    let mut command = match processes {
        0 => command(PROGRAM, folder),
        _ => {
            let mut command = command("mpirun", folder);
            command
                .args(ANYWHERE)
                .arg(processes.to_string())
                .arg(PROGRAM);
            command
        }
    };
    command.args([
        "train",
        &format!("{run}.toml"),
        "--out",
        run,
        "--threads",
        "1",
    ]);
    let output = command
        .output()
        .expect("mpirun starts; Debian: openmpi-bin");
    let error = text(&output.stderr);
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
    write(folder.path(), "bad", 10, 9);
    let output = command("mpirun", folder.path())
        .args(ANYWHERE)
        .args(["2", PROGRAM, "train", "bad.toml"])
        .output()
        .unwrap();
    let error = text(&output.stderr);
    assert!(
        !output.status.success() && error.contains("ranks"),
        "{error}"
    );
}
