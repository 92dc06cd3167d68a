#!/usr/bin/env python3
"""Compares this project's tokenizers with the reference implementations, id by id.

    tokenizers.py compare OUT model.gguf ... [--bytes N] [--no-transformers] [--no-llama-cpp]
        For each model: writes the mixed text, the vocabulary (JSON, for `cargo run --example tokenize`) and the ids of
        every reference under OUT, runs the example (--binary PATH), and prints where ids differ.
    tokenizers.py golden OUT
        Trains one tiny vocabulary for each family and writes it with reference ids: the committed test data. (The
        trainers behind the hf-* files break ties at random, so those vocabularies differ from run to run.)

Needs: tokenizers, sentencepiece, gguf; for compare also transformers and llama_cpp where wanted.

References. The text is the same on every machine. `original` is the model's own tokenizer, put together from the
vocabulary in the GGUF file: for byte-level BPE a `tokenizers` pipeline with the published rules, for SentencePiece
models the sentencepiece library on a model file rebuilt from the pieces. `transformers` is that library's own
conversion of the GGUF file, `llama.cpp` its tokenizer. Only `original` must match. llama.cpp does not compose
characters (NFC) for Qwen, makes `</s>` a control token whatever the file says, and does not merge across a byte that
SmolLM2's vocabulary lacks; transformers' conversion drops NFC, SmolLM2's rule of single digits, and the user-defined
tokens of Gemma.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import time

# This file bears the name of the library it imports: keep its own folder out of the search.
HERE = pathlib.Path(__file__).resolve().parent
sys.path = [p for p in sys.path if pathlib.Path(p or ".").resolve() != HERE]

CONTROL_LOOKALIKES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<s>", "</s>", "<unk>", "<pad>",
    "<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>", "<|im_start|", "im_end|>", "<table>", "</td>",
    "<0x0A>", "<0xE2>", "[multimodal]", "<start_of_image>", "<unused7>", "<repo_name>", "<|fim_prefix|>", "[PAD151665]",
    "<|begin_of_text|>", "[INST]", "<ctl>", "<mark>", "<<mark>>", "<ctl><ctl>",
]

ENGLISH = """It was the best of times, it was the worst of times. Don't we'll I'VE they'RE y'all's O'Neill's HE'D 'sabre
The quick brown fox jumps over the lazy dog; Pack my box with five dozen liquor jugs! (Really?) "Quoted", he said - or
did he?  Two spaces.   Three.    Four. A tab:\there. Trailing space \nnewline\r\nwindows\rold mac\x0bvt\x0cff\x85nel"""
CODE = """fn main() {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n\tif x[0] != 0 && x.len() >= 3 { panic!("{x:?}"); }\n}
def f(a, b=None, **kw):\n        return a if b is None else {k: v for k, v in kw.items()}  # comment\n\n\n
<div class="a-b_c"><td>x</td></div>\n#include <stdio.h>\nint main(void){printf("%d\\n", 0x1F << 2);return 0;}\n
SELECT * FROM t WHERE a='b' AND c<>3;\n    \n        \n\t\t\tx = 1\n////\n\n/path/to/file.txt\n===\n***\n---\n"""
CJK = """人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心。すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다。「引用」、『書名』・中点　全角空白　ｆｕｌｌｗｉｄｔｈ１２３"""
OTHER = """Все люди рождаются свободными. Όλοι οι άνθρωποι γεννιούνται ελεύθεροι. כל בני האדם נולדו בני חורין. يولد جميع الناس أحرارًا
सभी मनुष्य स्वतंत्र पैदा होते हैं। ทุกคนเกิดมามีอิสระ Mọi người sinh ra đều được tự do. İstanbul ıŞIK ſtraße 'ſ ﬁne ǅ ǆ ʰ ª º Å Ω K"""
EMOJI = "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️ ☃ ⌚️ 𝔘𝔫𝔦 𝟙𝟚𝟛 𐍈 🂡 \u200d\u200b\ufeff\u2028\u2029\u00a0\u3000\u202f\u180e"
NUMBERS = "0 1 12 123 1234 12345 3.14159 1,000,000 1e-9 0xDEAD ١٢٣ १२३ ½ ² Ⅷ ㊿ 一二三 v1.2.3 2024-01-31 +49 (0)30 $5.00 €9 100%"
COMBINING = "e\u0301 n\u0303 a\u030a\u0301 \u0301x o\u0308\u0304 \u1100\u1161\u11a8 q\u0323\u0307 q\u0307\u0323 \u0958 \u2126 \ufb01 Z\u0351\u036b\u0343A\u0321L \u0915\u094d\u0937"


def mixed_text(size, seed=7):
    """About `size` bytes of everything that trips tokenizers up. The same for the same arguments."""
    rng = random.Random(seed)
    words = (ENGLISH + " " + OTHER).split(" ")
    pools = [ENGLISH, CODE, CJK, OTHER, EMOJI, NUMBERS, COMBINING]
    spaces = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\n ", "\t\t", "\u00a0", "\u3000", " \t ", "\u2003"]

    def piece():
        kind = rng.randrange(14)
        if kind < 4:
            return " ".join(rng.choice(words) for _ in range(rng.randrange(3, 40)))
        if kind < 8:
            pool = rng.choice(pools)
            at = rng.randrange(len(pool))
            return pool[at: at + rng.randrange(1, 80)]
        if kind == 8:
            return rng.choice(CONTROL_LOOKALIKES) * rng.choice([1, 1, 1, 2])
        if kind == 9:
            return rng.choice(spaces) * rng.choice([1, 2, 3, 5, 8, 17, 40])
        if kind == 10:
            return "".join(rng.choice(spaces) for _ in range(rng.randrange(1, 12)))
        if kind == 11:
            raw = rng.choice(pools).encode() if rng.random() < 0.7 else bytes(rng.randrange(256) for _ in range(30))
            at = rng.randrange(len(raw))
            return raw[at: at + rng.randrange(1, 30)].decode("utf-8", "replace")
        if kind == 12:
            return "".join(chr(c) for c in (rng.randrange(0x20, 0x3000) for _ in range(rng.randrange(1, 12))))
        # Any character of Unicode, surrogates aside.
        return "".join(chr(c if c < 0xD800 else c + 0x800) for c in (rng.randrange(0x10F800) for _ in range(4)))

    out, total = [], 0
    while total < size:
        part = piece() + (rng.choice(spaces) if rng.random() < 0.5 else "")
        out.append(part)
        total += len(part.encode())
    return "".join(out)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "tekken": TEKKEN}


def read_gguf(path):
    """The fields of tokenizer.* as the Rust struct GgufVocab wants them."""
    import gguf

    fields = gguf.GGUFReader(str(path)).fields

    def get(name, default=None):
        field = fields.get("tokenizer." + name)
        return default if field is None else field.contents()

    charsmap = get("ggml.precompiled_charsmap")
    return {
        "model": get("ggml.model"), "pre": get("ggml.pre"), "tokens": get("ggml.tokens"),
        "scores": [float(x) for x in get("ggml.scores", [])],
        "token_types": [int(x) for x in get("ggml.token_type", [])], "merges": get("ggml.merges", []),
        "bos": get("ggml.bos_token_id"), "eos": get("ggml.eos_token_id"), "unknown": get("ggml.unknown_token_id"),
        "add_bos": get("ggml.add_bos_token"), "add_eos": get("ggml.add_eos_token"),
        "add_space_prefix": get("ggml.add_space_prefix"), "eot": get("ggml.eot_token_id"),
        "chat_template": get("chat_template"),
        "precompiled_charsmap": None if charsmap is None else [int(x) & 255 for x in charsmap],
        "remove_extra_whitespaces": get("ggml.remove_extra_whitespaces"),
    }


def hf_pipeline(vocab):
    """Byte-level BPE as the model's authors publish it, from the vocabulary of the GGUF file."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    table = {t: i for i, t in enumerate(vocab["tokens"])}
    merges = [tuple(m.split(" ", 1)) for m in vocab["merges"]]
    pre = vocab["pre"]
    t = Tokenizer(models.BPE(table, merges, ignore_merges=pre in ("llama-bpe", "tekken")))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    if pre == "smollm":
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre == "gpt-2":
        t.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if pre == "qwen2":
        t.normalizer = normalizers.NFC()
    t.decoder = decoders.ByteLevel()
    for token, kind in zip(vocab["tokens"], vocab["token_types"]):
        if kind == 3:
            t.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == 4:
            t.add_tokens([AddedToken(token, special=False, normalized=False)])
    return t


def hf_ids(t, text, parse):
    t.encode_special_tokens = not parse
    return t.encode(text, add_special_tokens=False).ids


def sp_model(vocab):
    """A sentencepiece model with the pieces of the GGUF file."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb

    proto = pb.ModelProto()
    for text, score, kind in zip(vocab["tokens"], vocab["scores"], vocab["token_types"]):
        if kind == 4:  # the converter writes their spaces as they are, and a score of its own
            text, score = text.replace(" ", "\u2581"), 0.0
        proto.pieces.add(piece=text, score=score, type=kind)
    spec = proto.trainer_spec
    spec.model_type = pb.TrainerSpec.UNIGRAM if vocab["model"] == "t5" else pb.TrainerSpec.BPE
    spec.byte_fallback = 6 in vocab["token_types"]
    spec.vocab_size = len(vocab["tokens"])
    norm = proto.normalizer_spec
    norm.name = "identity"
    norm.add_dummy_prefix = vocab["add_space_prefix"] is not False
    norm.remove_extra_whitespaces = vocab["model"] == "t5" and vocab["remove_extra_whitespaces"] is not False
    norm.escape_whitespaces = True
    if vocab["precompiled_charsmap"]:
        norm.precompiled_charsmap = bytes(vocab["precompiled_charsmap"])
    if not any(p.type == 2 for p in proto.pieces):
        for p in proto.pieces:
            if p.piece == "<unk>":
                p.type = 2
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def sp_ids(sp, vocab, text, parse):
    """sentencepiece never reads control tokens from text: under `parse` they are cut out first, longest at the left."""
    if not parse:
        return sp.encode(text)
    import re

    control = [t for t, k in zip(vocab["tokens"], vocab["token_types"]) if k in (2, 3)]
    ids = {t: i for i, t in enumerate(vocab["tokens"])}
    pattern = "|".join(re.escape(t) for t in sorted(control, key=len, reverse=True))
    out = []
    for i, part in enumerate(re.split(f"({pattern})", text)):
        out += [ids[part]] if i % 2 else sp.encode(part)
    return out


def differences(name, text_of, ours, theirs):
    if ours == theirs:
        print(f"    {name}: equal, {len(ours)} ids")
        return True
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    import difflib

    lo = max(0, at - 3)
    blocks = difflib.SequenceMatcher(None, ours[lo: lo + 4000], theirs[lo: lo + 4000], autojunk=False)
    changed = [op for op in blocks.get_opcodes() if op[0] != "equal"]
    print(f"    {name}: DIFFERENT, {len(ours)} ids here, {len(theirs)} there, first at {at};"
          f" {len(changed)} differences in the next 4000 ids")
    for _, a, b, c, d in changed[:6]:
        print(f"       ours {[text_of(i) for i in ours[lo + a: lo + b]]} theirs {[text_of(i) for i in theirs[lo + c: lo + d]]}")
    return False


def compare(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = mixed_text(args.bytes)
    text_file = out / "text.txt"
    text_file.write_bytes(text.encode())
    good = True
    for path in map(pathlib.Path, args.models):
        vocab = read_gguf(path)
        vocab_file = out / f"{path.stem}.vocab.json"
        vocab_file.write_text(json.dumps(vocab))
        print(f"{path.name}: {vocab['model']}, pre {vocab['pre']}, {len(vocab['tokens'])} tokens")
        references = {}
        if vocab["model"] == "gpt2":
            pipeline = hf_pipeline(vocab)
            references["original"] = lambda parse: hf_ids(pipeline, text, parse)
        else:
            sp = sp_model(vocab)
            references["original"] = lambda parse: sp_ids(sp, vocab, text, parse)
        if args.transformers:
            from transformers import AutoTokenizer

            fast = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            (out / f"{path.stem}.transformers.json").write_text(fast.backend_tokenizer.to_str())
            references["transformers"] = lambda parse: hf_ids(fast.backend_tokenizer, text, parse)
        if args.llama_cpp:
            import llama_cpp

            llm = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
            references["llama.cpp"] = lambda parse: llm.tokenize(text.encode(), add_bos=False, special=parse)
        for mode in ("none", "parse"):
            print(f"  Special::{mode}")
            if args.binary:
                command = [args.binary, str(vocab_file), str(text_file), mode]
                done = subprocess.run(command, capture_output=True, text=True)
                print("    ours:", done.stderr.strip())
                ours = [int(line) for line in done.stdout.split()]
            for name, encode in references.items():
                started = time.time()
                ids = encode(mode == "parse")
                took = time.time() - started
                (out / f"{path.stem}.{name}.{mode}.ids").write_text("\n".join(map(str, ids)) + "\n")
                if args.binary:
                    equal = differences(f"{name} ({took:.2f} s)", lambda i: vocab["tokens"][i], ours, ids)
                    good &= equal or name != "original"
    return 0 if good else 1


BLANK = {
    "pre": None, "scores": [], "token_types": [], "merges": [], "bos": None, "eos": None, "unknown": None,
    "add_bos": None, "add_eos": None, "add_space_prefix": None, "eot": None, "chat_template": None,
    "precompiled_charsmap": None, "remove_extra_whitespaces": None,
}


def tricky_texts():
    """Short texts, and one long one made of everything."""
    texts = [ENGLISH, CODE, CJK, OTHER, EMOJI, NUMBERS, COMBINING, " ", "  ", "a", " a", "a ", "\n", "\u2581", "a\u2581b", ""]
    texts += [mixed_text(100, seed) for seed in range(4)]
    texts += ["".join(f"x {token} y{token}" for token in CONTROL_LOOKALIKES), mixed_text(500, 99)]
    return texts


def cases(none, parse, decode):
    """For each text its ids; under `parse` and `decoded` only what differs from the ids and the text."""
    out = []
    for text in tricky_texts():
        case = {"none": none(text)}
        special, decoded = parse(text), decode(case["none"])
        if special != case["none"]:
            case["parse"] = special
        if decoded != text:
            case["decoded"] = decoded
        out.append(case)
    return out


def train_bpe(pre, size=370):
    """A tiny byte-level BPE vocabulary cut by the rules of `pre`, with control tokens and a user-defined one."""
    from tokenizers import pre_tokenizers, trainers

    t = hf_pipeline(BLANK | {"model": "gpt2", "pre": pre, "tokens": []})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if pre == "smollm":  # as in SmolLM2, bytes that the training text lacks have no token
        alphabet = [c for c in alphabet if c not in "\u0143\u00ff\u00d7"]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    # Without the last text some characters are rare enough to stay bytes.
    t.train_from_iterator([ENGLISH, CODE, NUMBERS, CJK, OTHER, mixed_text(20000, 3)], trainer)
    model = json.loads(t.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
    merges = [" ".join(m) for m in model["merges"]]
    if pre in ("llama-bpe", "tekken"):  # tokens that only `ignore_merges` reaches
        merges = [m for i, m in enumerate(merges) if i % 5]
    extra = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|><|im_end|>", "<mark>", "<<mark>>"]
    kinds = [1] * len(tokens) + [3, 3, 3, 3, 4, 4]
    tokens += extra
    at = tokens.index
    return BLANK | {
        "model": "gpt2", "pre": pre, "tokens": tokens, "token_types": kinds, "merges": merges,
        "bos": at("<|im_start|>"), "eos": at("<|endoftext|>"), "add_bos": pre == "llama-bpe",
    }


def train_sp(kind, prefix, byte_fallback, unused, tsv=None, size=300):
    """A tiny SentencePiece model and its fields as a GGUF file would hold them."""
    import io
    import tempfile

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb

    lines = [line for text in (ENGLISH * 4, CODE * 4, NUMBERS, OTHER) for line in text.split("\n")]
    out = io.BytesIO()
    options = {}
    if tsv:
        file = tempfile.NamedTemporaryFile("w", suffix=".tsv", delete=False)
        file.write(tsv)
        file.close()
        options["normalization_rule_tsv"] = file.name
    else:
        options["normalization_rule_name"] = "identity"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]), model_writer=out, model_type=kind, vocab_size=size + 256 * byte_fallback,
        byte_fallback=byte_fallback, add_dummy_prefix=prefix, remove_extra_whitespaces=kind == "unigram",
        character_coverage=0.98, control_symbols=["<ctl>", "<|im_start|>"], minloglevel=2, num_threads=1,
        user_defined_symbols=["<mark>", "<<mark>>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"] if kind == "bpe" else ["<mark>"],
        hard_vocab_limit=False, input_sentence_size=0, shuffle_input_sentence=False, **options,
    )
    proto = pb.ModelProto()
    proto.ParseFromString(out.getvalue())
    if unused:
        count = 0
        for p in proto.pieces:
            if p.type == 1 and len(p.piece) > 1:
                count += 1
                if count % 7 == 0:
                    p.type = 5
    tokens = [p.piece.replace("\u2581", " ") if p.type == 4 and kind == "bpe" else p.piece for p in proto.pieces]
    charsmap = list(proto.normalizer_spec.precompiled_charsmap) or None
    vocab = BLANK | {
        "model": "llama" if kind == "bpe" else "t5", "pre": "default", "tokens": tokens,
        "scores": [float(f"{p.score:.9g}") for p in proto.pieces], "token_types": [p.type for p in proto.pieces],
        "bos": 1, "eos": 2, "unknown": 0, "add_space_prefix": prefix, "precompiled_charsmap": charsmap,
        "remove_extra_whitespaces": kind == "unigram",
    }
    return vocab, sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def hf_only():
    """tokenizer.json files that are left to the `tokenizers` crate: Llama-2 style, WordPiece, unigram."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = [ENGLISH, CODE, OTHER, mixed_text(8000, 3)]
    special = [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]

    llama = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    llama.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=420, special_tokens=special + bytes_, limit_alphabet=90, show_progress=False))
    state = json.loads(llama.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = [a for a in state["added_tokens"] if not a["content"].startswith("<0x")]
    llama = Tokenizer.from_str(json.dumps(state))
    llama.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    piece.normalizer = normalizers.BertNormalizer()
    piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    piece.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=300, limit_alphabet=80, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    piece.decoder = decoders.WordPiece()
    piece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])

    uni = Tokenizer(models.Unigram())
    uni.normalizer = normalizers.NFKC()
    uni.pre_tokenizer = pre_tokenizers.Metaspace()
    uni.decoder = decoders.Metaspace()
    uni.train_from_iterator(
        [ENGLISH, CODE], trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False))
    return {"hf-llama": llama, "hf-wordpiece": piece, "hf-unigram": uni}


def golden(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def write(name, **parts):
        path = out / f"{name}.json"
        path.write_text(json.dumps({"case": name} | parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True) + "\n")
        print(f"{path}: {path.stat().st_size} bytes")

    (out / "texts.json").write_text(json.dumps(tricky_texts(), ensure_ascii=False, indent=0) + "\n")
    for pre in ("smollm", "qwen2", "llama-bpe", "tekken", "gpt-2"):
        vocab = train_bpe(pre)
        t = hf_pipeline(vocab)
        found = cases(lambda s: hf_ids(t, s, False), lambda s: hf_ids(t, s, True), t.decode)
        state = json.loads(t.to_str())
        del state["model"]["vocab"], state["model"]["merges"]  # those of `vocab`
        write(f"bpe-{pre}", vocab=vocab, tokenizer_json=state, cases=found)
    rules = "FF21\t41\nFB01\t66 69\n2126\t3A9\n65 301\tE9\n3000\t20\nA\t20\n9\t20\nD\t20\n"
    for name, options in {
        "spm-llama": ("bpe", True, True, False), "spm-gemma": ("bpe", False, True, False),
        "spm-unused": ("bpe", True, True, True), "spm-unknown": ("bpe", True, False, False),
        "unigram": ("unigram", True, False, False, rules), "unigram-bytes": ("unigram", True, True, True),
    }.items():
        vocab, sp = train_sp(*options)
        found = cases(lambda s: sp_ids(sp, vocab, s, False), lambda s: sp_ids(sp, vocab, s, True), sp.decode)
        write(name, vocab=vocab, cases=found)
    for name, t in hf_only().items():
        # The library's switch for plain text leaves out tokens that the model's own vocabulary lists: rename them.
        from tokenizers import Tokenizer

        state = json.loads(t.to_str())
        secret = {a["content"]: f"\U0010ffff{a['id']}" for a in state["added_tokens"] if a["special"]}
        for a in state["added_tokens"]:
            a["content"] = secret.get(a["content"], a["content"])
        table, model = state["model"]["vocab"], state["model"]
        if isinstance(table, dict):
            model["vocab"] = {secret.get(k, k): v for k, v in table.items()}
        else:
            model["vocab"] = [[secret.get(k, k), v] for k, v in table]
        if "unk_token" in model:
            model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
        plain = Tokenizer.from_str(json.dumps(state | {"post_processor": None}))
        found = cases(lambda s: hf_ids(plain, s, False), lambda s: hf_ids(t, s, True), t.decode)
        write(name, tokenizer_json=json.loads(t.to_str()), cases=found)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("compare")
    c.add_argument("out")
    c.add_argument("models", nargs="+")
    c.add_argument("--binary", help="the built example, target/release/examples/tokenize")
    c.add_argument("--bytes", type=int, default=1_000_000)
    c.add_argument("--no-transformers", dest="transformers", action="store_false")
    c.add_argument("--no-llama-cpp", dest="llama_cpp", action="store_false")
    g = commands.add_parser("golden")
    g.add_argument("out")
    args = parser.parse_args()
    sys.exit(compare(args) if args.command == "compare" else golden(args))


if __name__ == "__main__":
    main()
