//! Finding, downloading, opening and describing models.

use crate::options::{Common, DeviceKind, Numbers, Precision};
use crate::ui;
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use indicatif::ProgressBar;
use longspan_agents::LocalModel;
use longspan_infer::Engine;
use longspan_nn::hub::{self, Event, Progress, Stage};
use longspan_nn::model::Precision as Weights;
use longspan_nn::position::{LayerRopes, RopeOverride};
use longspan_nn::weights::Checkpoint;
use longspan_train::config::Place;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The model that the options name, else the catalogue's default.
fn named(common: &Common) -> Result<String> {
    if let Some(name) = &common.model {
        return Ok(name.clone());
    }
    let hub = hub::Hub::from_env()?;
    let default = hub.catalogue().default.clone();
    default.context("no model is named and the catalogue has no default; name one with --model")
}

/// Draws a pull's steps on standard error.
struct Bars {
    quiet: bool,
    current: Mutex<Option<(String, ProgressBar)>>,
}

impl Bars {
    fn new(quiet: bool) -> Self {
        Bars {
            quiet,
            current: Mutex::new(None),
        }
    }
}

impl Progress for Bars {
    fn update(&self, event: &Event<'_>) {
        let what = match event.stage {
            Stage::Waiting => "waiting for another pull of",
            Stage::Downloading => "downloading",
            Stage::Unpacking => "unpacking",
            Stage::Verifying => "verifying",
            Stage::Done => "done",
        };
        let mut current = self
            .current
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let message = format!("{what} {} ({})", event.file, event.source);
        if current.as_ref().is_none_or(|(shown, _)| *shown != message) {
            if let Some((_, bar)) = current.take() {
                bar.finish_and_clear();
            }
            let bar = ui::bar(event.total.unwrap_or(0), "bytes", self.quiet);
            bar.set_message(message.clone());
            *current = Some((message, bar));
        }
        if let Some((_, bar)) = current.as_ref() {
            bar.set_position(event.done);
        }
    }

    fn notice(&self, model: &str, text: &str) {
        eprintln!("{model}: {text}");
    }

    fn source_failed(&self, model: &str, source: &str, reason: &str) {
        eprintln!("{model}: {source} failed: {reason}; trying the next source");
    }

    fn cancelled(&self) -> bool {
        ui::interrupted()
    }
}

/// The file or folder of a model, downloaded if need be.
pub fn obtain(spec: &str, quiet: bool) -> Result<PathBuf> {
    let bars = Bars::new(quiet);
    let path = hub::obtain(spec, &bars);
    if let Some((_, bar)) = bars
        .current
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner())
    {
        bar.finish_and_clear();
    }
    match path {
        Err(_) if ui::interrupted() => Err(ui::Interrupted(
            "what was downloaded is kept; run the same command to go on".into(),
        )
        .into()),
        path => Ok(path?),
    }
}

/// `longspan pull`
pub fn pull(models: &[String], common: &Common) -> Result<()> {
    let default = named(common)?;
    let models = if models.is_empty() {
        std::slice::from_ref(&default)
    } else {
        models
    };
    for model in models {
        let path = obtain(model, common.json)?;
        match common.json {
            true => println!("{}", serde_json::json!({ "model": model, "path": path })),
            false => println!("{}", path.display()),
        }
    }
    Ok(())
}

/// `longspan models`
pub fn list(common: &Common) -> Result<()> {
    for row in hub::list()? {
        if common.json {
            let line = serde_json::json!({
                "alias": row.alias, "description": row.description, "licence": row.licence,
                "bytes": row.size, "pulled": row.pulled, "path": row.path, "default": row.is_default,
            });
            println!("{line}");
        } else {
            let state = if row.pulled { "here" } else { "-" };
            let mark = if row.is_default { "*" } else { " " };
            println!(
                "{mark} {:<20} {:>9}  {:<5} {:<22} {}",
                row.alias,
                ui::bytes(row.size),
                state,
                row.licence,
                row.description
            );
        }
    }
    Ok(())
}

/// A model opened for use.
pub struct Opened {
    /// Text to text.
    pub model: LocalModel,
    /// As the person named it.
    pub name: String,
    /// Its file or folder.
    pub path: PathBuf,
    /// Time to map, pack and compile it.
    pub load: Duration,
}

impl Opened {
    /// What clients of a server call it, and other names that mean it: a path becomes the name of its file.
    pub fn friendly(&self) -> (String, Vec<String>) {
        let stem = match self.path.is_dir() {
            true => self.path.file_name(),
            false => self.path.file_stem(),
        };
        let stem = stem.map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        let last = self.name.rsplit('/').next().unwrap_or("").to_string();
        let is_path = Path::new(&self.name).exists();
        let name = match is_path && !stem.is_empty() {
            true => stem.clone(),
            false => self.name.clone(),
        };
        let mut others = Vec::new();
        for other in [self.name.clone(), stem, last] {
            if !other.is_empty() && other != name && !others.contains(&other) {
                others.push(other);
            }
        }
        (name, others)
    }
}

/// Opens the model that the options name, downloading it if need be.
pub fn open(common: &Common) -> Result<Opened> {
    let name = named(common)?;
    let path = obtain(&name, common.json)?;
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&path)?;
    let device = device(common)?;
    let weights = match (common.precision.unwrap_or(Precision::Fast), device.is_cpu()) {
        (Precision::Fast, true) => Weights::Packed,
        (Precision::Fast, false) => Weights::Dense(DType::BF16),
        (Precision::F32, _) => Weights::Dense(DType::F32),
    };
    longspan_kernels::pool::Pool::global().pin_caller();
    let network = checkpoint
        .network(weights, &device)
        .with_context(|| format!("{}", path.display()))?;
    let fingerprint = checkpoint.fingerprint.to_string();
    let engine = match rope(common, &checkpoint, &path)? {
        Some(rope) => Engine::with_rope(network, &fingerprint, rope)?,
        None => Engine::new(network, fingerprint)?,
    };
    let model = LocalModel::new(engine, checkpoint.tokenizer)?;
    Ok(Opened {
        model,
        name,
        path,
        load: start.elapsed(),
    })
}

/// The rotary rule that the options name, or the one that a checkpoint tuned with CLEX carries.
fn rope(common: &Common, checkpoint: &Checkpoint, path: &Path) -> Result<Option<RopeOverride>> {
    let own = LayerRopes::needs_clex(&checkpoint.config).then(|| RopeOverride::clex(path));
    let rope = common.rope.clone().or(own);
    Ok(rope.map(RopeOverride::with_absolute_paths).transpose()?)
}

/// Where a model is trained, in these types.
pub fn place(common: &Common, numbers: Numbers) -> Result<Place> {
    let device = device(common)?;
    if device.is_cpu() && numbers != Numbers::F32 {
        anyhow::bail!(
            "--numbers {numbers:?}: found the CPU, which trains in f32; expected --device cuda"
        );
    }
    candle_core::cuda::set_gemm_reduced_precision_f32(numbers == Numbers::Tf32);
    let dtype = match numbers {
        Numbers::Bf16 => DType::BF16,
        _ => DType::F32,
    };
    Ok(Place { device, dtype })
}

/// The device that the options name.
pub fn device(common: &Common) -> Result<Device> {
    match common.device.unwrap_or(DeviceKind::Cpu) {
        DeviceKind::Cpu => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => crate::cuda::open(),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => anyhow::bail!(
            "--device cuda: this build has no CUDA; build with scripts/cuda-toolkit.sh and `cargo build --release --features cuda`"
        ),
    }
}

/// `longspan info`
pub fn info(common: &Common) -> Result<()> {
    let name = named(common)?;
    let path = obtain(&name, common.json)?;
    let checkpoint = Checkpoint::open(&path)?;
    let c = &checkpoint.config;
    let sliding = c
        .layers
        .iter()
        .filter(|layer| layer.sliding_window.is_some())
        .count();
    let value = serde_json::json!({
        "model": name,
        "path": path,
        "architecture": format!("{:?}", c.architecture),
        "layers": c.num_layers,
        "sliding_layers": sliding,
        "hidden_size": c.hidden_size,
        "heads": c.num_heads,
        "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocabulary": c.vocab_size,
        "window_tokens": c.context_length,
        "kv_bytes_per_token_bf16": 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim,
        "chat_template": checkpoint.tokenizer.chat_template().is_some(),
        "fingerprint": checkpoint.fingerprint.to_string(),
    });
    if common.json {
        println!("{value}");
    } else {
        for (key, value) in value.as_object().into_iter().flatten() {
            println!(
                "{key:<24} {}",
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_string)
            );
        }
    }
    Ok(())
}
