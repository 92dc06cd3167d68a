//! The thread pool of all kernels: one worker per allowed CPU, fork-join in a few microseconds.
//!
//! Decoding a token forks and joins some hundred times, so workers spin for a while before they
//! sleep. The caller works too: a pool of `n` threads has `n - 1` workers.

use crate::cpu;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// Iterations a worker spins for new work before it sleeps (about 100 microseconds).
const SPINS: usize = 6_000;

/// What a job needs, by cache line: a worker that spins pays one transfer to start and one to end.
#[repr(C, align(128))]
struct Shared {
    call: Call,
    /// Workers that have not finished the job.
    pending: Padded<AtomicUsize>,
    sleepers: Padded<AtomicUsize>,
    panicked: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

#[repr(C, align(128))]
struct Call {
    /// Number of the job now published; workers compare it with the last one they ran.
    epoch: AtomicUsize,
    /// Written before `epoch`, and not before every worker has finished the job before.
    task: UnsafeCell<Option<Task<'static>>>,
}

#[repr(C, align(128))]
struct Padded<T>(T);

// SAFETY: `task` is written by the one caller while no worker runs, and read after `epoch`.
unsafe impl Sync for Shared {}

/// A fixed set of pinned worker threads. See the module's text.
pub struct Pool {
    shared: Arc<Shared>,
    threads: usize,
    cpus: Vec<usize>,
    caller: Mutex<()>,
}

static REQUESTED: AtomicUsize = AtomicUsize::new(0);
static GLOBAL: OnceLock<Pool> = OnceLock::new();

thread_local! {
    static INSIDE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    static ALONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

impl Pool {
    /// Sets the number of threads (0 = all allowed CPUs). Returns false, changing nothing, when
    /// the pool already runs.
    pub fn request_threads(threads: usize) -> bool {
        REQUESTED.store(threads, Ordering::SeqCst);
        GLOBAL.get().is_none()
    }

    /// The process-wide pool, started at first use.
    pub fn global() -> &'static Pool {
        GLOBAL.get_or_init(|| {
            let cpus = cpu::allowed_cpus();
            let requested = REQUESTED.load(Ordering::SeqCst);
            let threads = if requested == 0 {
                cpus.len()
            } else {
                requested
            };
            Pool::new(threads, cpus)
        })
    }

    fn new(threads: usize, cpus: Vec<usize>) -> Pool {
        let shared = Arc::new(Shared {
            call: Call {
                epoch: AtomicUsize::new(0),
                task: UnsafeCell::new(None),
            },
            pending: Padded(AtomicUsize::new(0)),
            sleepers: Padded(AtomicUsize::new(0)),
            panicked: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        for worker in 1..threads {
            let shared = shared.clone();
            let cpu = (threads <= cpus.len()).then(|| cpus[worker]);
            std::thread::Builder::new()
                .name(format!("longspan-{worker}"))
                .spawn(move || {
                    if let Some(cpu) = cpu {
                        cpu::pin_current_thread(cpu);
                    }
                    work(&shared, worker);
                })
                .expect("the system refuses a thread");
        }
        Pool {
            shared,
            threads,
            cpus,
            caller: Mutex::new(()),
        }
    }

    /// Threads that take part in a job, the caller among them.
    pub fn threads(&self) -> usize {
        if ALONE.get() { 1 } else { self.threads }
    }

    /// Runs `work` with every kernel that it calls on the calling thread alone: for many small models side by side, each on
    /// a thread of its own.
    pub fn alone<R>(work: impl FnOnce() -> R) -> R {
        struct Back(bool);
        impl Drop for Back {
            fn drop(&mut self) {
                ALONE.set(self.0);
            }
        }
        let _back = Back(ALONE.replace(true));
        work()
    }

    /// Whether kernels called here stay on this thread, by [`alone`](Self::alone).
    pub fn is_alone() -> bool {
        ALONE.get()
    }

    /// Ties the calling thread to the CPU that no worker uses. Call once on the thread that
    /// drives the engine.
    pub fn pin_caller(&self) {
        if self.threads <= self.cpus.len() {
            cpu::pin_current_thread(self.cpus[0]);
        }
    }

    /// Runs `task(worker)` once for each worker `0..threads()` and returns when all are done.
    /// Called from inside a job it runs all workers' shares one after another.
    pub fn broadcast(&self, task: &(dyn Fn(usize) + Sync)) {
        if self.threads == 1 || INSIDE.get() || ALONE.get() {
            (0..self.threads()).for_each(task);
            return;
        }
        let _one_caller = self
            .caller
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let shared = &*self.shared;
        shared.pending.0.store(self.threads - 1, Ordering::Relaxed);
        // SAFETY: no worker runs: the caller before waited for `pending` to reach 0. The borrow is
        // used by workers only until it does again, which this function waits for.
        unsafe {
            *shared.call.task.get() = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task));
        }
        shared.call.epoch.fetch_add(1, Ordering::Release);
        // Either this sees a worker that is about to sleep, or the worker sees the new epoch.
        fence(Ordering::SeqCst);
        if shared.sleepers.0.load(Ordering::Relaxed) > 0 {
            drop(shared.sleep.lock());
            shared.wake.notify_all();
        }
        INSIDE.set(true);
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task(0)));
        INSIDE.set(false);
        let mut spins = 0;
        while shared.pending.0.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 20_000 {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(
            !shared.panicked.swap(false, Ordering::SeqCst),
            "a kernel worker panicked"
        );
    }

    /// Runs `task(index)` for `0..count`, handing indices out one at a time.
    pub fn for_each(&self, count: usize, task: impl Fn(usize) + Sync) {
        if count <= 1 || self.threads() == 1 {
            (0..count).for_each(task);
            return;
        }
        let next = AtomicUsize::new(0);
        self.broadcast(&|_| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                task(index);
            }
        });
    }

    /// Runs `task(index)` for `0..count`: each thread has a run of neighbours, the same one for the
    /// same count in every job, so that what one job leaves in a core's cache the next one finds there.
    /// Three quarters of a run are its thread's for certain, the rest evens out.
    pub fn for_each_in_runs(&self, count: usize, task: impl Fn(usize) + Sync) {
        let threads = self.threads;
        if threads == 1 || count < 2 {
            (0..count).for_each(task);
            return;
        }
        let run = |worker: usize| (worker * count / threads, (worker + 1) * count / threads);
        let rest = |worker: usize| {
            let (start, end) = run(worker);
            start + (end - start) * 3 / 4
        };
        let next: Vec<Padded<AtomicUsize>> = (0..threads)
            .map(|worker| Padded(AtomicUsize::new(rest(worker))))
            .collect();
        let step = (count / (16 * threads)).max(1);
        self.broadcast(&|worker| {
            (run(worker).0..rest(worker)).for_each(&task);
            for owner in (worker..threads).chain(0..worker) {
                let end = run(owner).1;
                loop {
                    let start = next[owner].0.fetch_add(step, Ordering::Relaxed);
                    if start >= end {
                        break;
                    }
                    (start..(start + step).min(end)).for_each(&task);
                }
            }
        });
    }
}

fn work(shared: &Shared, worker: usize) {
    INSIDE.set(true);
    let mut seen = 0usize;
    loop {
        let epoch = &shared.call.epoch;
        let mut spins = 0;
        while epoch.load(Ordering::Acquire) == seen {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            let mut guard = shared.sleep.lock().unwrap();
            shared.sleepers.0.fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            while epoch.load(Ordering::Acquire) == seen {
                guard = shared.wake.wait(guard).unwrap();
            }
            shared.sleepers.0.fetch_sub(1, Ordering::Relaxed);
        }
        // One job at a time: the next one waits for this worker.
        seen += 1;
        // SAFETY: written before the epoch that was just read.
        let task = unsafe { *shared.call.task.get() }.expect("a job is published with its epoch");
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| task(worker))).is_err() {
            shared.panicked.store(true, Ordering::SeqCst);
        }
        shared.pending.0.fetch_sub(1, Ordering::Release);
    }
}

/// A raw pointer that jobs share when each writes its own disjoint part.
#[derive(Clone, Copy)]
pub struct SharedMut<T>(*mut T);

// SAFETY: users promise disjoint writes; see `slice`.
unsafe impl<T: Send> Send for SharedMut<T> {}
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Wraps a buffer that outlives the job.
    pub fn new(buffer: &mut [T]) -> Self {
        SharedMut(buffer.as_mut_ptr())
    }

    /// The element at `start`, for writes that take only parts of each row.
    ///
    /// # Safety
    /// `start` lies inside the buffer; no other worker touches what is written from there.
    pub unsafe fn at(&self, start: usize) -> *mut T {
        self.0.add(start)
    }

    /// The elements `start..start + len`.
    ///
    /// # Safety
    /// The range lies inside the buffer and no other worker touches it during the job.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        std::slice::from_raw_parts_mut(self.0.add(start), len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_every_job_stays_on_its_thread() {
        let pool = Pool::global();
        let here = std::thread::current().id();
        Pool::alone(|| {
            assert!(Pool::is_alone() && pool.threads() == 1);
            let ran = AtomicUsize::new(0);
            pool.for_each(50, |_| {
                assert_eq!(std::thread::current().id(), here);
                ran.fetch_add(1, Ordering::Relaxed);
            });
            pool.broadcast(&|worker| {
                assert_eq!(worker, 0);
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), 51);
        });
        assert!(!Pool::is_alone());
    }

    #[test]
    fn every_index_runs_once_and_nested_jobs_finish() {
        let pool = Pool::global();
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..round).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(round, |index| {
                pool.for_each(3, |_| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
            });
            pool.for_each_in_runs(round, |index| {
                pool.for_each_in_runs(5, |_| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(
                counts
                    .iter()
                    .all(|count| count.load(Ordering::Relaxed) == 3 + 5)
            );
        }
    }
}
