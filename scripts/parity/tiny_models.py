#!/usr/bin/env python3
"""Tiny random models of every architecture Longspan reads, with the logits transformers gives for them.

For each case a folder OUT/<name>/ is written:

  config.json            as found on the Hub (old flat rope fields in most cases, nested `rope_parameters` in some)
  model.safetensors      the weights (f32 unless the name says bf16), or shards with model.safetensors.index.json
  model.gguf             in place of both, in the cases named gguf-* (F32, conventions of llama.cpp's converter:
                         query and key rows of the llama architecture permuted, 1 added to gemma's norms)
  reference.safetensors  input_ids i64 [40], logits f32 [40, vocab];
                         metadata: paper, case = "forward", name, atol as JSON {"logits": ...}

The config and the weights are read back before the model runs, so that what is on disk is what ran: eager attention,
in float64, so that a reader's float32 run is compared with the right answer and not with another run's rounding. (What
transformers computes in float32 whatever the model's type, norms, softmax and the rope table, stays float32.)

Every case lists changes of its config ("probes": other window, no scaling, ...) which must move the logits by at least
1,000 times the tolerance, or the script stops: a case that cannot tell a wrong reading from a right one is no test. The
logits of a float32 run are compared with them to show that the tolerance is well above rounding.

Usage: tiny_models.py [OUT] [--check-llama-cpp]
       OUT defaults to tests/golden/tiny-models of this repository. With --check-llama-cpp the gguf-* cases are run
       through llama-cpp-python too and must agree (greatest difference of log-probabilities printed).
"""

import argparse
import copy
import json
import pathlib
import shutil
import sys

# A script's own folder comes first on the module path, where tokenizers.py would hide the package of that name.
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != HERE]

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

TOKENS = 40
VOCAB = 64
ATOL = 1e-5

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB,
}


def without(config, *keys):
    """A copy of `config` less `keys`."""
    return {k: v for k, v in config.items() if k not in keys}


def like(config, model_type, cls, drop=(), **changes):
    """`config` as another model type: fields that type does not have are dropped."""
    return {**without(config, *drop), "model_type": model_type, "architectures": [cls], **changes}


LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
YARN_SCALING = {"factor": 4.0, "original_max_position_embeddings": 128, "rope_type": "yarn"}
YARN_V5 = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 1.25,
    "truncate": False,
}
QWEN2 = like(LLAMA, "qwen2", "Qwen2ForCausalLM", ("attention_bias", "mlp_bias", "rope_scaling", "head_dim"),
             num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1000000.0,
             max_window_layers=2, sliding_window=8, use_sliding_window=False)
QWEN3 = like(LLAMA, "qwen3", "Qwen3ForCausalLM", ("mlp_bias",), rms_norm_eps=1e-6, rope_theta=1000000.0,
             tie_word_embeddings=True, max_window_layers=2, sliding_window=None, use_sliding_window=False)
SMOLLM3 = like(LLAMA, "smollm3", "SmolLM3ForCausalLM", ("head_dim",), num_attention_heads=2, num_key_value_heads=1,
               num_hidden_layers=4, intermediate_size=24, rms_norm_eps=1e-6, rope_theta=2000000.0,
               no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4, pad_token_id=None, tie_word_embeddings=True,
               layer_types=["full_attention"] * 4, sliding_window=None, use_sliding_window=False)
GEMMA3_V5 = {
    **without(GEMMA3, "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "torch_dtype"),
    "dtype": "float32",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# name, config, how it is stored, changes of the config which must change the logits
CASES = [
    ("llama-untied", LLAMA, "f32", [{"rope_theta": 100000.0}, {"rms_norm_eps": 1e-1}]),
    ("llama-tied", without({**LLAMA, "hidden_size": 64, "tie_word_embeddings": True, "intermediate_size": 24},
                           "head_dim"), "f32",
     [{"rope_theta": 100000.0}]),
    ("llama-sharded", LLAMA, "sharded", []),
    ("llama-bf16", {**LLAMA, "torch_dtype": "bfloat16"}, "bf16", []),
    ("llama-rope-linear", {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, "f32",
     [{"rope_scaling": None}]),
    ("llama-rope-llama3", {**LLAMA, "max_position_embeddings": 1024, "rope_scaling": LLAMA3_SCALING}, "f32",
     [{"rope_scaling": None}, {"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 2.0}}]),
    ("llama-rope-yarn", {**LLAMA, "max_position_embeddings": 512, "rope_scaling": YARN_SCALING}, "f32",
     [{"rope_scaling": None}, {"rope_scaling": {**YARN_SCALING, "attention_factor": 1.0}},
      {"rope_scaling": {**YARN_SCALING, "beta_slow": 4.0}}]),
    ("llama-rope-yarn-v5", {**without(LLAMA, "rope_scaling", "rope_theta"), "max_position_embeddings": 1024,
                            "rope_parameters": YARN_V5}, "f32",
     [{"rope_parameters": {**YARN_V5, "truncate": True}}, {"rope_parameters": {**YARN_V5, "attention_factor": 1.0}}]),
    ("mistral-sliding", like(LLAMA, "mistral", "MistralForCausalLM",
                             ("attention_bias", "mlp_bias", "rope_scaling"), sliding_window=8), "f32",
     [{"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}]),
    ("qwen2", QWEN2, "f32", [{"use_sliding_window": True, "max_window_layers": 0}]),
    ("qwen3", QWEN3, "f32", [{"rope_theta": 10000.0}]),
    ("gemma3", GEMMA3, "f32",
     [{"sliding_window": 7}, {"sliding_window": 9}, {"sliding_window_pattern": 3}, {"rope_local_base_freq": 20000.0},
      {"rope_theta": 10000.0}, {"query_pre_attn_scalar": 24}]),
    ("gemma3-softcap", {**GEMMA3, "num_hidden_layers": 3, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24,
                        "final_logit_softcapping": 1.5}, "f32",
     [{"final_logit_softcapping": None}, {"query_pre_attn_scalar": 16}]),
    ("gemma3-rope-linear-v5", GEMMA3_V5, "f32",
     [{"rope_parameters": {**GEMMA3_V5["rope_parameters"],
                           "full_attention": {"rope_type": "default", "rope_theta": 1000000.0}}}]),
    ("smollm3", SMOLLM3, "f32", [{"no_rope_layers": [1, 1, 1, 1]}]),
    ("gguf-llama", "llama-untied", "gguf", []),
    ("gguf-llama-rope-llama3", "llama-rope-llama3", "gguf", []),
    ("gguf-gemma3", "gemma3", "gguf", []),
]


def build(config, folder):
    """The model of `config`, by way of folder/config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    read = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_config(read, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def randomise(model, seed, bf16):
    """Weights far enough from the usual initial ones that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    around_zero = model.config.model_type.startswith("gemma")  # its norms multiply by 1 + weight
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight") or "layernorm" in name:
            value = 0.3 * noise if around_zero else 1.0 + 0.3 * noise
        elif name.endswith(".bias"):
            value = 0.3 * noise
        else:
            value = 0.15 * noise
        parameter.copy_(value.bfloat16().float() if bf16 else value)


@torch.no_grad()
def logits_of(model, input_ids):
    """[tokens] -> [tokens, vocab]"""
    return model(input_ids=input_ids[None], use_cache=False).logits[0]


def save_weights(model, how, folder):
    """The state dict once per shared tensor, in one file or in two shards with an index."""
    state = {k: v.contiguous() for k, v in sorted(model.state_dict().items())}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if how == "bf16":
        state = {k: v.bfloat16() for k, v in state.items()}
    if how != "sharded":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(state)
    weight_map = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({k: state[k] for k in chosen}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(v.numel() * v.element_size() for v in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, gemma):
    """The GGUF name of a transformers parameter."""
    stem, kind = name.removeprefix("model.").rsplit(".", 1)
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, block, stem = stem.split(".", 2)
    # The same words name the norm after attention in gemma and the one before the mlp in llama.
    after = "post_attention_norm" if gemma else "ffn_norm"
    return f"blk.{block}.{after if stem == 'post_attention_layernorm' else GGUF_NAMES[stem]}.{kind}"


def interleave(weight, heads):
    """Rows [half, half] of each head -> pairs side by side, for a rope that turns neighbours."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(model, path):
    """F32 tensors, the metadata a reader needs, and a vocabulary of VOCAB made-up pieces."""
    import gguf

    config = model.config
    gemma = config.model_type == "gemma3_text"
    writer = gguf.GGUFWriter(path, "gemma3" if gemma else "llama")
    writer.add_name(path.parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    rope = config.rope_parameters
    if gemma:
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-'\"()"
    special = ["<unk>", "<s>", "</s>"] if not gemma else ["<pad>", "<eos>", "<bos>", "<unk>"]
    space = "▁" if gemma else "Ġ"
    pieces = special + [space] + list(letters)
    pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or"]
    pieces += pairs[: VOCAB - len(pieces)]
    assert len(pieces) == VOCAB and len(set(pieces)) == VOCAB, len(pieces)
    writer.add_tokenizer_model("llama" if gemma else "gpt2")
    if not gemma:
        writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    if gemma:
        writer.add_token_scores([-float(i) for i in range(VOCAB)])
    else:
        writer.add_token_merges([f"{p[0]} {p[1]}" for p in pieces if p in pairs])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if p in special else normal for p in pieces])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(gemma)
    writer.add_add_space_prefix(False)

    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = weight.numpy()
        if gemma and name.endswith("norm.weight"):
            weight = weight + np.float32(1.0)
        if not gemma and ".q_proj." in name:
            weight = interleave(weight, config.num_attention_heads)
        if not gemma and ".k_proj." in name:
            weight = interleave(weight, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name, gemma), np.ascontiguousarray(weight))
    if rope.get("rope_type") == "llama3":
        # The converter stores how much slower each frequency turns, not the parameters.
        plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_llama_cpp(path, input_ids, logits):
    """Greatest difference of log-probabilities between llama.cpp's f32 run of `path` and `logits`."""
    from llama_cpp import Llama

    # Default cache types are f16; f32 leaves the model as the only thing compared.
    model = Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, flash_attn=False, type_k=0, type_v=0, n_threads=1,
                  verbose=False)
    model.eval(input_ids.tolist())
    got = torch.from_numpy(model.scores[: len(input_ids)].copy())
    return (got.log_softmax(-1) - logits.log_softmax(-1)).abs().max().item()


@torch.no_grad()
def check_without_mlp(model, path, input_ids):
    """`check_llama_cpp` for a copy of `model` whose mlps add nothing, written to `path`."""
    silent = copy.deepcopy(model)
    for layer in silent.model.layers:
        layer.mlp.down_proj.weight.zero_()
    path.parent.mkdir(exist_ok=True)
    save_gguf(silent, path)
    return check_llama_cpp(path, input_ids, logits_of(silent, input_ids))


def main():
    default = HERE.parents[1] / "tests" / "golden" / "tiny-models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=default)
    parser.add_argument("--check-llama-cpp", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(40)
    input_ids = torch.randint(3, VOCAB, (TOKENS,), generator=generator)

    failed = []
    built = {}
    for seed, (name, config, how, probes) in enumerate(CASES, start=1):
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        if how == "gguf":
            folder.mkdir(parents=True)
            model, logits = built[config]
            save_gguf(model, folder / "model.gguf")
        else:
            model = build(config, folder)
            randomise(model, seed, how == "bf16")
            save_weights(model, how, folder)
            # Read back what was written: a reader of the folder must find the same model.
            exact = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
            logits = logits_of(exact, input_ids).float()
            built[name] = (model, logits)
        metadata = {"paper": "tiny-models", "case": "forward", "name": json.dumps(name),
                    "atol": json.dumps({"logits": ATOL})}
        save_file({"input_ids": input_ids, "logits": logits.contiguous()}, folder / "reference.safetensors", metadata)

        line = f"{name:24} std {logits.std():.2f}"
        if how == "gguf":
            if options.check_llama_cpp:
                gap = check_llama_cpp(folder / "model.gguf", input_ids, logits)
                line += f"  llama.cpp differs by {gap:.1e}"
                if model.config.model_type == "gemma3_text":
                    # llama.cpp looks gelu up in a table of float16 (seen: 1.7e-3). Without the mlp's part all the
                    # rest, norms, windows, both ropes, must agree as closely as it does in the other architectures.
                    if gap > 1e-2:
                        failed.append(f"{name}: llama.cpp differs by {gap:.1e}, more than a float16 gelu explains")
                    gap = check_without_mlp(model, options.out / ".probe" / "model.gguf", input_ids)
                    line += f", without the mlp by {gap:.1e}"
                if gap > 1e-4:
                    failed.append(f"{name}: llama.cpp differs by {gap:.1e}")
        else:
            gap = (logits_of(model, input_ids) - logits).abs().max().item()
            line += f"  f32 differs by {gap:.1e}"
            if gap > ATOL / 2:
                failed.append(f"{name}: rounding {gap:.1e} is too near the tolerance {ATOL:.0e}")
            for probe in probes:
                other = build({**config, **probe}, options.out / ".probe")
                other.load_state_dict(model.state_dict())
                moved = (logits_of(other, input_ids) - logits).abs().max().item()
                key = ",".join(probe)
                line += f"  {key} {moved:.1e}"
                if moved < 1000 * ATOL:
                    failed.append(f"{name}: {probe} moves the logits by {moved:.1e} only")
        print(line, flush=True)
    shutil.rmtree(options.out / ".probe", ignore_errors=True)
    for file in options.out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"{len(CASES)} cases, {size / 1e6:.2f} MB in {options.out}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
