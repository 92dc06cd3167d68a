//! Kernels of our own for training on a GPU, where a profile showed that compositions lose: each does in one pass over its
//! tensors what takes five to ten operations composed. The compositions stay, for other types and as their twins.
//!
//! A source is compiled when the first of its kernels is asked for, by NVIDIA's run-time compiler (NVRTC).

use candle_core::{Result, Shape, Tensor};

pub(crate) mod fft;

/// Kernels that are compiled together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) enum Module {
    /// Those of `kernels.cu`.
    Plain,
    /// Those of `fft.cu` for transforms of 2^log points, and for tensors of bf16 (else f32).
    Fft { log: u32, narrow: bool },
}

/// What is written: shape, and whether it is f32 (else of the inputs' type).
pub(crate) type Output = (Shape, bool);

/// A kernel's name without its type (that of the first input), its scalars in order, and how it is laid out.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Launch {
    pub(crate) name: &'static str,
    pub(crate) ints: Vec<usize>,
    pub(crate) float: Option<f64>,
    pub(crate) grid: (usize, usize),
    pub(crate) block: (usize, usize),
    /// Bytes of shared memory.
    pub(crate) shared: usize,
}

/// Threads of a block in kernels of one element a thread, and the most where a block has a row.
const THREADS: usize = 256;

impl Launch {
    /// A block for each of `rows` of `width` elements: about eight elements a thread, since a block waits for its sums.
    pub(crate) fn rows(
        name: &'static str,
        (rows, width): (usize, usize),
        ints: &[usize],
        float: f64,
    ) -> Self {
        let threads = (width / 8).next_power_of_two().clamp(32, THREADS);
        Launch {
            name,
            ints: ints.to_vec(),
            float: Some(float),
            grid: (rows, 1),
            block: (threads, 1),
            shared: 0,
        }
    }

    /// A thread for each of `count` elements.
    pub(crate) fn elements(name: &'static str, count: usize, ints: &[usize]) -> Self {
        Launch {
            name,
            ints: ints.to_vec(),
            float: None,
            grid: (count.div_ceil(THREADS).clamp(1, 1 << 16), 1),
            block: (THREADS, 1),
            shared: 0,
        }
    }
}

/// Whether kernels run on these tensors: all on a GPU, contiguous, of one type, f32 or bf16, and not too large for 32-bit indices.
pub(crate) fn fits(tensors: &[&Tensor]) -> bool {
    cfg!(feature = "cuda")
        && tensors.iter().all(|t| {
            t.device().is_cuda()
                && t.is_contiguous()
                && t.dtype() == tensors[0].dtype()
                && matches!(
                    t.dtype(),
                    candle_core::DType::F32 | candle_core::DType::BF16
                )
                && (1..1 << 31).contains(&t.elem_count())
        })
}

/// Runs a kernel with one output of the inputs' type.
pub(crate) fn one(launch: Launch, inputs: &[&Tensor], shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(run(launch, inputs, vec![(shape.into(), false)])?.remove(0))
}

/// Σ over all axes but the last, in f32: x [.., width] to [width].
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count() / width.max(1);
    let mut sum = x.reshape((rows, width))?;
    // Blocks of rows, then the sums of blocks.
    loop {
        let rows = sum.dim(0)?;
        let of_block = rows.div_ceil(128).max(64);
        let blocks = rows.div_ceil(of_block).max(1);
        let launch = Launch {
            name: "sum_rows",
            ints: vec![rows, width, of_block],
            float: None,
            grid: (width.div_ceil(32), blocks),
            block: (32, 8),
            shared: 0,
        };
        let mut out = run(launch, &[&sum], vec![((blocks, width).into(), true)])?;
        sum = out.remove(0);
        if blocks == 1 {
            return sum.reshape(width);
        }
    }
}

/// Runs a kernel of `kernels.cu`: addresses of inputs, of outputs, integers, the float.
pub(crate) fn run(launch: Launch, inputs: &[&Tensor], outputs: Vec<Output>) -> Result<Vec<Tensor>> {
    run_of(Module::Plain, launch, inputs, outputs)
}

#[cfg(feature = "cuda")]
pub(crate) use device::{has_shared, run_of, take_over};

/// Whether blocks on this tensor's GPU can have so many bytes of shared memory.
#[cfg(not(feature = "cuda"))]
pub(crate) fn has_shared(_: &Tensor, _: usize) -> bool {
    false
}

/// Without the feature no tensor [`fits`].
#[cfg(not(feature = "cuda"))]
pub(crate) fn run_of(
    _: Module,
    launch: Launch,
    _: &[&Tensor],
    _: Vec<Output>,
) -> Result<Vec<Tensor>> {
    candle_core::bail!(
        "{}: this program was built without the feature cuda",
        launch.name
    )
}

/// The memory of a tensor that is not needed any more, unless one of `inputs` shares it or it is a part of something larger.
#[cfg(not(feature = "cuda"))]
pub(crate) fn take_over(_: &Tensor, _: &[Tensor]) -> Result<Option<candle_core::CudaStorage>> {
    Ok(None)
}

#[cfg(feature = "cuda")]
mod device {
    use super::{Launch, Module, Output};
    use candle_core::backend::{BackendDevice, BackendStorage};
    use candle_core::cuda_backend::cudarc::driver::sys::{
        CUdevice_attribute, CUfunction_attribute,
    };
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
    use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
    use candle_core::op::BackpropOp;
    use candle_core::{
        CpuStorage, CudaStorage, DType, Error, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
        bail,
    };
    use std::sync::{Arc, Mutex};

    /// What a block has of shared memory without being asked to.
    const SHARED: usize = 48 << 10;

    fn code(module: Module) -> Result<Arc<str>> {
        type Code = std::result::Result<Arc<str>, String>;
        static MADE: Mutex<Vec<(Module, Code)>> = Mutex::new(Vec::new());
        let mut made = MADE.lock().unwrap_or_else(|e| e.into_inner());
        let found = made.iter().find(|(m, _)| *m == module);
        let code = match found.map(|(_, code)| code.clone()) {
            Some(code) => code,
            None => {
                let code = compile_ptx(source(module));
                let code = code.map(|code| code.to_src().into());
                let code = code.map_err(|e| e.to_string());
                made.push((module, code.clone()));
                code
            }
        };
        code.or_else(|error| bail!("the GPU's kernels do not compile: {error}"))
    }

    fn source(module: Module) -> String {
        let elements = include_str!("elements.cu");
        match module {
            Module::Plain => format!("{elements}{}", include_str!("kernels.cu")),
            Module::Fft { log, narrow } => {
                let (element, kind) = if narrow {
                    ("bf16", "bf16")
                } else {
                    ("float", "f32")
                };
                format!(
                    "#define LOG {log}\n#define ELEMENT {element}\n#define KIND {kind}\n{elements}{}",
                    include_str!("fft.cu")
                )
            }
        }
    }

    /// As the stand-in above says.
    pub(crate) fn has_shared(x: &Tensor, bytes: usize) -> bool {
        let most = x.device().as_cuda_device().ok().and_then(|device| {
            let stream = device.cuda_stream();
            let what = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            stream.context().attribute(what).ok()
        });
        most.is_some_and(|most| bytes as i64 <= i64::from(most))
    }

    /// Where a tensor's elements begin. Uses of it stay in the order of the one stream that all of the program shares.
    fn address(storage: &CudaStorage, offset: usize) -> Result<u64> {
        let bytes = (offset * storage.dtype().size_in_bytes()) as u64;
        Ok(bytes
            + match storage.dtype() {
                DType::F32 => {
                    let slice = storage.as_cuda_slice::<f32>()?;
                    slice.device_ptr(slice.stream()).0
                }
                DType::BF16 => {
                    let slice = storage.as_cuda_slice::<half::bf16>()?;
                    slice.device_ptr(slice.stream()).0
                }
                other => bail!("found {other:?}, expected F32 or BF16"),
            })
    }

    /// Runs a kernel of a module, as [`super::run`].
    pub(crate) fn run_of(
        module: Module,
        launch: Launch,
        inputs: &[&Tensor],
        outputs: Vec<Output>,
    ) -> Result<Vec<Tensor>> {
        let device = inputs[0].device().as_cuda_device()?.clone();
        let dtype = inputs[0].dtype();
        let mut addresses = Vec::new();
        for input in inputs {
            let (storage, layout) = input.storage_and_layout();
            match &*storage {
                Storage::Cuda(storage) => {
                    addresses.push(address(storage, layout.start_offset())?);
                }
                _ => bail!("{}: a tensor is not on the GPU", launch.name),
            }
        }
        let mut made = Vec::new();
        for (shape, wide) in outputs {
            let dtype = if wide { DType::F32 } else { dtype };
            // SAFETY: every kernel writes all of its outputs.
            let storage = unsafe { device.alloc_uninit(&shape, dtype)? };
            addresses.push(address(&storage, 0)?);
            made.push((storage, shape));
        }
        let kind = if dtype == DType::BF16 { "bf16" } else { "f32" };
        let name = format!("{}_{kind}", launch.name);
        let loaded = format!("longspan {module:?}");
        let function = device.get_or_load_custom_func(&name, &loaded, &code(module)?)?;
        if launch.shared > SHARED {
            let what = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared as i32;
            function.set_attribute(what, bytes).map_err(Error::wrap)?;
        }
        let ints: Vec<u32> = launch
            .ints
            .iter()
            .map(|&i| i.min(u32::MAX as usize) as u32)
            .collect();
        let float = launch.float.map(|x| x as f32);
        let mut builder = function.builder();
        for address in &addresses {
            builder.arg(address);
        }
        for int in &ints {
            builder.arg(int);
        }
        if let Some(float) = &float {
            builder.arg(float);
        }
        let config = LaunchConfig {
            grid_dim: (launch.grid.0 as u32, launch.grid.1 as u32, 1),
            block_dim: (launch.block.0 as u32, launch.block.1 as u32, 1),
            shared_mem_bytes: launch.shared as u32,
        };
        // SAFETY: the arguments are those of the kernel, whose reads and writes stay inside tensors of these sizes.
        unsafe { builder.launch(config) }.map_err(Error::wrap)?;
        let tensors = made.into_iter().map(|(storage, shape)| {
            Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
        });
        Ok(tensors.collect())
    }

    /// As the stand-in above says.
    pub(crate) fn take_over(value: &Tensor, inputs: &[Tensor]) -> Result<Option<CudaStorage>> {
        // Memory and elements held; none: not of a GPU or of another type.
        let held = |x: &Tensor| -> Result<Option<(u64, usize)>> {
            let (storage, _) = x.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                return Ok(None);
            };
            let count = match storage.dtype() {
                DType::F32 => storage.as_cuda_slice::<f32>()?.len(),
                DType::BF16 => storage.as_cuda_slice::<half::bf16>()?.len(),
                _ => return Ok(None),
            };
            Ok(Some((address(storage, 0)?, count)))
        };
        let Some((own, count)) = held(value)? else {
            return Ok(None);
        };
        if value.layout().start_offset() != 0 || count != value.elem_count() {
            return Ok(None);
        }
        for input in inputs {
            if held(input)?.is_some_and(|(memory, _)| memory == own) {
                return Ok(None);
            }
        }
        let taken = Take(Mutex::new(None));
        value.inplace_op1(&taken)?;
        Ok(taken.0.into_inner().unwrap_or_else(|e| e.into_inner()))
    }

    /// Leaves one element in place of the memory.
    struct Take(Mutex<Option<CudaStorage>>);

    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "take over"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
            bail!("take over: found a tensor of the CPU, expected one of a GPU")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
            let device = storage.device().clone();
            // SAFETY: nothing reads it.
            let empty = unsafe { device.alloc_uninit(&Shape::from(1), storage.dtype())? };
            let mut taken = self.0.lock().unwrap_or_else(|e| e.into_inner());
            *taken = Some(std::mem::replace(storage, empty));
            Ok(())
        }
    }
}
