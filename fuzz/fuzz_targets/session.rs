//! A damaged session: bytes of a real one are changed, its hash is made to fit again, and it is
//! opened and read on. The hash is what protects users; this asks what lies behind it.
//!
//! An input is one byte that picks the policy, then edits of five bytes: where in the index (or in
//! the planes' file) and the new value; a value of 255 at an even place cuts the index there.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use longspan_infer::engine::Want;
use longspan_infer::session::{Mode, SessionDir};
use longspan_infer::{Engine, EngineOptions};
use longspan_nn::config::ModelConfig;
use longspan_nn::model::{Decoder, Precision};
use longspan_nn::weights::safetensors::HfWeights;

const POLICIES: [&str; 3] = ["full", "sinks:2,12", "infllm:n_local=16,block=4,topk=2,n_init=2,exec_block=8"];

struct Base {
    engine: Engine,
    folder: PathBuf,
    /// The files of one session for each policy: index without its hash, planes.
    sessions: Vec<(Vec<u8>, Vec<u8>)>,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny-models/llama-tied");
        let config = ModelConfig::from_hf_file(&model.join("config.json")).expect("a golden");
        let weights = HfWeights::open(&model, &config).expect("a golden");
        let dense = Precision::Dense(DType::F32);
        let decoder = Decoder::load(&config, &weights, dense, &Device::Cpu).expect("a golden");
        let engine = Engine::new(decoder, "tiny".into()).expect("a golden");
        let folder = std::env::temp_dir().join(format!("longspan-fuzz-{}", std::process::id()));
        let sessions = POLICIES
            .iter()
            .map(|policy| {
                let options = EngineOptions {
                    context: policy.parse().expect("a policy"),
                    ..EngineOptions::default()
                };
                fs::remove_dir_all(&folder).ok();
                let session = SessionDir::new(&folder);
                let tier = session.create().expect("a folder");
                let mut sequence = engine.sequence(&options, Some(tier)).expect("a sequence");
                let ids: Vec<u32> = (0..70).map(|i| i * 7 % 50).collect();
                engine.forward(&mut [(&mut sequence, &ids)], Want::Nothing).expect("reads");
                session.save(&engine, &sequence, "a note".into()).expect("saves");
                let index = fs::read(folder.join("index")).expect("was written");
                let hot = fs::read_dir(&folder)
                    .expect("was written")
                    .flatten()
                    .find(|file| file.file_name().to_string_lossy().starts_with("hot-"));
                let planes = fs::read(hot.expect("was written").path()).expect("was written");
                (index[..index.len() - 32].to_vec(), planes)
            })
            .collect();
        Base { engine, folder, sessions }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let base = base();
    let Some((&policy, edits)) = bytes.split_first() else {
        return;
    };
    let (mut index, mut planes) = base.sessions[policy as usize % POLICIES.len()].clone();
    for edit in edits.chunks_exact(5) {
        let at = u32::from_le_bytes([edit[0], edit[1], edit[2], edit[3]]) as usize;
        let at = at % (index.len() + planes.len()).max(1);
        match at.checked_sub(index.len()) {
            Some(at) => planes[at] = edit[4],
            None if edit[4] == 255 && at % 2 == 0 => index.truncate(at),
            None => index[at] = edit[4],
        }
    }
    let hash = blake3::hash(&index);
    index.extend_from_slice(hash.as_bytes());
    fs::write(base.folder.join("index"), &index).expect("a writable temporary folder");
    for name in ["hot-1", "hot-0"] {
        fs::write(base.folder.join(name), &planes).expect("a writable temporary folder");
    }
    if let Ok((mut sequence, _)) = SessionDir::new(&base.folder).load(&base.engine, Mode::Read) {
        let _ = base.engine.forward(&mut [(&mut sequence, &[3, 4])], Want::Last);
    }
});
