//! Any bytes as a `tokenizer.json`.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use longspan_data::tokenize::{Special, Tokenizer};

/// Where the input is put, since a tokenizer is read from a file; one for each process.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("longspan-fuzz-{}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder.join("tokenizer.json")
});

/// The tokenizer catches panics of the library it uses, so a panic counts only when it comes out
/// here. To see the message of one, run the program on its file with `RUST_BACKTRACE=1`.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            eprintln!("{panic}");
        }
    }));
}

fuzz_target!(init: quiet_panics(), |bytes: &[u8]| {
    std::fs::write(&*FILE, bytes).unwrap();
    let Ok(tokenizer) = Tokenizer::from_dir(&FILE) else {
        return;
    };
    for text in ["", "Hello, wörld! <|end|> 123", " \u{0}\t日本語 a'll"] {
        for special in [Special::None, Special::ParseWithBos] {
            if let Ok(ids) = tokenizer.encode(text, special) {
                tokenizer.decode(&ids);
                ids.iter().for_each(|&id| drop(tokenizer.token_bytes(id)));
            }
        }
    }
    tokenizer.decode(&[0, 1, u32::MAX]);
});
