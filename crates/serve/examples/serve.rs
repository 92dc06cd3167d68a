//! The smallest server: `cargo run --release -p longspan-serve --example serve MODEL [ADDRESS [EMBEDDER]]`.

use candle_core::Device;
use longspan_agents::LocalModel;
use longspan_infer::Engine;
use longspan_nn::model::{Precision, TextEncoder};
use longspan_nn::weights::Checkpoint;
use longspan_serve::{ServeOptions, Server};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let path = words.first().ok_or("name a model")?;
    let checkpoint = Checkpoint::open(Path::new(path))?;
    let network = checkpoint.network(Precision::Packed, &Device::Cpu)?;
    let engine = Engine::new(network, checkpoint.fingerprint.to_string())?;
    let model = Arc::new(LocalModel::new(engine, checkpoint.tokenizer)?);
    let name = Path::new(path).file_stem().unwrap_or_default();
    let mut options = ServeOptions::new(name.to_string_lossy());
    if let Some(address) = words.get(1) {
        options.address = address.parse()?;
    }
    let embedder = match words.get(2) {
        Some(path) => Some(Arc::new(TextEncoder::open(
            Path::new(path),
            Precision::Packed,
            &Device::Cpu,
        )?)),
        None => None,
    };
    let server = Server::start(model, embedder, options)?;
    println!("http://{}/", server.address());
    // Until standard input ends.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    server.stop();
    Ok(())
}
