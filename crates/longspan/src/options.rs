//! Options that several commands share, in groups: a command takes the group that it reads, and refuses the rest.

use crate::settings::Settings;
use anyhow::Result;
use clap::{Args, ValueEnum};
use longspan_nn::position::RopeOverride;

/// What the command line and the settings file say, together.
#[derive(Clone, Default)]
pub struct Common {
    pub model: Option<String>,
    pub context: Option<String>,
    pub rope: Option<RopeOverride>,
    pub kv: Option<String>,
    pub precision: Option<Precision>,
    pub device: Option<DeviceKind>,
    pub threads: Option<usize>,
    pub max_tokens: Option<usize>,
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Fast,
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Cpu,
    Cuda,
}

/// A group of options that stands above the settings file.
pub trait Options: Args {
    /// Puts what was given over what the file says.
    fn over(&self, common: &mut Common);
}

/// A command's own arguments beside a group of shared options.
#[derive(Args)]
pub struct With<O: Options, A: Args> {
    #[command(flatten)]
    pub args: A,
    #[command(flatten)]
    pub options: O,
}

/// What stands above every command: the settings file and the form of the output.
pub struct Above {
    settings: Settings,
    json: bool,
}

impl Above {
    /// Reads the settings file. Errors name it and the key.
    pub fn load(json: bool) -> Result<Above> {
        let settings = Settings::load()?;
        Ok(Above { settings, json })
    }

    /// What a command sees that reads no shared option.
    pub fn plain(&self) -> Common {
        let mut common = self.settings.common();
        common.json = self.json;
        common
    }

    /// What a command sees that reads these. The number of threads is set here.
    pub fn with(&self, options: &impl Options) -> Result<Common> {
        self.with_jobs(options, |_| false)
    }

    /// The same for a command that may run jobs side by side, with one thread of the tensor library each.
    pub fn with_jobs(
        &self,
        options: &impl Options,
        one_each: impl Fn(&Common) -> bool,
    ) -> Result<Common> {
        let mut common = self.plain();
        options.over(&mut common);
        if let Some(threads) = common.threads {
            if threads == 0 {
                anyhow::bail!("--threads is 0, expected at least 1");
            }
            longspan_kernels::pool::Pool::request_threads(threads);
        }
        let cores = || longspan_kernels::cpu::allowed_cpus().len();
        let threads = match one_each(&common) {
            true => 1,
            false => common.threads.unwrap_or_else(cores),
        };
        // SAFETY: commands read their options before they start a thread.
        unsafe { longspan_kernels::cpu::bound_tensor_pools(threads) };
        Ok(common)
    }
}

/// Lets what was given stand over what there is.
fn put<T: Clone>(given: &Option<T>, place: &mut Option<T>) {
    if given.is_some() {
        place.clone_from(given);
    }
}

#[derive(Args, Default)]
pub struct ThreadsOption {
    /// CPU threads; default all cores this process may use
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Options for ThreadsOption {
    fn over(&self, common: &mut Common) {
        put(&self.threads, &mut common.threads);
    }
}

#[derive(Args, Default)]
pub struct ModelOption {
    /// Alias, GGUF file, Hugging Face folder, or hub id (org/name)
    #[arg(long, short, value_name = "MODEL")]
    model: Option<String>,
}

impl Options for ModelOption {
    fn over(&self, common: &mut Common) {
        put(&self.model, &mut common.model);
    }
}

#[derive(Args, Default)]
pub struct KvOption {
    /// Type of cached keys and values: f16, bf16, int8, f32; default f16, bf16 on CPUs with AMX
    #[arg(long, value_name = "TYPE")]
    kv: Option<String>,
}

impl Options for KvOption {
    fn over(&self, common: &mut Common) {
        put(&self.kv, &mut common.kv);
    }
}

#[derive(Args, Default)]
pub struct PrecisionOption {
    /// fast: packed weights and fused kernels; f32: the exact reference path
    #[arg(long)]
    precision: Option<Precision>,
}

impl Options for PrecisionOption {
    fn over(&self, common: &mut Common) {
        put(&self.precision, &mut common.precision);
    }
}

/// Of commands that work on made-up keys and values.
#[derive(Args, Default)]
pub struct KeysOptions {
    #[command(flatten)]
    kv: KvOption,
    #[command(flatten)]
    threads: ThreadsOption,
}

impl Options for KeysOptions {
    fn over(&self, common: &mut Common) {
        self.kv.over(common);
        self.threads.over(common);
    }
}

/// Of commands that train.
#[derive(Args, Default)]
pub struct TrainOptions {
    #[command(flatten)]
    threads: ThreadsOption,
    /// cpu, or cuda in a build with that feature
    #[arg(long)]
    device: Option<DeviceKind>,
}

impl Options for TrainOptions {
    fn over(&self, common: &mut Common) {
        self.threads.over(common);
        put(&self.device, &mut common.device);
    }
}

/// The types that a model is trained in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Numbers {
    /// f32 throughout
    #[default]
    F32,
    /// f32, matrix products in TF32 (GPU)
    Tf32,
    /// Weights and activations in bf16, f32 copies of the weights in the optimiser (GPU)
    Bf16,
}

/// Of commands that run an embedder alone.
#[derive(Args, Default)]
pub struct EmbedOptions {
    #[command(flatten)]
    precision: PrecisionOption,
    #[command(flatten)]
    threads: ThreadsOption,
}

impl Options for EmbedOptions {
    fn over(&self, common: &mut Common) {
        self.precision.over(common);
        self.threads.over(common);
    }
}

/// Of commands that run a model under policies of their own.
#[derive(Args, Default)]
#[command(next_help_heading = "Model")]
pub struct LoadOptions {
    #[command(flatten)]
    model: ModelOption,
    /// Another rotary rule than the model's own, to read past its window: linear:FACTOR, power:EXPONENT,
    /// truncated:TOKENS, ntk:FACTOR, dynamic:FACTOR[,keys=kept], yarn:FACTOR[:ORIGINAL], longrope:FILE,
    /// llama3:FACTOR[:ORIGINAL], abf:BASE, xpos[:SCALE_BASE], clex:FOLDER, clex-init[:MAX_FACTOR];
    /// linear, power and truncated combine with `+`, and abf and xpos with anything
    #[arg(long, value_name = "RULE")]
    rope: Option<RopeOverride>,
    #[command(flatten)]
    kv: KvOption,
    #[command(flatten)]
    precision: PrecisionOption,
    /// cpu, or cuda in a build with that feature
    #[arg(long)]
    device: Option<DeviceKind>,
    #[command(flatten)]
    threads: ThreadsOption,
}

impl Options for LoadOptions {
    fn over(&self, common: &mut Common) {
        self.model.over(common);
        put(&self.rope, &mut common.rope);
        self.kv.over(common);
        self.precision.over(common);
        put(&self.device, &mut common.device);
        self.threads.over(common);
    }
}

/// Of commands that run a model.
#[derive(Args, Default)]
#[command(next_help_heading = "Model")]
pub struct RunOptions {
    #[command(flatten)]
    load: LoadOptions,
    /// What a long text's later tokens see: auto, full, window:N, sinks:N_INIT,N_LOCAL,
    /// lm-infinite:LOCAL,GLOBAL,TOP_K, infllm:n_local=..,block=..,topk=.., sirllm:top=..,decay=..,
    /// h2o:HEAVY,RECENT, span:full=bottom-N,local=window-SIZE, squeezed:PERCENTILE,LOWER,
    /// hip:k=..,beams=..,refresh=.., cmr:WINDOW,CAPACITY
    #[arg(long, value_name = "POLICY")]
    context: Option<String>,
}

impl Options for RunOptions {
    fn over(&self, common: &mut Common) {
        self.load.over(common);
        put(&self.context, &mut common.context);
    }
}
