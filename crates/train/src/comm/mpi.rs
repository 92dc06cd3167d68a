//! Processes started by `mpirun`, over OpenMPI: the six calls that [`Comm`] needs, declared here.
//!
//! The `mpi` crate brings the whole interface, and with it a generator of bindings that needs libclang; six calls do not. The
//! names of OpenMPI's handles (`ompi_mpi_comm_world`, `ompi_mpi_byte`) are part of its binary interface since version 1.

use super::Comm;
use crate::error::{Result, TrainError};
use std::ffi::{c_char, c_int, c_void};

#[link(name = "mpi")]
unsafe extern "C" {
    // Of other types than bytes; only their addresses are used.
    static ompi_mpi_comm_world: u8;
    static ompi_mpi_byte: u8;
    fn MPI_Init_thread(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        required: c_int,
        provided: *mut c_int,
    ) -> c_int;
    fn MPI_Comm_rank(comm: *const c_void, rank: *mut c_int) -> c_int;
    fn MPI_Comm_size(comm: *const c_void, size: *mut c_int) -> c_int;
    fn MPI_Bcast(
        buffer: *mut c_void,
        count: c_int,
        datatype: *const c_void,
        root: c_int,
        comm: *const c_void,
    ) -> c_int;
    fn MPI_Finalize() -> c_int;
    fn MPI_Abort(comm: *const c_void, code: c_int) -> c_int;
}

/// Only one thread at a time calls, any thread (`MPI_THREAD_SERIALIZED`).
const SERIALIZED: c_int = 2;
/// Bytes of one call: counts are C integers.
const MOST: usize = 1 << 30;

/// The processes that `mpirun` started. Dropping it takes leave of the others.
pub struct Mpi {
    rank: usize,
    size: usize,
    /// One call at a time.
    turn: std::sync::Mutex<()>,
}

fn world() -> *const c_void {
    (&raw const ompi_mpi_comm_world).cast()
}

fn check(call: &str, code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(TrainError::option(
            "mpi",
            format!("{call} answered {code}"),
            "0",
        )),
    }
}

impl Mpi {
    /// Joins the processes that `mpirun` started; None if this process was started without it. Once per process.
    ///
    /// # Errors
    /// OpenMPI's own.
    pub fn join() -> Result<Option<Mpi>> {
        if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let (mut provided, mut rank, mut size) = (0, 0, 0);
        // SAFETY: null arguments are allowed, the others point to integers.
        unsafe {
            let none = std::ptr::null_mut();
            let code = MPI_Init_thread(none, std::ptr::null_mut(), SERIALIZED, &mut provided);
            check("MPI_Init_thread", code)?;
            check("MPI_Comm_rank", MPI_Comm_rank(world(), &mut rank))?;
            check("MPI_Comm_size", MPI_Comm_size(world(), &mut size))?;
        }
        if provided < SERIALIZED {
            let found = format!("thread level {provided}");
            return Err(TrainError::option(
                "mpi",
                found,
                format!("{SERIALIZED} or more"),
            ));
        }
        Ok(Some(Mpi {
            rank: rank as usize,
            size: size as usize,
            turn: std::sync::Mutex::new(()),
        }))
    }

    fn bytes(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        for part in bytes.chunks_mut(MOST) {
            // SAFETY: the buffer has `len` bytes, and all processes call with the same length.
            let code = unsafe {
                MPI_Bcast(
                    part.as_mut_ptr().cast(),
                    part.len() as c_int,
                    (&raw const ompi_mpi_byte).cast(),
                    from as c_int,
                    world(),
                )
            };
            check("MPI_Bcast", code)?;
        }
        Ok(())
    }
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn broadcast(&self, from: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let _turn = self
            .turn
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.bytes(from, &mut length)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        self.bytes(from, bytes)
    }

    fn abort(&self, code: i32) -> ! {
        // SAFETY: plain arguments.
        unsafe { MPI_Abort(world(), code) };
        std::process::exit(code)
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // SAFETY: joined, and joined once.
        unsafe { MPI_Finalize() };
    }
}
