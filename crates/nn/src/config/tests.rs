//! Configurations as published, and configurations that cannot be.

use std::path::Path;

use serde_json::{Value as Json, json};

use super::*;
use crate::weights::gguf::{Array, Gguf, GgufWriter, Value};
use crate::weights::testing::{HEAD_DIM, HEADS, HIDDEN, Tiny};

fn hf(config: &Json) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_hf_json(Path::new("config.json"), config.to_string().as_bytes())
}

fn gguf(writer: &GgufWriter) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_gguf(&Gguf::from_bytes(Path::new("x.gguf"), writer.to_bytes()).unwrap())
}

/// Numbers as floats, and without the old spelling that the reference leaves beside the new one.
fn plain(parameters: &Json) -> Json {
    let entries = parameters
        .as_object()
        .unwrap()
        .iter()
        .filter(|(key, _)| *key != "type");
    entries
        .map(|(key, value)| match value.as_f64() {
            Some(number) => (key.clone(), json!(number)),
            None => (key.clone(), value.clone()),
        })
        .collect::<serde_json::Map<String, Json>>()
        .into()
}

/// `hf_cases.json` holds configurations in the spelling of published models, and what version
/// 5.24 of the transformers library makes of each.
#[test]
fn hugging_face_configurations_mean_what_transformers_says() {
    let cases: Vec<Json> = serde_json::from_str(include_str!("hf_cases.json")).unwrap();
    assert!(cases.len() >= 20);
    for case in &cases {
        let name = &case["case"];
        let expected = &case["expected"];
        let config = hf(&case["config"]).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (field, found) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_layers", config.num_layers),
            ("num_heads", config.num_heads),
            ("num_kv_heads", config.num_kv_heads),
            ("head_dim", config.head_dim),
            ("context_length", config.context_length),
        ] {
            assert_eq!(json!(found), expected[field], "{name}: {field}");
        }
        assert_eq!(
            Some(config.rms_norm_eps),
            expected["rms_norm_eps"].as_f64(),
            "{name}"
        );
        let scale = expected["attention_scale"].as_f64().unwrap() as f32;
        assert!((config.attention_scale - scale).abs() < 1e-7, "{name}");
        assert_eq!(
            json!(config.tie_word_embeddings),
            expected["tie_word_embeddings"],
            "{name}"
        );
        let layers = expected["layers"].as_array().unwrap();
        assert_eq!(config.layers.len(), layers.len(), "{name}");
        for (i, (layer, expected)) in config.layers.iter().zip(layers).enumerate() {
            assert_eq!(
                json!(layer.sliding_window),
                expected["window"],
                "{name}: layer {i}"
            );
            let found = layer.rope.map(|r| plain(&config.rope[r].parameters));
            let expected = expected["rope"]
                .is_object()
                .then(|| plain(&expected["rope"]));
            assert_eq!(found, expected, "{name}: layer {i}");
        }
    }
}

#[test]
fn families_differ_where_they_should() {
    let read = |tiny: &Tiny| (hf(&tiny.hf_config()).unwrap(), gguf(&tiny.gguf()).unwrap());
    let [llama, qwen2, qwen3, gemma, smollm3] = Tiny::ALL.each_ref().map(read);
    for (hf, gguf) in [&llama, &qwen2, &qwen3, &gemma, &smollm3] {
        let mut named = hf.clone();
        named.name.clone_from(&gguf.name);
        assert_eq!(named, *gguf);
        assert_eq!(gguf.name.as_deref(), Some("tiny"));
        assert_eq!(
            (hf.query_size(), hf.kv_size(), hf.rotary_dim()),
            (24, 12, 6)
        );
    }
    assert_eq!(llama.0.architecture, Architecture::Llama);
    assert!(!llama.0.qkv_bias && !llama.0.qk_norm && !llama.0.tie_word_embeddings);
    assert_eq!(llama.0.activation, Activation::Silu);
    assert_eq!(llama.0.embedding_scale, None);
    assert!(qwen2.0.qkv_bias && !qwen2.0.output_bias);
    assert!(qwen3.0.qk_norm && !qwen3.0.sandwich_norms);
    assert!(gemma.0.qk_norm && gemma.0.sandwich_norms);
    assert_eq!(gemma.0.activation, Activation::GeluTanh);
    assert_eq!(gemma.0.embedding_scale, Some((HIDDEN as f32).sqrt()));
    let windows: Vec<_> = gemma.0.layers.iter().map(|l| l.sliding_window).collect();
    let local = Some(16);
    assert_eq!(windows, [local, local, local, local, local, None, local]);
    let ropes: Vec<_> = smollm3.0.layers.iter().map(|l| l.rope).collect();
    assert_eq!(ropes, [Some(0), Some(0), Some(0), None]);
}

#[test]
fn a_configuration_survives_serde() {
    for tiny in Tiny::ALL {
        let config = gguf(&tiny.gguf()).unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config);
    }
}

#[test]
fn unsupported_architectures_list_the_supported_ones() {
    let text = hf(&json!({"model_type": "mamba2"}))
        .unwrap_err()
        .to_string();
    for part in [
        "config.json",
        "mamba2",
        "llama",
        "qwen3",
        "gemma3_text",
        "smollm3",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let mut w = GgufWriter::new();
    w.metadata("general.architecture", Value::String("rwkv7".into()));
    let text = gguf(&w).unwrap_err().to_string();
    for part in ["x.gguf", "rwkv7", "llama", "qwen2", "gemma3"] {
        assert!(text.contains(part), "{text}");
    }
    let text = gguf(&GgufWriter::new()).unwrap_err().to_string();
    assert!(text.contains("general.architecture"), "{text}");
    assert!(
        hf(&json!({}))
            .unwrap_err()
            .to_string()
            .contains("model_type")
    );
    assert!(hf(&json!([1])).unwrap_err().to_string().contains("JSON"));
}

#[test]
fn impossible_hugging_face_values_are_refused_by_name() {
    let huge = json!(u64::MAX);
    for (key, value, part) in [
        ("num_attention_heads", json!(0), "1 to"),
        ("num_attention_heads", json!("four"), "integer"),
        ("num_key_value_heads", json!(3), "divisor of the 4 heads"),
        ("num_key_value_heads", json!(0), "1 to"),
        ("head_dim", json!(5), "even"),
        ("head_dim", json!(-8), "integer"),
        ("hidden_size", json!(0), "1 to"),
        ("hidden_size", huge.clone(), "1 to"),
        ("num_hidden_layers", json!(0), "1 to"),
        ("num_hidden_layers", huge.clone(), "1 to 4096"),
        ("vocab_size", json!(0), "1 to"),
        ("intermediate_size", huge, "1 to"),
        ("max_position_embeddings", json!(0), "1 to"),
        ("rms_norm_eps", json!(0.0), "between 0 and 1"),
        ("rms_norm_eps", json!("tiny"), "a number"),
        ("rope_theta", json!(-1.0), "positive"),
        ("rope_parameters", json!({"rope_theta": "x"}), "rope_theta"),
        ("rope_scaling", json!({"rope_type": 5}), "rope_type"),
        ("rope_scaling", json!("yarn"), "an object"),
        ("partial_rotary_factor", json!(1.5), "share of the head"),
        ("partial_rotary_factor", json!(0.5), "even number"),
        ("hidden_act", json!("relu"), "silu"),
        ("quantization_config", json!({"bits": 4}), "GGUF"),
        ("use_bidirectional_attention", json!(true), "false"),
        ("tie_word_embeddings", json!(1), "true or false"),
    ] {
        let mut config = Tiny::ALL[0].hf_config();
        config[key] = value;
        let text = hf(&config).unwrap_err().to_string();
        let named = text.contains(&format!("`{key}`")) || key.starts_with("rope_");
        assert!(
            named && text.contains(part) && text.starts_with("config.json"),
            "{key}: {text}"
        );
    }
    let mut config = Tiny::ALL[0].hf_config();
    config.as_object_mut().unwrap().remove("hidden_size");
    assert!(
        hf(&config)
            .unwrap_err()
            .to_string()
            .contains("`hidden_size` is missing")
    );
    for (key, value) in [
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!(vec!["chunked_attention"; 7])),
        ("sliding_window_pattern", json!(0)),
        ("sliding_window", json!(0)),
        ("query_pre_attn_scalar", json!(0)),
        ("attn_logit_softcapping", json!(-3.0)),
    ] {
        let mut config = Tiny::ALL[3].hf_config();
        config[key] = value;
        let text = hf(&config).unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
    for (key, value) in [
        ("no_rope_layers", json!([1, 1])),
        ("no_rope_layers", json!([1, 1, 2, 1])),
        ("no_rope_layer_interval", json!(0)),
    ] {
        let mut config = Tiny::ALL[4].hf_config();
        config[key] = value;
        let text = hf(&config).unwrap_err().to_string();
        assert!(text.contains(key), "{text}");
    }
}

/// A tiny Llama without `skip`, which `value` replaces.
fn llama_with(key: &str, value: Option<Value>) -> GgufWriter {
    let mut w = GgufWriter::new();
    w.metadata("general.architecture", Value::String("llama".into()));
    let usual = [
        ("block_count", 2),
        ("context_length", 512),
        ("embedding_length", HIDDEN as u32),
        ("feed_forward_length", 12),
        ("attention.head_count", HEADS as u32),
        ("attention.head_count_kv", 2),
        ("attention.key_length", HEAD_DIM as u32),
    ];
    for (name, usual) in usual.iter().filter(|(name, _)| *name != key) {
        w.metadata(&format!("llama.{name}"), Value::U32(*usual));
    }
    let eps = "attention.layer_norm_rms_epsilon";
    if key != eps {
        w.metadata(&format!("llama.{eps}"), Value::F32(1e-5));
    }
    if let Some(value) = value {
        w.metadata(&format!("llama.{key}"), value);
    }
    w.f32("token_embd.weight", &[3, HIDDEN], &[0.0; 3 * HIDDEN]);
    w
}

#[test]
fn impossible_gguf_values_are_refused_by_name() {
    assert!(gguf(&llama_with("", None)).is_ok());
    for key in [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let text = gguf(&llama_with(key, None)).unwrap_err().to_string();
        assert!(
            text.contains(&format!("`llama.{key}` is missing")),
            "{text}"
        );
    }
    let array = |values: &[u32]| Value::Array(Array::U32(values.into()));
    for (key, value, part) in [
        ("block_count", Value::U64(u64::MAX), "1 to 4096"),
        ("embedding_length", Value::U32(0), "1 to"),
        ("embedding_length", Value::String("8".into()), "integer"),
        (
            "attention.head_count",
            Value::U32(3),
            "divisor of the 3 heads",
        ),
        (
            "attention.head_count",
            array(&[4, 2]),
            "same value for every layer",
        ),
        ("attention.head_count", array(&[]), "integer"),
        ("attention.head_count_kv", Value::U32(0), "1 to"),
        ("attention.key_length", Value::U32(7), "even"),
        ("attention.value_length", Value::U32(4), "size of keys"),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(f32::NAN),
            "finite",
        ),
        ("rope.freq_base", Value::F32(0.0), "positive"),
        (
            "rope.dimension_count",
            Value::U32(8),
            "up to the head size 6",
        ),
        ("rope.dimension_count", Value::U32(3), "even"),
        (
            "rope.scaling.type",
            Value::String("longrope".into()),
            "none, linear or yarn",
        ),
        (
            "rope.scaling.type",
            Value::String("linear".into()),
            "rope.scaling.factor",
        ),
        ("expert_count", Value::U32(8), "mixture of experts"),
    ] {
        let text = gguf(&llama_with(key, Some(value))).unwrap_err().to_string();
        let key_named = text.contains(&format!("`llama.{key}`")) || part.contains('.');
        let kv = key == "attention.head_count" && text.contains("attention.head_count_kv");
        assert!((key_named || kv) && text.contains(part), "{key}: {text}");
    }
    let mut w = llama_with("", None);
    w.metadata(
        "tokenizer.ggml.tokens",
        Value::Array(Array::String(vec![String::new(); 4])),
    );
    let text = gguf(&w).unwrap_err().to_string();
    assert!(
        text.contains("3 rows") && text.contains("at least 4"),
        "{text}"
    );
    for (count, value) in [(2, 1.0), (3, 0.0), (3, f32::NAN)] {
        let mut w = llama_with("", None);
        w.f32("rope_freqs.weight", &[count], &vec![value; count]);
        let text = gguf(&w).unwrap_err().to_string();
        assert!(text.contains("rope_freqs.weight"), "{text}");
    }
}

#[test]
fn head_counts_may_be_given_for_each_layer() {
    let array = |count: u32| Some(Value::Array(Array::U32(vec![count; 2])));
    let config = gguf(&llama_with("attention.head_count_kv", array(2))).unwrap();
    assert_eq!(config.num_kv_heads, 2);
    // Absent: as many as heads.
    let config = gguf(&llama_with("attention.head_count_kv", None)).unwrap();
    assert_eq!(config.num_kv_heads, HEADS);
}

#[test]
fn rope_keys_of_gguf_become_hugging_face_parameters() {
    let rope = |entries: &[(&str, Value)]| {
        let mut w = llama_with("", None);
        for (key, value) in entries {
            w.metadata(&format!("llama.rope.{key}"), value.clone());
        }
        gguf(&w).map(|config| config.rope[0].parameters.clone())
    };
    let text = |s: &str| Value::String(s.into());
    assert_eq!(
        rope(&[]).unwrap(),
        json!({"rope_type": "default", "rope_theta": 10_000.0})
    );
    let linear = json!({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0});
    let factor = ("scaling.factor", Value::F32(4.0));
    assert_eq!(
        rope(&[("scaling.type", text("linear")), factor.clone()]).unwrap(),
        linear
    );
    assert_eq!(rope(&[("scale_linear", Value::F32(4.0))]).unwrap(), linear);
    let none = rope(&[("scaling.type", text("none")), factor.clone()]).unwrap();
    assert_eq!(none["rope_type"], "default");
    let partial = rope(&[("dimension_count", Value::U32(2))]).unwrap();
    assert_eq!(partial["partial_rotary_factor"], json!(2.0 / 6.0));
    let mut yarn = vec![
        ("scaling.type", text("yarn")),
        factor,
        ("scaling.original_context_length", Value::U32(128)),
        ("scaling.yarn_beta_fast", Value::F32(32.0)),
    ];
    let found = rope(&yarn).unwrap();
    let expected = json!({
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
        "original_max_position_embeddings": 128, "beta_fast": 32.0
    });
    assert_eq!(found, expected);
    // 0.5 (0.1 ln 4 + 1)
    yarn.push(("scaling.attn_factor", Value::F32(0.5)));
    let factor = rope(&yarn).unwrap()["attention_factor"].as_f64().unwrap();
    assert!((factor - 0.569_314_718_056).abs() < 1e-9, "{factor}");
    yarn.remove(2);
    assert!(
        rope(&yarn)
            .unwrap_err()
            .to_string()
            .contains("original_context_length")
    );
}

#[test]
fn frequency_factors_come_along() {
    let mut w = llama_with("", None);
    w.f32("rope_freqs.weight", &[3], &[1.0, 2.0, 8.0]);
    let config = gguf(&w).unwrap();
    assert_eq!(
        config.rope[0].freq_factors.as_deref(),
        Some(&[1.0, 2.0, 8.0][..])
    );
    assert_eq!(config.rope[0].max_position_embeddings, 512);
}

#[test]
fn a_gguf_may_say_which_layers_are_local() {
    let with = |value: Value| {
        let mut w = Tiny::ALL[3].gguf();
        w.metadata("gemma3.attention.sliding_window_pattern", value);
        gguf(&w).map(|c| {
            c.layers
                .iter()
                .map(|l| l.sliding_window.is_some())
                .collect::<Vec<_>>()
        })
    };
    let listed = vec![true, false, true, true, false, false, true];
    assert_eq!(
        with(Value::Array(Array::Bool(listed.clone()))).unwrap(),
        listed
    );
    let every_third = vec![true, true, false, true, true, false, true];
    assert_eq!(with(Value::U32(3)).unwrap(), every_third);
    assert!(with(Value::U32(0)).is_err());
    assert!(with(Value::Array(Array::Bool(vec![true]))).is_err());
    // Mistral's files say `llama` and give a window for all layers.
    let config = gguf(&llama_with(
        "attention.sliding_window",
        Some(Value::U32(64)),
    ))
    .unwrap();
    assert!(config.layers.iter().all(|l| l.sliding_window == Some(64)));
}

#[test]
fn alibi_is_read_in_every_spelling_and_takes_the_place_of_rotation() {
    let with = |keys: &[(&str, Json)]| {
        let mut config = Tiny::ALL[0].hf_config();
        keys.iter()
            .for_each(|(key, value)| config[*key] = value.clone());
        hf(&config)
    };
    let plain = with(&[]).unwrap();
    assert_eq!((plain.alibi_max_bias, plain.alibi_slopes()), (None, None));
    for keys in [
        &[("position_embedding_type", json!("alibi"))][..],
        &[("alibi", json!(true))],
        &[("alibi", json!(true)), ("alibi_bias_max", json!(8))],
    ] {
        let config = with(keys).unwrap();
        assert_eq!(config.alibi_max_bias, Some(8.0));
        assert!(config.rope.is_empty() && config.layers.iter().all(|layer| layer.rope.is_none()));
        let slopes = config.alibi_slopes().unwrap();
        let want = crate::position::alibi::slopes(config.num_heads);
        assert_eq!(slopes, want.iter().map(|&x| x as f32).collect::<Vec<_>>());
    }
    let text = with(&[("alibi", json!(true)), ("alibi_bias_max", json!(0))]);
    assert!(text.unwrap_err().to_string().contains("alibi_bias_max"));
    let rotary = with(&[("position_embedding_type", json!("rotary"))]).unwrap();
    assert_eq!(rotary, plain);

    let config = gguf(&llama_with(
        "attention.max_alibi_bias",
        Some(Value::F32(16.0)),
    ))
    .unwrap();
    assert_eq!(config.alibi_max_bias, Some(16.0));
    assert!(config.rope.is_empty());
    let config = gguf(&llama_with(
        "attention.max_alibi_bias",
        Some(Value::F32(0.0)),
    ))
    .unwrap();
    assert_eq!((config.alibi_max_bias, config.rope.len()), (None, 1));
}
