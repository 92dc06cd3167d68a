#!/usr/bin/env bash
# Runs every fuzz target for a number of seconds (60 if none is given), or only those named:
#     scripts/fuzz.sh [SECONDS [TARGET...]]
# Needs the stable toolchain and a C++ compiler, nothing else: libFuzzer comes with a crate, and the
# compiler's coverage pass needs no nightly. A finding is kept under fuzz/artifacts/TARGET/; run the
# printed program on that file to see it again. New inputs go to fuzz/target/corpus/TARGET/.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

seconds=${1:-60}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for file in fuzz_targets/*.rs; do
        targets+=("$(basename "$file" .rs)")
    done
fi

host=$(rustc -vV | sed -n 's/^host: //p')
# With --target the flags do not reach build scripts and procedural macros.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares \
-Ccodegen-units=1"
cargo build --release --target "$host" "${targets[@]/#/--bin=}"

for target in "${targets[@]}"; do
    program=target/$host/release/$target
    grown=target/corpus/$target
    mkdir -p "$grown" "corpus/$target" "artifacts/$target"
    echo "== $target: $seconds s ($PWD/$program)"
    "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=1024 \
        -print_final_stats=1 -artifact_prefix="artifacts/$target/" "$grown" "corpus/$target" \
        2>&1 | grep -vE '^#[0-9]+\s+(NEW|REDUCE|pulse|RELOAD)|NEW_FUNC' | tail -n 40
done
