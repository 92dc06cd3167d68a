//! Dequantised values against those of the Python package `gguf`, and blocks made by hand.

use super::*;
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    std::env::var_os("LONGSPAN_GOLDEN").map_or_else(default, PathBuf::from)
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|end| end == "safetensors") {
            found.push(path);
        }
    }
}

#[test]
fn values_are_those_of_the_reference() {
    let (mut paths, mut seen) = (Vec::new(), Vec::new());
    files(&golden(), &mut paths);
    for path in paths {
        let data = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&data).unwrap();
        let Some(metadata) = header.metadata() else {
            continue;
        };
        if metadata
            .get("paper")
            .is_none_or(|paper| paper != "ggml-dequant")
        {
            continue;
        }
        let config: serde_json::Value = serde_json::from_str(&metadata["config"]).unwrap();
        let ty = GgmlType::from_id(config["ggml_id"].as_u64().unwrap() as u32).unwrap();
        assert_eq!(ty.name(), config["type"]);
        let tensors = safetensors::SafeTensors::deserialize(&data).unwrap();
        let expected: Vec<f32> = tensors
            .tensor("weights")
            .unwrap()
            .data()
            .chunks(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        let mut out = vec![0.0; expected.len()];
        dequantize(ty, tensors.tensor("bytes").unwrap().data(), &mut out).unwrap();
        assert_eq!(out, expected, "{}", path.display());
        seen.push(ty.name());
    }
    assert!(
        !seen.is_empty(),
        "no golden files under {}",
        golden().display()
    );
}

#[test]
fn a_q4_k_block_made_by_hand() {
    let mut block = [0u8; 144];
    block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    block[2..4].copy_from_slice(&half::f16::from_f32(0.25).to_le_bytes());
    block[4] = 3; // run 0: scale 3
    block[8] = 2; // run 0: minimum 2
    block[4 + 1] = 0b1100_0000; // run 5: upper scale bits, 48
    block[4 + 9] = 0x21; // run 5: scale 48 + 1, minimum 2
    block[16] = 7; // weight 0
    block[16 + 64 + 3] = 0x90; // weight 3 of run 5
    let mut out = [0.0; 256];
    dequantize(GgmlType::Q4K, &block, &mut out).unwrap();
    assert_eq!(out[0], 0.5 * 3.0 * 7.0 - 0.25 * 2.0);
    assert_eq!(out[1], -0.25 * 2.0);
    assert_eq!(out[32 * 5 + 3], 0.5 * 49.0 * 9.0 - 0.25 * 2.0);
    assert_eq!(out[40], 0.0);
}

#[test]
fn sizes_and_errors() {
    assert_eq!(GgmlType::Q6K.bytes(512), Some(420));
    assert_eq!(GgmlType::Q6K.bytes(511), None);
    assert_eq!(GgmlType::F32.bytes(usize::MAX), None);
    assert_eq!(GgmlType::from_id(9), None);
    let found = dequantize(GgmlType::Q8_0, &[0; 34], &mut [0.0; 31]).unwrap_err();
    assert_eq!(
        found,
        QuantError::PartialBlock {
            ty: GgmlType::Q8_0,
            elements: 31
        }
    );
    let found = dequantize(GgmlType::Q8_0, &[0; 33], &mut [0.0; 32]).unwrap_err();
    assert_eq!(
        found.to_string(),
        "32 weights of type Q8_0 take 34 bytes but 33 were given; the file may be cut short"
    );
}
