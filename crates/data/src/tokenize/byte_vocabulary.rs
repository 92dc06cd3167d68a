//! The vocabulary of models that read bytes, as a `tokenizer.json`: token b is byte b.

use serde_json::{Map, Value, json};

/// The contents of a `tokenizer.json` whose tokens are the 256 bytes, by their values.
pub fn byte_vocabulary() -> Value {
    // Byte-level vocabularies write a byte as a printable character: itself, or the next one from U+0100 on.
    let mut vocab = Map::new();
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let character = if printable {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or_default()
        };
        vocab.insert(character.to_string(), byte.into());
    }
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": []
        }
    })
}

#[cfg(test)]
mod tests {
    use crate::tokenize::{Special, Tokenizer};

    #[test]
    fn tokens_are_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let json = super::byte_vocabulary().to_string();
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let text = "A b\n\t\u{e9}\u{4e16}\u{0} end  ";
        let ids = tokenizer.encode(text, Special::None).unwrap();
        let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
        assert_eq!(ids, bytes);
        let back: Vec<u8> = ids
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id))
            .collect();
        assert_eq!(back, text.as_bytes());
    }
}
