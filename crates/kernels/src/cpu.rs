//! Which instructions this process may use, decided once at run time.
//!
//! `LONGSPAN_CPU=portable|avx2|avx512|amx` forces a lower level, so that every path can be
//! tested on one machine. A level the CPU lacks is refused by [`Level::forced`].
//!
//! Beside it what else a process settles about its machine at start: the CPUs it may use, the threads of
//! the tensor library, and whether freed memory is kept.

use std::sync::OnceLock;

/// Dispatch level, lowest first: a kernel written for one level runs on all higher ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust, any CPU.
    Portable,
    /// AVX2 + FMA + F16C.
    Avx2,
    /// AVX-512 F/BW/DQ/VL/VBMI with VNNI and BF16.
    Avx512,
    /// AVX-512 as above plus AMX tiles (bf16 and int8).
    Amx,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Amx];

    /// The name used by `LONGSPAN_CPU`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Amx => "amx",
        }
    }

    /// The best level this CPU and kernel offer.
    pub fn detected() -> Level {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    /// The levels this CPU can run, lowest first.
    pub fn available() -> impl Iterator<Item = Level> {
        Level::ALL
            .into_iter()
            .filter(|&level| level <= Level::detected())
    }

    /// The level in force: `LONGSPAN_CPU` when set and possible, else the detected one.
    pub fn current() -> Level {
        static CURRENT: OnceLock<Level> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            Level::forced()
                .ok()
                .flatten()
                .unwrap_or_else(Level::detected)
        })
    }

    /// Reads `LONGSPAN_CPU`. Errors name the value found and the values this CPU accepts;
    /// a program calls this at start so that a typing error is not silently ignored.
    pub fn forced() -> Result<Option<Level>, String> {
        let Ok(value) = std::env::var("LONGSPAN_CPU") else {
            return Ok(None);
        };
        let accepted = Level::available()
            .map(Level::name)
            .collect::<Vec<_>>()
            .join(", ");
        match Level::ALL.into_iter().find(|level| level.name() == value) {
            Some(level) if level <= Level::detected() => Ok(Some(level)),
            _ => Err(format!(
                "LONGSPAN_CPU is {value:?}; this CPU accepts: {accepted}"
            )),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    macro_rules! has { ($($f:tt),+) => { $(std::is_x86_feature_detected!($f))&&+ } }
    if !has!("avx2", "fma", "f16c") {
        return Level::Portable;
    }
    if !has!(
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512vbmi",
        "avx512vnni",
        "avx512bf16"
    ) {
        return Level::Avx2;
    }
    if amx_granted() {
        Level::Amx
    } else {
        Level::Avx512
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Asks Linux for the AMX tile state (needed once per process) after checking CPUID for
/// AMX-TILE, AMX-INT8 and AMX-BF16.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_granted() -> bool {
    let leaf7 = core::arch::x86_64::__cpuid_count(7, 0);
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    if leaf7.edx & (BF16 | TILE | INT8) != BF16 | TILE | INT8 {
        return false;
    }
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a plain system call that only changes this process's permitted state.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_granted() -> bool {
    false
}

/// The CPUs this process may run on: its affinity mask, cut to its cgroup's quota.
pub fn allowed_cpus() -> Vec<usize> {
    let mut cpus = affinity();
    if let Some(quota) = cgroup_quota() {
        cpus.truncate(quota.max(1));
    }
    cpus
}

#[cfg(target_os = "linux")]
fn affinity() -> Vec<usize> {
    // SAFETY: `set` is plain memory of the size passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, std::mem::size_of_val(&set), &mut set) == 0 {
            let cpus: Vec<usize> = (0..libc::CPU_SETSIZE as usize)
                .filter(|&cpu| libc::CPU_ISSET(cpu, &set))
                .collect();
            if !cpus.is_empty() {
                return cpus;
            }
        }
    }
    fallback_cpus()
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Vec<usize> {
    fallback_cpus()
}

fn fallback_cpus() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

/// Whole CPUs of the cgroup's quota (v2 `cpu.max`, v1 `cpu.cfs_*`), rounded up.
fn cgroup_quota() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let (quota, period) = match read("/sys/fs/cgroup/cpu.max") {
        Some(text) => {
            let mut words = text.split_whitespace();
            (
                words.next()?.parse::<f64>().ok()?,
                words.next()?.parse::<f64>().ok()?,
            )
        }
        None => {
            let number = |path| read(path)?.trim().parse::<f64>().ok();
            (
                number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")?,
                number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")?,
            )
        }
    };
    (quota > 0.0 && period > 0.0).then(|| (quota / period).ceil() as usize)
}

/// Ties the calling thread to one CPU. Does nothing where the system has no such call.
pub fn pin_current_thread(cpu: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: `set` is plain memory of the size passed.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpu;
}

/// Gives the tensor library's own pools so many threads, where the environment says nothing (`CANDLE_NUM_THREADS`,
/// `RAYON_NUM_THREADS`). By itself it takes the machine's cores, also those that this process may not use, and its threads
/// spin for each other: a process bound to one core then spends most of its time waiting.
///
/// # Safety
/// Call before there is a second thread: the environment is changed.
pub unsafe fn bound_tensor_pools(threads: usize) {
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if std::env::var_os(name).is_none() {
            std::env::set_var(name, threads.max(1).to_string());
        }
    }
}

/// Lets the allocator keep what is freed instead of giving it back to the system: a training step asks for the same sizes
/// again and again, and fresh pages cost more than the arithmetic of a small model.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: plain settings of the C library's allocator.
    unsafe {
        // The largest threshold that is taken: half of what a thread's arena may grow by.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Gives the system the memory that [`keep_freed_memory`] held back: before the use of memory is measured.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: frees what no allocation uses.
    unsafe {
        libc::malloc_trim(0);
    }
}
