//! A matrix product by the device's library, for devices on which products are no operations of ours.
//!
//! In bf16 both operands are rounded to it, sums are f32, and the result is rounded to bf16 once before it is f32 again (so are
//! both operands' gradients): a library's product has one type for both. On the CPU the kernels keep results in f32.

use candle_core::{DType, Result, Tensor};

use super::Precision;

/// `a` [.., rows, inner] times `b` [.., inner, columns], of one type, which the result has.
pub(super) fn product(a: &Tensor, b: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::Bf16 if a.dtype() == DType::F32 => rounded(a)?.matmul(&rounded(b)?)?.to_dtype(DType::F32),
        _ => a.matmul(b),
    }
}

/// `a` [rows, inner] times the transposed `b` [columns, inner], as [`product`]. It is rounded where it lies: the library transposes.
pub(super) fn product_transposed(a: &Tensor, b: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::Bf16 if a.dtype() == DType::F32 => {
            rounded(a)?.matmul(&rounded(b)?.t()?)?.to_dtype(DType::F32)
        }
        _ => a.matmul(&b.t()?),
    }
}

fn rounded(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::BF16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_near, random, weighted_sum};
    use candle_core::Var;

    #[test]
    fn in_bf16_values_and_gradients_are_as_close_as_8_bits_allow() {
        let inputs = [random((2, 9, 33), 1), random((2, 33, 7), 2)].map(|t| t.to_dtype(DType::F32).unwrap());
        let run = |precision| {
            let [a, b] = inputs.each_ref().map(|input| Var::from_tensor(input).unwrap());
            let y = product(&a, &b, precision).unwrap();
            let grads = weighted_sum(&y).backward().unwrap();
            [&y, grads.get(&a).unwrap(), grads.get(&b).unwrap()].map(|tensor| {
                assert_eq!(tensor.dtype(), DType::F32);
                tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()
            })
        };
        let (exact, rounded) = (run(Precision::F32), run(Precision::Bf16));
        assert!(exact != rounded);
        exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(exact, rounded, 0.01));
    }
}
