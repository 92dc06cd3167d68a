//! Opens a GPU.

use anyhow::{Context, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{result, sys};

/// The first GPU. All threads share one stream: candle's default device gives each thread a stream of its own, and a
/// training, whose ranks are threads, then reads what another stream has not written yet, or waits for it for ever.
pub fn open() -> Result<Device> {
    let device = Device::new_cuda_with_stream(0).context("--device cuda")?;
    if let Device::Cuda(cuda) = &device {
        let stream = cuda.cuda_stream();
        // SAFETY: there is one stream, so its order is that of all uses; nothing was allocated before.
        unsafe { cuda.disable_event_tracking() };
        // Freed memory stays with the process; by default every wait for the GPU gives it back to the driver.
        let keep = u64::MAX;
        let kind = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: a device that was opened above; the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(stream.context().cu_device())?;
            result::mem_pool::set_attribute(
                pool,
                kind,
                std::ptr::from_ref(&keep).cast_mut().cast(),
            )?;
        }
    }
    Ok(device)
}
