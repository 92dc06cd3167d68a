#!/usr/bin/env python3
"""BERT encoders beside Hugging Face transformers.

  bert.py golden [OUT]              writes a tiny random BERT and what transformers computes with it, in float64:
                                    OUT/config.json, model.safetensors, tokenizer.json, reference.safetensors
                                    (OUT defaults to tests/golden/tiny-bert of this repository)
  bert.py compare FOLDER TEXTS BIN  embeds every line of the file TEXTS with transformers (float64, mean pooling, norm)
                                    and with BIN (`cargo build --release -p longspan-nn --example embed`), f32 and
                                    packed; prints the greatest difference of a number and the least cosine
"""

import json
import pathlib
import subprocess
import sys

# A script's own folder comes first on the module path, where tokenizers.py would hide the package of that name.
HERE = pathlib.Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != HERE]

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

WORDS = "the a of river bank rain falls runs over stone night light ##s ##ing ##ed ##er walk sing old new , . ?".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    "the river runs over old stones",
    "Rain falls.",
    "a walker sings of the night, the light, the bank of the new river: unknown words too?",
]


def pooled(hidden):
    """hidden [tokens, width] to its mean over tokens, of length 1."""
    mean = hidden.mean(0)
    return mean / mean.norm()


def embed(model, tokenizer, text, longest):
    ids = tokenizer.encode(text).ids
    if len(ids) > longest:
        ids = ids[: longest - 1] + ids[-1:]
    with torch.no_grad():
        return ids, model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def golden(out):
    out.mkdir(parents=True, exist_ok=True)
    vocab = SPECIAL + WORDS
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(vocab)}, lowercase=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 24,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 80,
        "model_type": "bert",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "vocab_size": len(vocab),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    torch.manual_seed(5)
    model = AutoModel.from_config(AutoConfig.from_pretrained(out), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.3 if value.ndim == 2 else 0.2
            value.copy_(torch.randn(value.shape) * scale + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    weights = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith("pooler") and "position_ids" not in n}
    save_file(weights, out / "model.safetensors")
    model = model.double()
    tensors, meta = {}, {}
    for number, text in enumerate(TEXTS + [" ".join(TEXTS * 9)]):
        ids, hidden = embed(model, tokenizer, text, 80)
        tensors[f"input_ids.{number}"] = torch.tensor(ids)
        tensors[f"hidden.{number}"] = hidden.float().contiguous()
        tensors[f"embedding.{number}"] = pooled(hidden).float().contiguous()
        meta[f"text.{number}"] = json.dumps(text)
    meta |= {"paper": "tiny-bert", "case": "encode", "name": json.dumps("tiny-bert"),
             "atol": json.dumps({name: 1e-5 for name in tensors if not name.startswith("input_ids")})}
    save_file(tensors, out / "reference.safetensors", meta)
    print(out, {name: tuple(t.shape) for name, t in tensors.items()})


def compare(folder, texts, binary):
    lines = [line for line in texts.read_text().split("\n") if line.strip()]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # the names of control tokens in a text are text
    sentence = folder / "sentence_bert_config.json"
    longest = json.loads(sentence.read_text())["max_seq_length"] if sentence.is_file() else 512
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval().double()
    reference = np.stack([pooled(embed(model, tokenizer, line, longest)[1]).numpy() for line in lines])
    for precision in ["f32", "packed"]:
        run = subprocess.run([binary, str(folder), precision], input="\n".join(lines), capture_output=True, text=True, check=True)
        ours = np.array([json.loads(line) for line in run.stdout.splitlines()])
        print(f"{precision}: greatest difference {np.abs(ours - reference).max():.2e}, least cosine "
              f"{(ours * reference).sum(1).min():.7f}; {run.stderr.strip()}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["golden", *rest]:
            golden(pathlib.Path(rest[0]) if rest else HERE.parents[1] / "tests/golden/tiny-bert")
        case ["compare", folder, texts, binary]:
            compare(pathlib.Path(folder), pathlib.Path(texts), binary)
        case _:
            sys.exit(__doc__)
