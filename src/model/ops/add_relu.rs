//! The end of a residual block: `max(a + b, 0)`, with torch's gradient (0, not 1, where the sum is 0).

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::has_kernel;
use super::kernel::{ELEMENTS_PER_PART, Real, View, into_storage, slice, tensor_like, with_real};

/// `a` and `b` of one shape and type -> the same.
pub fn add_relu(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !has_kernel(a) {
        return reference(a, b);
    }
    a.contiguous()?.apply_op2(&b.contiguous()?, AddRelu)
}

pub(super) fn reference(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    relu_reference(&(a + b)?)
}

/// ReLU whose gradient at 0 is 0. The mask is a constant of the graph.
pub(super) fn relu_reference(x: &Tensor) -> Result<Tensor> {
    x * x.detach().gt(0.0)?.to_dtype(x.dtype())?
}

struct AddRelu;

impl CustomOp2 for AddRelu {
    fn name(&self) -> &'static str {
        "add-relu"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if l1.shape() != l2.shape() {
            candle_core::bail!("add-relu of shapes {:?} and {:?}", l1.shape(), l2.shape());
        }
        let storage = with_real!(s1.dtype(), "add-relu", T => {
            Ok(into_storage(forward::<T>(slice(s1, l1)?, slice(s2, l2)?)))
        })?;
        Ok((storage, l1.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let masked = with_real!(res.dtype(), "add-relu", T => {
            tensor_like(backward::<T>(View::of(res).slice()?, View::of(&grad).slice()?), res)
        })?;
        Ok((Some(masked.clone()), Some(masked)))
    }
}

fn forward<T: Real>(a: &[T], b: &[T]) -> Vec<T> {
    zip_parts(a, b, |a, b| {
        let sum = a + b;
        if sum > T::ZERO { sum } else { T::ZERO }
    })
}

fn backward<T: Real>(result: &[T], grad: &[T]) -> Vec<T> {
    zip_parts(result, grad, |y, g| if y > T::ZERO { g } else { T::ZERO })
}

fn zip_parts<T: Real>(a: &[T], b: &[T], f: impl Fn(T, T) -> T + Sync) -> Vec<T> {
    let mut out = vec![T::ZERO; a.len()];
    out.par_chunks_mut(ELEMENTS_PER_PART)
        .zip(a.par_chunks(ELEMENTS_PER_PART))
        .zip(b.par_chunks(ELEMENTS_PER_PART))
        .for_each(|((out, a), b)| {
            for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *out = f(a, b);
            }
        });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [random((3, 4), 1), random((3, 4), 2)];
        assert_gradients(&inputs, |x| add_relu(&x[0], &x[1]));
        assert_gradients(&inputs, |x| reference(&x[0], &x[1]));
        assert_same(&inputs, |x| add_relu(&x[0], &x[1]), |x| reference(&x[0], &x[1]));
    }

    #[test]
    fn no_gradient_flows_where_the_sum_is_zero() {
        let a = candle_core::Var::new(&[1f32, 0.0, -1.0], &candle_core::Device::Cpu).unwrap();
        let b = a.zeros_like().unwrap();
        for result in [add_relu(&a, &b).unwrap(), reference(&a, &b).unwrap()] {
            let grads = result.sum_all().unwrap().backward().unwrap();
            assert_eq!(grads.get(&a).unwrap().to_vec1::<f32>().unwrap(), [1.0, 0.0, 0.0]);
        }
    }
}
