#!/usr/bin/env python3
"""What transformers, in float32, says about a text with the dequantised weights of a GGUF file.

    reference.py MODEL.gguf TEXT OUT.safetensors [--tokens 2048] [--ids IDS.json] [--nll-only] [--check-llama-cpp N]
                 [--limit X] [--work FOLDER] [--threads 2]

The first --tokens token ids of TEXT are taken in one forward pass (sdpa attention, float32). They come from --ids (a
JSON list, TEXT is then not read) or from the model's tokenizer by way of llama-cpp-python, with the beginning token
where the file asks for one. OUT holds

    input_ids  i64 [T]
    logits     f32 [T, vocab]     unless --nll-only: logits[t] is the prediction for position t + 1
    nll        f32 [T - 1]        nll[t] = -log p(input_ids[t + 1] | input_ids[..= t]), natural logarithm

and the metadata model (file name), perplexity = exp(mean(nll)) and tokens. Logits are computed and written in slices
of positions, so that memory holds the hidden states and one slice; the file itself is large (T * vocab * 4 bytes).

transformers' reading of the file (order of query and key rows, gemma's norms, rope, window) is itself checked with
--check-llama-cpp N: the file is rewritten with F32 tensors (in --work, a temporary folder by default), llama.cpp runs
the first N tokens with an f32 cache and without flash attention, and the greatest difference of log-probabilities is
printed; above 0.01 in the best 1,000 tokens of a position the script fails. For models with a gelu the limit is 0.1:
llama.cpp looks gelu up in a table of float16, which moved Gemma 3 270M by 0.04 over 768 tokens; the same llama.cpp
built without the table (GGML_GELU_FP16 in vec.h; LLAMA_CPP_LIB_PATH names its folder) differed by 0.002, so pass
--limit 0.01 with such a build. The perplexity llama.cpp gives for the file as it is, with its own quantised arithmetic,
is printed beside it: that one is near, not equal.
"""

import argparse
import json
import math
import os
import pathlib
import struct
import sys
import tempfile
import time

# A script's own folder comes first on the module path, where tokenizers.py would hide the package of that name.
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != HERE]

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

SLICE = 256  # positions whose logits are held at a time


def token_ids(model_path, text_path, tokens):
    """The first `tokens` ids of the text, as the model file's own tokenizer cuts it."""
    from llama_cpp import Llama

    # Enough of the text for that many tokens, ended at a line so that the last word is whole.
    with open(text_path, "rb") as file:
        text = file.read(16 * tokens)
    text = text[: text.rfind(b"\n") + 1] or text
    model = Llama(str(model_path), vocab_only=True, verbose=False)
    add_bos = model.metadata.get("tokenizer.ggml.add_bos_token", "false") == "true"
    ids = model.tokenize(text, add_bos=add_bos, special=False)
    if len(ids) < tokens:
        sys.exit(f"{text_path}: {len(ids)} tokens found, {tokens} needed: give a longer text or a smaller --tokens")
    return ids[:tokens]


class Safetensors:
    """A safetensors file written front to back: shapes are known at the start, the data comes in pieces."""

    def __init__(self, path, tensors, metadata):
        """tensors: name -> (dtype, shape), in the order the data will come."""
        sizes = {"F32": 4, "I64": 8}
        header, at = {"__metadata__": metadata}, 0
        for name, (dtype, shape) in tensors.items():
            end = at + sizes[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.file = open(self.part, "wb")
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.end = self.file.tell() + at

    def write(self, array):
        self.file.write(np.ascontiguousarray(array).tobytes())

    def close(self):
        assert self.file.tell() == self.end, (self.file.tell(), self.end)
        self.file.close()
        os.replace(self.part, self.path)


@torch.no_grad()
def forward(model, ids):
    """ids [T] -> the hidden states before the output matrix, [T, hidden]."""
    return model.model(input_ids=torch.tensor(ids)[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def slices(model, hidden):
    """(first position, logits [<= SLICE, vocab]) for all positions in order."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    for start in range(0, len(hidden), SLICE):
        logits = model.lm_head(hidden[start : start + SLICE])
        yield start, logits if cap is None else torch.tanh(logits / cap) * cap


def nll_of(logits, ids, start):
    """-log p of the next token for the positions of this slice which have one."""
    targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)])
    return torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")


def as_f32(source, target):
    """The GGUF file `source` with every tensor dequantised to F32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.write_tensor_data(data)
    writer.close()


def llama_cpp_logits(path, ids):
    """Logits [T, vocab] of llama.cpp with an f32 cache."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=len(ids) + 8, n_batch=len(ids), n_ubatch=len(ids), logits_all=True,
                  flash_attn=False, type_k=0, type_v=0, n_threads=torch.get_num_threads(),
                  n_threads_batch=torch.get_num_threads(), verbose=False)
    model.eval(ids)
    logits = torch.from_numpy(model.scores[: len(ids)].copy())
    model.close()
    return logits


def all_logits(model, ids):
    """Logits [T, vocab] in one piece."""
    return torch.cat([part for _, part in slices(model, forward(model, ids))])


def gaps(ours, theirs):
    """Greatest differences of log-probabilities: over all tokens, and over the best 1,000 of each position."""
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    gap = (ours - theirs).abs()
    best = ours.topk(min(1000, ours.shape[-1])).indices
    return gap.max().item(), gap.gather(-1, best).max().item()


def check(model, model_path, ids, work, limit=None):
    """Compares with llama.cpp on the same ids; fails where log-probabilities differ by more than `limit`."""
    logits = all_logits(model, ids)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        f32 = pathlib.Path(folder) / "f32.gguf"
        as_f32(model_path, f32)
        other = llama_cpp_logits(f32, ids)
    worst, best = gaps(logits, other)
    same = (logits.argmax(-1) == other.argmax(-1)).float().mean().item()
    quantised = llama_cpp_logits(model_path, ids)
    values = [nll_of(x, ids, 0).mean().exp().item() for x in (logits, other, quantised)]
    print(f"llama.cpp on F32 weights, {len(ids)} tokens: log-probabilities differ by at most {worst:.1e} "
          f"({best:.1e} in the best 1,000), same first choice {same:.1%}; "
          f"perplexity {values[0]:.4f} here, {values[1]:.4f} there, {values[2]:.4f} quantised", flush=True)
    if limit is None:
        activation = getattr(model.config, "hidden_activation", None) or model.config.hidden_act
        limit = 0.1 if "gelu" in activation else 0.01
    if best > limit:
        sys.exit(f"{model_path}: transformers and llama.cpp read this file differently; its logits are no reference")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ids", type=pathlib.Path, help="JSON list of token ids, in place of the text")
    parser.add_argument("--nll-only", action="store_true")
    parser.add_argument("--check-llama-cpp", type=int, metavar="N", default=0)
    parser.add_argument("--limit", type=float, help="greatest difference allowed in that check")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the F32 copy of the check")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()

    if options.ids:
        ids = json.loads(options.ids.read_text())[: options.tokens]
        if len(ids) < options.tokens:
            sys.exit(f"{options.ids}: {len(ids)} ids found, {options.tokens} needed: give more or a smaller --tokens")
    else:
        ids = token_ids(options.model, options.text, options.tokens)
    started = time.time()
    path = options.model.resolve()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                 attn_implementation="sdpa").eval()
    config = model.config
    print(f"{path.name}: {config.model_type}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights, "
          f"tied {config.tie_word_embeddings}, rope {config.rope_parameters}, loaded in {time.time() - started:.0f} s",
          flush=True)
    if options.check_llama_cpp:
        check(model, path, ids[: options.check_llama_cpp], options.work, options.limit)

    started = time.time()
    hidden = forward(model, ids)
    # The perplexity stands in the header, which is written first: the slices are computed twice, not kept.
    nll = torch.cat([nll_of(part, ids, start) for start, part in slices(model, hidden)])
    perplexity = nll.double().mean().exp().item()
    tensors = {"input_ids": ("I64", [len(ids)]), "nll": ("F32", [len(nll)])}
    if not options.nll_only:
        tensors["logits"] = ("F32", [len(ids), model.lm_head.out_features])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    out = Safetensors(options.out, tensors,
                      {"model": path.name, "perplexity": f"{perplexity:.6f}", "tokens": str(len(ids))})
    out.write(np.array(ids, np.int64))
    out.write(nll.numpy().astype(np.float32))
    if not options.nll_only:
        for _, part in slices(model, hidden):
            out.write(part.numpy())
    out.close()
    print(f"{options.out}: {len(ids)} tokens, perplexity {perplexity:.4f}, {options.out.stat().st_size / 1e6:.0f} MB "
          f"in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
