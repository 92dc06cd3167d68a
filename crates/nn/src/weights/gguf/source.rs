//! A GGUF file seen through Hugging Face names: the table of names, and the one reordering (rows of
//! query and key projections of `llama` files) that separates the two conventions.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::{Gguf, TensorInfo};
use crate::config::ModelConfig;
use crate::weights::{Fingerprint, MatrixData, WeightSource, WeightsError, missing, to_f32};

/// The tensors of a [`Gguf`] under canonical names.
///
/// Files of architecture `llama`, `smollm3` and `baichuan` keep query and key rows of a head interleaved, row
/// `2 i + j` holding what Hugging Face keeps in row `j * rotated / 2 + i`, so that rotation works
/// on neighbours. [`WeightSource::matrix`] and [`WeightSource::vector`] put them back.
#[derive(Debug)]
pub struct GgufWeights {
    gguf: Gguf,
    /// Canonical name to position in `gguf.tensors()`.
    index: BTreeMap<String, usize>,
    interleaved: Option<Interleaved>,
}

/// How query and key rows are interleaved.
#[derive(Clone, Copy, Debug)]
struct Interleaved {
    num_heads: usize,
    num_kv_heads: usize,
    /// Rows of a head that take part in rotation; the rest stays where it is.
    rotated: usize,
}

/// Names outside the layers.
const GLOBAL: &[(&str, &str)] = &[
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Names inside a layer, without `blk.N.` and `model.layers.N.`, and without `.weight` or `.bias`.
const LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// The canonical name of a tensor; names without one stay as they are. `ffn_norm` is the norm
/// before the MLP, which Hugging Face calls by two names, depending on `sandwich_norms`.
fn canonical(name: &str, sandwich_norms: bool) -> String {
    if let Some((_, hf)) = GLOBAL.iter().find(|(gguf, _)| *gguf == name) {
        return (*hf).into();
    }
    let inside = || {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (stem, kind) = rest.rsplit_once('.')?;
        let number = layer.parse::<u32>().ok()?;
        // `blk.007` must not become the same name as `blk.7`.
        if number.to_string() != layer || !matches!(kind, "weight" | "bias") {
            return None;
        }
        let hf = match (stem, sandwich_norms) {
            ("ffn_norm", true) => "pre_feedforward_layernorm",
            ("ffn_norm", false) => "post_attention_layernorm",
            // Without sandwich norms this name would clash with the one above.
            ("post_attention_norm", false) => return None,
            _ => LAYER.iter().find(|(gguf, _)| *gguf == stem)?.1,
        };
        Some(format!("model.layers.{number}.{hf}.{kind}"))
    };
    inside().unwrap_or_else(|| name.into())
}

impl GgufWeights {
    /// Gives the tensors of `gguf` their canonical names; `config` is the one read from `gguf`.
    ///
    /// # Errors
    /// When two tensors get one name.
    pub fn new(gguf: Gguf, config: &ModelConfig) -> Result<Self, WeightsError> {
        let mut index = BTreeMap::new();
        for (at, tensor) in gguf.tensors().iter().enumerate() {
            let name = canonical(&tensor.name, config.sandwich_norms);
            if let Some(first) = index.insert(name.clone(), at) {
                return Err(WeightsError::Malformed {
                    file: gguf.file().to_path_buf(),
                    place: format!("tensor `{}`", tensor.name),
                    found: format!("a second `{name}`"),
                    expected: format!("only `{}`", gguf.tensors()[first].name),
                });
            }
        }
        let interleaved = match gguf.architecture()? {
            "llama" | "smollm3" | "baichuan" => Some(Interleaved {
                num_heads: config.num_heads,
                num_kv_heads: config.num_kv_heads,
                rotated: config.rotary_dim(),
            }),
            _ => None,
        };
        Ok(Self {
            gguf,
            index,
            interleaved,
        })
    }

    /// The file under its own names.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, WeightsError> {
        match self.index.get(name) {
            Some(&at) => Ok(&self.gguf.tensors()[at]),
            None => Err(missing(
                self.file(),
                name,
                self.index.keys().map(String::as_str),
            )),
        }
    }

    /// Puts the rows of a query or key projection, or the elements of its bias, into Hugging Face's
    /// order; everything else passes through. `row` is the bytes of one row.
    fn reorder<'a>(
        &self,
        name: &str,
        shape: &[usize],
        row: usize,
        bytes: &'a [u8],
    ) -> Result<Cow<'a, [u8]>, WeightsError> {
        let Some(layout) = self.interleaved else {
            return Ok(Cow::Borrowed(bytes));
        };
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        let heads = if stem.ends_with("self_attn.q_proj") {
            layout.num_heads
        } else if stem.ends_with("self_attn.k_proj") {
            layout.num_kv_heads
        } else {
            return Ok(Cow::Borrowed(bytes));
        };
        let rows = shape[0];
        let head_dim = rows / heads.max(1);
        let rotated = layout.rotated;
        if heads == 0 || !rows.is_multiple_of(heads) || rotated > head_dim {
            return Err(WeightsError::Shape {
                file: self.file().to_path_buf(),
                tensor: name.into(),
                found: shape.into(),
                expected: format!("{heads} heads of at least {rotated} rows each"),
            });
        }
        let mut out = Vec::with_capacity(bytes.len());
        for head in 0..heads {
            for at in 0..head_dim {
                let half = rotated / 2;
                let from = match at {
                    at if at >= rotated => at,
                    at if at < half => 2 * at,
                    at => 2 * (at - half) + 1,
                };
                let from = head * head_dim + from;
                out.extend_from_slice(&bytes[from * row..(from + 1) * row]);
            }
        }
        Ok(Cow::Owned(out))
    }
}

impl WeightSource for GgufWeights {
    fn matrix(&self, name: &str) -> Result<MatrixData<'_>, WeightsError> {
        let tensor = self.find(name)?;
        let [rows, cols] = tensor.shape[..] else {
            return Err(self.wrong_rank(tensor, name, "[rows, columns]"));
        };
        let bytes = self.gguf.data(tensor);
        Ok(MatrixData {
            ty: tensor.ty,
            rows,
            cols,
            bytes: self.reorder(name, &tensor.shape, bytes.len() / rows, bytes)?,
        })
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let tensor = self.find(name)?;
        if tensor.shape.len() != 1 {
            return Err(self.wrong_rank(tensor, name, "[length]"));
        }
        let wrong_type = || WeightsError::Type {
            file: self.file().to_path_buf(),
            tensor: name.into(),
            found: tensor.ty.name().into(),
            expected: "F32, F16 or BF16".into(),
        };
        if tensor.ty.block_elements() != 1 {
            return Err(wrong_type());
        }
        let bytes = self.gguf.data(tensor);
        let bytes = self.reorder(name, &tensor.shape, tensor.ty.block_bytes(), bytes)?;
        // Norms need no change: files of Gemma hold the factor itself, as those of all others do.
        to_f32(tensor.ty, &bytes).ok_or_else(wrong_type)
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let at = *self.index.get(name)?;
        Some(&self.gguf.tensors()[at].shape)
    }

    fn names(&self) -> Vec<String> {
        self.index.keys().cloned().collect()
    }

    fn file(&self) -> &Path {
        self.gguf.file()
    }

    fn fingerprint(&self) -> Fingerprint {
        self.gguf.fingerprint()
    }
}

impl GgufWeights {
    fn wrong_rank(&self, tensor: &TensorInfo, name: &str, expected: &str) -> WeightsError {
        WeightsError::Shape {
            file: self.file().to_path_buf(),
            tensor: name.into(),
            found: tensor.shape.clone(),
            expected: expected.into(),
        }
    }
}
