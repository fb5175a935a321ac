//! What the CPU kernels share: the element types, contiguous views of tensors, and sums over fixed parts.
//!
//! Invariant: nothing here asks how many threads there are, so no result can depend on it.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use rayon::prelude::*;

/// An element type of the kernels. Sums over many elements are taken in f64 (`wide`).
pub(super) trait Real: WithDType {
    const ZERO: Self;
    fn wide(self) -> f64;
    fn narrow(value: f64) -> Self;
    fn exp(self) -> Self;
    fn erf(self) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn narrow(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f32::exp(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        candle_core::cpu::erf::erf_f32(self)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn erf(self) -> Self {
        candle_core::cpu::erf::erf_f64(self)
    }
}

/// Runs `$body` with `$t` standing for the element type of `$dtype`; other types are an error that names the operation.
macro_rules! with_real {
    ($dtype:expr, $name:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            other => Err(crate::model::ops::kernel::unsupported(other, $name)),
        }
    };
}
pub(super) use with_real;

pub(super) fn unsupported(dtype: DType, op: &'static str) -> candle_core::Error {
    candle_core::Error::UnsupportedDTypeForOp(dtype, op).bt()
}

/// The elements of a contiguous CPU tensor, as an operation's forward pass is given them.
pub(super) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!(
            "kernel needs a contiguous tensor, found strides {:?} for shape {:?}",
            layout.stride(),
            layout.shape()
        )
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// A read lock on a contiguous CPU tensor, as an operation's backward pass needs it.
pub(super) struct View<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> View<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        View { storage, layout }
    }

    pub(super) fn slice<T: Real>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => bail!("kernel needs a tensor on the cpu"),
        }
    }
}

/// What a forward pass hands to candle.
pub(super) fn into_storage<T: Real>(data: Vec<T>) -> CpuStorage {
    T::to_cpu_storage_owned(data)
}

/// A new tensor on the CPU with the shape of `like`.
pub(super) fn tensor_like<T: Real>(data: Vec<T>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, like.shape(), like.device())
}

/// `tensor` as a matrix: all dimensions but the last are rows.
pub(super) fn rows_and_width(layout: &Layout) -> Result<(usize, usize)> {
    let Some((&width, leading)) = layout.dims().split_last() else {
        bail!("kernel needs at least one dimension, found a scalar")
    };
    Ok((leading.iter().product(), width))
}

/// Rows of one part: larger parts feed fewer threads, smaller ones cost more partial sums.
/// 32 parts keep 16 threads busy; below 64 rows a part is not worth its start.
pub(super) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(32).max(64)
}

/// Sums vectors of `width` over the parts of `0..rows`: `add(part, sums)` adds a part's share onto zeros; the shares
/// are combined in the order of the parts.
pub(super) fn sum_over_parts<A, F>(rows: usize, rows_per_part: usize, width: usize, add: F) -> Vec<A>
where
    A: Real,
    F: Fn(Range<usize>, &mut [A]) + Sync,
{
    let parts: Vec<Vec<A>> = (0..rows.div_ceil(rows_per_part))
        .into_par_iter()
        .map(|part| {
            let start = part * rows_per_part;
            let mut sums = vec![A::ZERO; width];
            add(start..(start + rows_per_part).min(rows), &mut sums);
            sums
        })
        .collect();
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_else(|| vec![A::ZERO; width]);
    for part in parts {
        for (sum, share) in total.iter_mut().zip(&part) {
            *sum += *share;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_parts_cover_every_row_once() {
        let sums: Vec<f64> = sum_over_parts(130, 64, 2, |rows, sums| {
            for row in rows {
                sums[0] += row as f64;
                sums[1] += 1.0;
            }
        });
        assert_eq!(sums, [129.0 * 130.0 / 2.0, 130.0]);
        assert_eq!(sum_over_parts::<f64, _>(0, 64, 1, |_, _| unreachable!()), [0.0]);
    }

    #[test]
    fn a_transposed_tensor_is_refused_rather_than_misread() {
        let tensor = Tensor::zeros((2, 3), DType::F32, &candle_core::Device::Cpu).unwrap().t().unwrap();
        assert!(View::of(&tensor).slice::<f32>().is_err());
    }
}
