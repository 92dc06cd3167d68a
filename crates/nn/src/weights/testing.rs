//! Tiny models for tests: the same weights as a GGUF file and as a Hugging Face folder.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::gguf::{Array, GgufWriter, Value};

/// A model small enough to read by eye; its weights are a function of name and place.
pub(crate) struct Tiny {
    /// `general.architecture` of its GGUF file.
    pub gguf: &'static str,
    /// `model_type` of its `config.json`.
    pub hf: &'static str,
    pub layers: usize,
    pub tied: bool,
}

pub(crate) const HIDDEN: usize = 8;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
/// Not `HIDDEN / HEADS`, so that mixing the two up shows.
pub(crate) const HEAD_DIM: usize = 6;
pub(crate) const INNER: usize = 12;
pub(crate) const VOCAB: usize = 260;

/// One tensor under its canonical name.
pub(crate) struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Tiny {
    pub(crate) const ALL: [Tiny; 5] = [
        Tiny {
            gguf: "llama",
            hf: "llama",
            layers: 2,
            tied: false,
        },
        Tiny {
            gguf: "qwen2",
            hf: "qwen2",
            layers: 2,
            tied: false,
        },
        Tiny {
            gguf: "qwen3",
            hf: "qwen3",
            layers: 2,
            tied: true,
        },
        Tiny {
            gguf: "gemma3",
            hf: "gemma3_text",
            layers: 7,
            tied: true,
        },
        Tiny {
            gguf: "smollm3",
            hf: "smollm3",
            layers: 4,
            tied: true,
        },
    ];

    fn gemma(&self) -> bool {
        self.gguf == "gemma3"
    }

    pub(crate) fn qk_norm(&self) -> bool {
        matches!(self.gguf, "gemma3" | "qwen3")
    }

    /// All tensors, norms as the factor to multiply with.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let seed: u32 = name
                .bytes()
                .fold(7, |h, b| h.wrapping_mul(31) ^ u32::from(b));
            let count = shape.iter().product::<usize>() as u32;
            // Multiples of 1/64 below 8: exact in float32 and bfloat16 minus one alike.
            let value = |i: u32| (seed.wrapping_add(i.wrapping_mul(37)) % 128) as f32 / 64.0;
            all.push(Tensor {
                name,
                shape: shape.to_vec(),
                values: (0..count).map(value).collect(),
            });
        };
        add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                add(format!("model.layers.{layer}.{name}"), shape);
            };
            add("self_attn.q_proj.weight", &[HEADS * HEAD_DIM, HIDDEN]);
            add("self_attn.k_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN]);
            add("self_attn.v_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN]);
            add("self_attn.o_proj.weight", &[HIDDEN, HEADS * HEAD_DIM]);
            if self.gguf == "qwen2" {
                add("self_attn.q_proj.bias", &[HEADS * HEAD_DIM]);
                add("self_attn.k_proj.bias", &[KV_HEADS * HEAD_DIM]);
                add("self_attn.v_proj.bias", &[KV_HEADS * HEAD_DIM]);
            }
            if self.qk_norm() {
                add("self_attn.q_norm.weight", &[HEAD_DIM]);
                add("self_attn.k_norm.weight", &[HEAD_DIM]);
            }
            add("mlp.gate_proj.weight", &[INNER, HIDDEN]);
            add("mlp.up_proj.weight", &[INNER, HIDDEN]);
            add("mlp.down_proj.weight", &[HIDDEN, INNER]);
            add("input_layernorm.weight", &[HIDDEN]);
            add("post_attention_layernorm.weight", &[HIDDEN]);
            if self.gemma() {
                add("pre_feedforward_layernorm.weight", &[HIDDEN]);
                add("post_feedforward_layernorm.weight", &[HIDDEN]);
            }
        }
        add("model.norm.weight".into(), &[HIDDEN]);
        if !self.tied {
            add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
        }
        all
    }

    /// `config.json`.
    pub(crate) fn hf_config(&self) -> Json {
        let mut config = json!({
            "model_type": self.hf,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            "tie_word_embeddings": self.tied,
            "rope_theta": 50000.0,
        });
        if self.gemma() {
            config["sliding_window"] = json!(16);
            config["query_pre_attn_scalar"] = json!(HEAD_DIM);
        }
        config
    }

    /// The file `model.safetensors`, float32.
    pub(crate) fn safetensors(&self) -> Vec<u8> {
        use safetensors::tensor::{Dtype, TensorView, serialize};
        let offset = if self.gemma() { 1.0 } else { 0.0 };
        let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = self
            .tensors()
            .into_iter()
            .map(|t| {
                let minus = if t.name.ends_with("norm.weight") {
                    offset
                } else {
                    0.0
                };
                let bytes = t.values.iter().flat_map(|v| (v - minus).to_le_bytes());
                (t.name, (t.shape, bytes.collect()))
            })
            .collect();
        let views = tensors.iter().map(|(name, (shape, bytes))| {
            (
                name,
                TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
            )
        });
        serialize(views, None).unwrap()
    }

    /// A byte-level `tokenizer.json` of 256 bytes and a few special tokens.
    pub(crate) fn tokenizer_json() -> Json {
        let vocab: serde_json::Map<String, Json> = (0..=255u8)
            .map(|b| (byte_char(b).to_string(), json!(b)))
            .collect();
        json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 256, "content": "<|end|>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false
            }],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        })
    }

    /// Writes the Hugging Face folder.
    pub(crate) fn write_folder(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.hf_config().to_string()).unwrap();
        std::fs::write(
            folder.join("tokenizer.json"),
            Self::tokenizer_json().to_string(),
        )
        .unwrap();
        std::fs::write(folder.join("model.safetensors"), self.safetensors()).unwrap();
    }

    /// The GGUF file, not yet laid out.
    pub(crate) fn gguf(&self) -> GgufWriter {
        let mut w = GgufWriter::new();
        let text = |s: &str| Value::String(s.into());
        w.metadata("general.architecture", text(self.gguf));
        w.metadata("general.name", text("tiny"));
        for (key, value) in [
            ("block_count", self.layers),
            ("context_length", 512),
            ("embedding_length", HIDDEN),
            ("feed_forward_length", INNER),
            ("attention.head_count", HEADS),
            ("attention.head_count_kv", KV_HEADS),
            ("attention.key_length", HEAD_DIM),
            ("attention.value_length", HEAD_DIM),
        ] {
            w.metadata(&format!("{}.{key}", self.gguf), Value::U32(value as u32));
        }
        let key = |key: &str| format!("{}.{key}", self.gguf);
        w.metadata(&key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6));
        w.metadata(&key("rope.freq_base"), Value::F32(50_000.0));
        if self.gemma() {
            w.metadata(&key("attention.sliding_window"), Value::U32(16));
        }
        let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
        tokens.push("<|end|>".into());
        let mut types = vec![1; 256];
        types.push(3);
        w.metadata("tokenizer.ggml.model", text("gpt2"));
        w.metadata("tokenizer.ggml.pre", text("gpt-2"));
        w.metadata("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
        w.metadata("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
        w.metadata("tokenizer.ggml.merges", Value::Array(Array::String(vec![])));
        w.metadata("tokenizer.ggml.eos_token_id", Value::U32(256));
        for tensor in self.tensors() {
            let name = gguf_name(&tensor.name, self.gemma());
            let heads = match tensor.name.contains("self_attn.q_proj") {
                true => HEADS,
                false => KV_HEADS,
            };
            let interleaved = matches!(self.gguf, "llama" | "smollm3");
            let query_or_key = name.contains("attn_q.") || name.contains("attn_k.");
            let values = match interleaved && query_or_key {
                true => interleave(&tensor.values, heads, HEAD_DIM),
                false => tensor.values,
            };
            w.f32(&name, &tensor.shape, &values);
        }
        w
    }
}

/// GPT-2's printable stand-in for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match printable(byte) {
        true => byte.into(),
        false => {
            let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
            char::from_u32(256 + before).unwrap()
        }
    }
}

/// From `[heads, 2, head_dim / 2, cols]` to `[heads, head_dim / 2, 2, cols]`, index by index: what
/// the converter to GGUF does to query and key rows of Llama.
fn interleave(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let cols = values.len() / (heads * head_dim);
    let mut out = vec![0.0; values.len()];
    for h in 0..heads {
        for half in 0..2 {
            for i in 0..head_dim / 2 {
                for c in 0..cols {
                    let from = ((h * 2 + half) * (head_dim / 2) + i) * cols + c;
                    let to = ((h * (head_dim / 2) + i) * 2 + half) * cols + c;
                    out[to] = values[from];
                }
            }
        }
    }
    out
}

/// The table of names, written the other way round and on its own.
fn gguf_name(name: &str, gemma: bool) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let rest = name.strip_prefix("model.layers.").unwrap();
    let (layer, rest) = rest.split_once('.').unwrap();
    let (stem, kind) = rest.rsplit_once('.').unwrap();
    let stem = match stem {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{stem}.{kind}")
}

/// The small files that fuzzing starts from, by path.
pub(crate) fn fuzz_corpus(target: &str) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    files
        .map(|file| file.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}
