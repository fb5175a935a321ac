//! CUDA kernels as operations call them, whatever runs them: a GPU (`cuda`), or the tests' emulation of one (`emulation`).
//!
//! A kernel lies beside its operation, in `ops/NAME.cu`; the operation's Rust file knows its arguments, its grid and the order
//! of its calls, and writes them down as [`Call`]s. Both machines are given the same calls, so tests on a machine without a GPU
//! check kernels and calls. What lies between them and candle (`cuda`, and `on_gpu` of each operation) runs on a GPU alone:
//! `parity`. The compiler for the GPU runs in `tools/cuda/kernels.sh`.
//!
//! Invariant: a sum's order depends on shapes alone, so that equal inputs give equal bits on one kind of device.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
#[cfg(test)]
pub(super) mod emulation;
#[cfg(all(test, feature = "cuda"))]
mod parity;

pub(super) mod adamw;
pub(super) mod add_bias;
pub(super) mod batch_norm;
pub(super) mod column_sums;
pub(super) mod gelu;
pub(super) mod layer_norm;
pub(super) mod softmax;
pub(super) mod unfold;

use std::marker::PhantomData;

#[cfg(feature = "cuda")]
use candle_core::Layout;
use candle_core::{Result, bail};

#[cfg(feature = "cuda")]
use super::kernel::rows_and_width;

/// Threads of a block in every kernel here: eight warps, of which most GPUs hold eight blocks at a time.
pub(super) const THREADS: usize = 256;
/// Threads that run in step. `WARP_SIZE` in `common.cuh`.
const WARP: usize = 32;
/// Columns and rows of a block that sums over columns. `TILE_COLUMNS` and `TILE_ROWS` in `common.cuh`.
const TILE_COLUMNS: usize = 32;
const TILE_ROWS: usize = 8;
const _: () = assert!(THREADS == TILE_COLUMNS * TILE_ROWS);
/// Parts of a sum over rows, if there are rows enough: with two tiles of columns four blocks for each multiprocessor of an H100. More
/// make the sum over the parts longer.
const PARTS: usize = 256;
/// Rows of a part at least: eight for each of a tile's rows.
const FEWEST_ROWS: usize = 64;

/// One file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Module {
    AdamW,
    AddBias,
    BatchNorm,
    ColumnSums,
    Gelu,
    LayerNorm,
    Softmax,
    Unfold,
}

impl Module {
    #[cfg(test)]
    const ALL: [Module; 8] = [
        Module::AdamW,
        Module::AddBias,
        Module::BatchNorm,
        Module::ColumnSums,
        Module::Gelu,
        Module::LayerNorm,
        Module::Softmax,
        Module::Unfold,
    ];

    /// The file's name without its ending.
    fn name(self) -> &'static str {
        match self {
            Module::AdamW => "adamw",
            Module::AddBias => "add_bias",
            Module::BatchNorm => "batch_norm",
            Module::ColumnSums => "column_sums",
            Module::Gelu => "gelu",
            Module::LayerNorm => "layer_norm",
            Module::Softmax => "softmax",
            Module::Unfold => "unfold",
        }
    }
}

/// The shape of a matrix that lies row after row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    pub rows: usize,
    pub width: usize,
}

impl Matrix {
    #[cfg(feature = "cuda")]
    pub(super) fn of(layout: &Layout) -> Result<Self> {
        let (rows, width) = rows_and_width(layout)?;
        Ok(Matrix { rows, width })
    }

    fn elements(self) -> usize {
        self.rows * self.width
    }

    /// Rows of one part of a sum over the rows.
    fn rows_per_part(self) -> usize {
        self.rows.div_ceil(PARTS).max(FEWEST_ROWS)
    }

    fn parts(self) -> usize {
        self.rows.div_ceil(self.rows_per_part())
    }
}

/// Of a normalisation's input and parameters.
pub(super) struct NormGradients<M> {
    /// [rows, width]
    pub dx: M,
    /// [2, width]: of gamma, then of beta.
    pub parameters: M,
}

/// `elements` f32 in a row in a machine's memory.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    address: u64,
    elements: usize,
    memory: PhantomData<&'a ()>,
}

impl Span<'_> {
    /// # Safety
    /// `elements` f32 lie at `address` in the memory of the machine whose kernels will be given this, as long as `'a` lasts.
    pub(super) unsafe fn new(address: u64, elements: usize) -> Self {
        Span { address, elements, memory: PhantomData }
    }

    /// An error unless it holds exactly as many elements as an operation is about to read or write.
    pub(super) fn expect(&self, elements: usize, what: &str) -> Result<()> {
        if self.elements != elements {
            bail!("kernel needs {elements} elements of {what}, found {}", self.elements);
        }
        Ok(())
    }
}

/// What a kernel is given; its order and kinds are those of the kernel's parameters.
#[derive(Clone, Copy)]
pub(super) enum Argument {
    /// A pointer.
    Address(u64),
    /// `unsigned`
    Count(u32),
    /// `float`
    Number(f32),
}

impl From<Span<'_>> for Argument {
    fn from(span: Span<'_>) -> Self {
        Argument::Address(span.address)
    }
}

/// A kernel with its grid and arguments.
pub(super) struct Call {
    pub module: Module,
    pub kernel: &'static str,
    /// Of [`THREADS`] threads each.
    pub blocks: u32,
    pub arguments: Vec<Argument>,
}

/// What runs kernels.
pub(super) trait Machine {
    /// f32 in its memory; freed when dropped, after the calls that were launched before.
    type Memory;
    /// Words of 64 bits that a kernel reads structures from; freed likewise.
    type Table;

    /// The content is undefined.
    fn allocate(&self, elements: usize) -> Result<Self::Memory>;

    fn span<'a>(&self, memory: &'a Self::Memory) -> Span<'a>;

    fn upload(&self, words: &[u64]) -> Result<Self::Table>;

    fn table(&self, table: &Self::Table) -> Argument;

    /// Calls run in the order in which they are launched, after this has returned maybe.
    ///
    /// # Safety
    /// Arguments are the kernel's, in number, order and kind, and it reads and writes no element outside their spans.
    unsafe fn launch(&self, call: Call) -> Result<()>;
}

/// A count as kernels take it.
pub(super) fn count(value: usize) -> Result<Argument> {
    match u32::try_from(value) {
        Ok(value) => Ok(Argument::Count(value)),
        Err(_) => bail!("kernel is given {value}, more than it counts to"),
    }
}

/// Blocks for `threads` threads, each of which has a number of 32 bits.
pub(super) fn blocks_of(threads: usize) -> Result<u32> {
    let blocks = threads.div_ceil(THREADS);
    match u32::try_from(blocks * THREADS) {
        // A grid without blocks is no grid.
        Ok(1..) => Ok(blocks as u32),
        _ => bail!("kernel can't have {threads} threads"),
    }
}

/// Blocks for kernels that give each row a warp.
pub(super) fn blocks_of_rows(rows: usize) -> Result<u32> {
    blocks_of(rows * WARP)
}

/// Blocks for kernels that sum over columns: tiles of columns times parts of the rows.
pub(super) fn blocks_of_columns(width: usize, parts: usize) -> Result<u32> {
    blocks_of(width.div_ceil(TILE_COLUMNS) * parts * THREADS)
}
