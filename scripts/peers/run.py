#!/usr/bin/env python3
"""Speed of the programs Longspan is compared with, on this machine, by turns, in one JSON file.

    run.py MODEL.gguf ... [--out peers.json] [--only llama.cpp,openvino,torch] [--repeat 3] [--threads 2]
           [--prefill 512,4096,8192] [--decode 0,8192] [--tokens 64]
           [--with "longspan bench speed --model {model} --json --prefill {prefill} --decode {decode}"]

Install the peers with install.sh and run this with the Python of that folder.

What is measured. `prefill`: tokens per second of reading `length` new tokens and giving the logits of the last one.
`decode`: tokens per second of 64 tokens, one at a time, after `depth` tokens are in the cache. In each of --repeat
rounds every peer runs once in a process of its own, one after the other, with an untimed warm-up, so that a busy spell
of the machine falls on all of them; tok_s is the median of the rounds.

  llama.cpp  llama-bench on the file as it is, flash attention on
  openvino   OpenVINO GenAI on the file as it is where it can read it; a row's `note` says where a Q4_0 copy was made
             because it could not (the copy is the faster kind of weight). Token ids are new in each run, so that no
             prefix is found in a cache
  torch      transformers with random bfloat16 weights of the model's shape, sdpa attention

--with runs a command of ours in each round too; {model}, {prefill}, {decode} in it are filled in. It must print rows
like those below as a JSON list or as lines; its peer name is its own. Ratios to the best peer of each column follow.

The JSON: {"machine": {...}, "rows": [{"peer", "model", "what", "length" or "depth", "tok_s", "runs", "median"}],
"skipped": [{"peer", "model", "reason"}]}. `machine.load` is the load average at the start of each round: above about
0.5, other programs were running and the figures are low.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

PEERS = ("llama.cpp", "openvino", "torch")


# Each peer prints rows {"what", "length" | "depth", "tok_s"} when this script runs itself with --worker.


def run_llama_cpp(options, model):
    """Rows of llama-bench."""
    beside = pathlib.Path(sys.executable).with_name("llama-bench")
    program = str(beside) if beside.exists() else shutil.which("llama-bench")
    if not program:
        raise RuntimeError("llama-bench not found beside this Python or on PATH; run install.sh")
    base = [program, "-m", str(model), "-t", str(options.threads), "-fa", "1", "-r", "1", "-o", "json"]
    lengths, depths = (",".join(map(str, values)) for values in (options.prefill, options.decode))
    jobs = [["-p", lengths, "-n", "0"]] if lengths else []
    jobs += [["-p", "0", "-n", str(options.tokens), "-d", depths]] if depths else []
    rows = []
    for job in jobs:
        done = subprocess.run(base + job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"llama-bench ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        for entry in json.loads(done.stdout):
            row = {"tok_s": entry["samples_ts"][0], "note": f"build {entry['build_commit']}"}
            if entry["n_gen"]:
                rows.append({"what": "decode", "depth": entry["n_depth"], **row})
            else:
                rows.append({"what": "prefill", "length": entry["n_prompt"], **row})
    return rows


def requantise(source, target):
    """The GGUF file `source` with every quantised tensor made anew in Q4_0, which more programs read."""
    import gguf

    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for tensor in reader.tensors:
        if tensor.tensor_type in (kind.F32, kind.F16):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        data = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), kind.Q4_0)
        writer.add_tensor(tensor.name, data, raw_dtype=kind.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_openvino(options, model):
    """Rows of OpenVINO GenAI's own metrics."""
    import numpy as np
    import openvino
    import openvino_genai

    note = f"openvino-genai {openvino_genai.__version__}"
    load = {"INFERENCE_NUM_THREADS": options.threads}
    try:
        pipeline = openvino_genai.LLMPipeline(str(model), "CPU", **load)
    except RuntimeError as first:
        # The scratch folder lives as long as the whole run: the copy serves all rounds.
        copy = options.scratch / model.name
        if not copy.exists():
            part = copy.with_suffix(".part")
            requantise(model, part)
            part.rename(copy)
        try:
            pipeline = openvino_genai.LLMPipeline(str(copy), "CPU", **load)
        except RuntimeError as second:
            lines = [str(error).strip().splitlines()[-1] for error in (first, second)]
            raise RuntimeError(f"cannot read the file ({lines[0]}) nor a Q4_0 copy ({lines[1]})") from None
        note += ", Q4_0 copy: it cannot read the file's own types"

    def generate(length, new):
        """Time to first token and time per further token, in milliseconds."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.min_new_tokens, config.ignore_eos, config.do_sample = new, new, True, False
        config.apply_chat_template = False
        ids = np.array([[random.randrange(100, 30000) for _ in range(length)]], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        return metrics.get_ttft().mean, metrics.get_tpot().mean

    generate(64, 4)
    rows = []
    for length in options.prefill:
        first, _ = generate(length, 1)
        rows.append({"what": "prefill", "length": length, "tok_s": 1000 * length / first, "note": note})
    for depth in options.decode:
        # The time per token leaves out the first, so it is that of `tokens` steps.
        _, each = generate(max(depth, 1), options.tokens + 1)
        rows.append({"what": "decode", "depth": depth, "tok_s": 1000 / each, "note": note})
    return rows


def run_torch(options, model):
    """Rows of transformers with random weights."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    fields = load_gguf_checkpoint(str(model), return_tensors=False)["config"]
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    network.eval()
    note = f"torch {torch.__version__}, transformers {transformers.__version__}, bfloat16, random weights"

    def prefill(length):
        """Seconds and the cache."""
        ids = torch.randint(100, 30000, (1, length))
        start = time.perf_counter()
        out = network(input_ids=ids, use_cache=True, logits_to_keep=1)
        out.logits.argmax(-1)
        return time.perf_counter() - start, out.past_key_values

    def decode(cache):
        """Seconds for options.tokens steps."""
        token = torch.randint(100, 30000, (1, 1))
        start = time.perf_counter()
        for _ in range(options.tokens):
            out = network(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = out.past_key_values, out.logits.argmax(-1)
        return time.perf_counter() - start

    rows = []
    with torch.inference_mode():
        prefill(64)
        for length in sorted(set(options.prefill) | set(options.decode)):
            # One pass over a long text serves both measurements.
            seconds, cache = prefill(length) if length else (0.0, None)
            if length in options.prefill:
                rows.append({"what": "prefill", "length": length, "tok_s": length / seconds, "note": note})
            if length in options.decode:
                rows.append({"what": "decode", "depth": length, "tok_s": options.tokens / decode(cache), "note": note})
            cache = None
    return rows


WORKERS = {"llama.cpp": run_llama_cpp, "openvino": run_openvino, "torch": run_torch}


def parse_rows(text, command):
    """Rows from a JSON list, or from the lines of `text` that are JSON objects."""
    try:
        rows = json.loads(text)
        rows = rows.get("rows", [rows]) if isinstance(rows, dict) else rows
    except json.JSONDecodeError:
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"no JSON rows in the output of: {command}")
    return rows


def run_worker(options, peer, model):
    """One peer, one model, one round, in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--worker", peer, str(model), "--threads",
               str(options.threads), "--tokens", str(options.tokens), "--prefill", ",".join(map(str, options.prefill)),
               "--decode", ",".join(map(str, options.decode)), "--scratch", str(options.scratch)]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    answer = [line for line in done.stdout.splitlines() if line.startswith('{"rows"') or line.startswith('{"error"')]
    if not answer:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    answer = json.loads(answer[-1])
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return [{"peer": peer, **row} for row in answer["rows"]]


def run_ours(options, model):
    """One round of the --with command."""
    fill = {"model": shlex.quote(str(model)), "prefill": ",".join(map(str, options.prefill)),
            "decode": ",".join(map(str, options.decode))}
    command = options.ours
    for name, value in fill.items():
        command = command.replace("{" + name + "}", value)
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return [{"peer": "longspan", **row} for row in parse_rows(done.stdout, command)]


def column(row):
    """("prefill", 512) and the like."""
    return row["what"], row["length"] if row["what"] == "prefill" else row["depth"]


def collect(rows_of_rounds):
    """One row for each peer, model and column, with all its runs."""
    merged = {}
    for row in rows_of_rounds:
        what, size = column(row)
        key = (row["model"], row["peer"], what, size)
        kept = merged.setdefault(key, {"peer": row["peer"], "model": row["model"], "what": what,
                                       "length" if what == "prefill" else "depth": size, "runs": []})
        runs = row.get("runs")
        kept["runs"] += [float(x) for x in (runs if isinstance(runs, list) else [row["tok_s"]])]
        if row.get("note"):
            kept["note"] = row["note"]
    for row in merged.values():
        row["tok_s"] = row["median"] = statistics.median(row["runs"])
    return list(merged.values())


def table(rows):
    """Tokens per second, a line for each peer, and for a peer of ours the ratio to the best of the others."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        columns = sorted({column(row) for row in mine}, key=lambda c: (c[0] != "prefill", c[1]))
        value = {(row["peer"], column(row)): row["median"] for row in mine}
        lines.append(f"{model}, tokens/s".ljust(28) + "".join(f"{f'{w} {n}':>15}" for w, n in columns))
        for peer in dict.fromkeys(row["peer"] for row in mine):
            cells = [f"{value[peer, c]:15.1f}" if (peer, c) in value else f"{'-':>15}" for c in columns]
            lines.append(f"  {peer:26}" + "".join(cells))
        best = {c: max((value[p, c] for p in PEERS if (p, c) in value), default=None) for c in columns}
        for peer in dict.fromkeys(row["peer"] for row in mine if row["peer"] not in PEERS):
            cells = [f"{value[peer, c] / best[c]:14.2f}x" if (peer, c) in value and best[c] else f"{'-':>15}"
                     for c in columns]
            lines.append(f"  {peer + ' / best peer':26}" + "".join(cells))
        lines.append("")
    return "\n".join(lines)


def machine(options):
    """What the figures depend on."""
    cpu = platform.processor()
    flags = []
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, text = line.partition(":")
            if key.strip() == "model name":
                cpu = text.strip()
            elif key.strip() == "flags":
                wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
                flags = [flag for flag in wanted if flag in text.split()]
    return {"cpu": cpu, "flags": flags, "cores": os.cpu_count(), "threads": options.threads, "load": []}


def measure(options, chosen):
    """All rounds, the JSON file and the table."""
    report = {"machine": machine(options), "rows": [], "skipped": []}
    rounds, left_out = [], set()
    for model in options.models:
        for turn in range(options.repeat):
            report["machine"]["load"].append(round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None)
            for peer in chosen + (["longspan"] if options.ours else []):
                if (peer, model) in left_out:
                    continue
                started = time.time()
                print(f"{model.name}: round {turn + 1} of {options.repeat}, {peer} ...", end=" ", file=sys.stderr,
                      flush=True)
                try:
                    rows = run_ours(options, model) if peer == "longspan" else run_worker(options, peer, model)
                    rounds += [{**row, "model": model.stem} for row in rows]
                    print(f"{time.time() - started:.0f} s", file=sys.stderr)
                except (RuntimeError, OSError, ValueError, KeyError) as error:
                    left_out.add((peer, model))
                    report["skipped"].append({"peer": peer, "model": model.stem, "reason": str(error)})
                    print(f"left out: {error}", file=sys.stderr)
                # Written after each step: an interrupted run keeps what it measured.
                report["rows"] = collect(rounds)
                options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]))
    for skip in report["skipped"]:
        print(f"left out: {skip['peer']} on {skip['model']}: {skip['reason']}")
    print(f"written: {options.out}")


def numbers(text):
    """"512,4096" -> [512, 4096]"""
    return [int(part) for part in text.split(",") if part]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("peers.json"))
    parser.add_argument("--only", default=",".join(PEERS), help="peers, with commas; empty for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=numbers, default=[512, 4096, 8192])
    parser.add_argument("--decode", type=numbers, default=[0, 8192])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--with", dest="ours", metavar="CMD")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.worker:
        try:
            answer = {"rows": WORKERS[options.worker](options, options.models[0])}
        except Exception as error:  # told to the parent, which goes on with the other peers
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
        return

    chosen = [peer for peer in options.only.split(",") if peer]
    unknown = set(chosen) - set(PEERS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    for model in options.models:
        if not model.is_file():
            parser.error(f"{model}: no such file")
    if options.ours and "{model}" not in options.ours and len(options.models) > 1:
        parser.error("--with: with more than one model the command needs {model} in it")

    with tempfile.TemporaryDirectory() as folder:
        options.scratch = pathlib.Path(folder)
        measure(options, chosen)


if __name__ == "__main__":
    main()
