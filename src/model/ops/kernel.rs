//! What the CPU kernels share: the element types, contiguous views of tensors, and sums over fixed parts.
//!
//! Invariant: nothing here asks how many threads there are, so no result can depend on it.

use std::f64::consts::{FRAC_1_SQRT_2, PI};
use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use rayon::prelude::*;

use super::vector;

/// An element type of the kernels: what tensors hold.
pub(super) trait Real: WithDType + Default {
    const ZERO: Self;
    fn wide(self) -> f64;
    fn narrow(value: f64) -> Self;
    fn sqrt(self) -> Self;
    fn is_nan(self) -> bool;
    /// `e^x` of x <= 0.
    fn exp_of_negative(self) -> Self;
    /// The standard normal distribution's cumulative probability up to x, and its density there.
    fn normal(self) -> (Self, Self);
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
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        vector::exp_of_negative(self)
    }
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        vector::normal(self)
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
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn normal(self) -> (Self, Self) {
        let cumulative = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(self * FRAC_1_SQRT_2));
        (cumulative, (self * self * -0.5).exp() / (2.0 * PI).sqrt())
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

/// Elements of one part where the work on each is little: large enough to outweigh its start, small enough to stay in the
/// second-level cache.
pub(super) const ELEMENTS_PER_PART: usize = 16 * 1024;

/// Rows of one part: larger parts feed fewer threads, smaller ones cost more partial sums.
/// 32 parts keep 16 threads busy; below 64 rows a part is not worth its start.
pub(super) fn rows_per_part(rows: usize) -> usize {
    rows.div_ceil(32).max(64)
}

/// Sums vectors of `width` over the parts of `0..rows`: `add(part, sums)` adds a part's share onto zeros; the shares
/// are combined in f64, in the order of the parts.
pub(super) fn sum_over_parts<T, F>(rows: usize, rows_per_part: usize, width: usize, add: F) -> Vec<f64>
where
    T: Real,
    F: Fn(Range<usize>, &mut [T]) + Sync,
{
    let parts: Vec<Vec<T>> = (0..rows.div_ceil(rows_per_part))
        .into_par_iter()
        .map(|part| {
            let start = part * rows_per_part;
            let mut sums = vec![T::ZERO; width];
            add(start..(start + rows_per_part).min(rows), &mut sums);
            sums
        })
        .collect();
    let mut total = vec![0.0; width];
    for part in parts {
        total.iter_mut().zip(part).for_each(|(sum, share)| *sum += share.wide());
    }
    total
}

/// The sum of vectors of one length, in their order; nothing of none.
pub(super) fn sum_in_order<A: Real>(parts: Vec<Vec<A>>) -> Vec<A> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    let parts: Vec<Vec<A>> = parts.collect();
    total.par_chunks_mut(ELEMENTS_PER_PART).enumerate().for_each(|(index, total)| {
        for part in &parts {
            for (sum, share) in total.iter_mut().zip(&part[index * ELEMENTS_PER_PART..]) {
                *sum += *share;
            }
        }
    });
    total
}

/// A vector of `len` elements, made in parts of `part` (the last one may be shorter) and not zeroed before: `write(room,
/// index, share)` makes part `index` in the cache. `share` holds anything; `room` is one thread's. What `write` returns comes
/// back in the parts' order.
pub(super) fn in_parts<T, S, R>(
    len: usize,
    part: usize,
    room: impl Fn() -> S + Sync + Send,
    write: impl Fn(&mut S, usize, &mut [T]) -> R + Sync + Send,
) -> (Vec<T>, Vec<R>)
where
    T: Copy + Default + Send + Sync,
    R: Send,
{
    let mut out = Vec::with_capacity(len);
    let parts = out.spare_capacity_mut()[..len].par_chunks_mut(part).enumerate();
    let both = || (room(), Vec::new());
    let results = parts.map_init(both, |(room, share), (index, out)| {
        share.resize(out.len(), T::default());
        let result = write(room, index, share);
        out.write_copy_of_slice(share);
        result
    });
    let results = results.collect();
    // SAFETY: the parts cover the first `len` elements, and each was written as a whole: lengths that differ panic, and a
    // panic leaves this function before this line.
    unsafe { out.set_len(len) };
    (out, results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_parts_cover_every_row_once() {
        let sums = sum_over_parts(130, 64, 2, |rows, sums: &mut [f64]| {
            for row in rows {
                sums[0] += row as f64;
                sums[1] += 1.0;
            }
        });
        assert_eq!(sums, [129.0 * 130.0 / 2.0, 130.0]);
        assert_eq!(sum_over_parts(0, 64, 1, |_, _: &mut [f64]| unreachable!()), [0.0]);
    }

    #[test]
    fn parts_make_the_whole_in_their_order() {
        let write = |_: &mut (), index: usize, share: &mut [usize]| {
            share.iter_mut().enumerate().for_each(|(at, value)| *value = 10 * index + at);
            index
        };
        let (all, results) = in_parts(7, 3, || (), write);
        assert_eq!(all, [0, 1, 2, 10, 11, 12, 20]);
        assert_eq!(results, [0, 1, 2]);
        assert_eq!(in_parts(0, 3, || (), write), (vec![], vec![]));
    }

    #[test]
    fn a_transposed_tensor_is_refused_rather_than_misread() {
        let tensor = Tensor::zeros((2, 3), DType::F32, &candle_core::Device::Cpu).unwrap().t().unwrap();
        assert!(View::of(&tensor).slice::<f32>().is_err());
    }
}
