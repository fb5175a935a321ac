//! `y = x W^T + b` over the rows of `x`.
//!
//! Parts: blocks of rows forward and for the input's gradient; blocks of output features for the gradients of weight
//! and bias, each a whole sum over the rows, so that nothing is left to combine.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::Precision;
use super::add_bias::add_bias;
use super::has_kernel;
use super::kernel::{Real, View, into_storage, rows_and_width, slice, tensor_like, with_real};
use super::matrix::{Matrix, Shape as MatrixShape, Write};
use super::product::product_transposed;

/// `x` [.., inputs], `weight` [outputs, inputs], `bias` [outputs] -> [.., outputs].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !has_kernel(x) {
        return reference(x, weight, bias, Precision::F32);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = Linear { input_tracked: x.track_op() };
    match bias {
        None => x.apply_op2(&weight, op),
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
    }
}

pub(super) fn reference(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    precision: Precision,
) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    let y = product_transposed(&x.reshape(((), inputs))?, weight, precision)?;
    let y = match bias {
        None => y,
        Some(bias) => add_bias(&y, bias)?,
    };
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    y.reshape(dims)
}

struct Linear {
    /// False where the input is data: its gradient is not computed.
    input_tracked: bool,
}

#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Dims {
    fn of(x: &Layout, weight: &Layout) -> Result<Self> {
        let (rows, inputs) = rows_and_width(x)?;
        let (outputs, weight_inputs) = weight.shape().dims2()?;
        if inputs != weight_inputs || rows == 0 {
            bail!("linear: input {:?} does not fit weight {:?}", x.shape(), weight.shape());
        }
        Ok(Dims { rows, inputs, outputs })
    }

    fn output_shape(&self, x: &Layout) -> Shape {
        let mut dims = x.dims().to_vec();
        dims.pop();
        dims.push(self.outputs);
        Shape::from(dims)
    }

    /// At least 8 parts where there are rows enough; above 256 rows the packing of the weight no longer shows.
    fn rows_per_part(&self) -> usize {
        self.rows.div_ceil(8).clamp(32, 256)
    }

    fn outputs_per_part(&self) -> usize {
        self.outputs.div_ceil(8).clamp(16, 128)
    }
}

impl Linear {
    fn forward(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        b: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let dims = Dims::of(x.1, w.1)?;
        if let Some((_, layout)) = b
            && layout.dims() != [dims.outputs]
        {
            bail!("linear: bias {:?} does not fit {} outputs", layout.shape(), dims.outputs);
        }
        let storage = with_real!(x.0.dtype(), "linear", T => {
            let bias = b.map(|(s, l)| slice::<T>(s, l)).transpose()?;
            Ok(into_storage(forward::<T>(dims, slice(x.0, x.1)?, slice(w.0, w.1)?, bias)))
        })?;
        Ok((storage, dims.output_shape(x.1)))
    }

    /// Gradients of input (where tracked), weight and bias.
    fn backward(&self, x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let grad = grad.contiguous()?;
        let dims = Dims::of(x.layout(), w.layout())?;
        with_real!(x.dtype(), "linear", T => {
            let (x_view, w_view, grad) = (View::of(x), View::of(w), View::of(&grad));
            let grad = grad.slice::<T>()?;
            let dx = match self.input_tracked {
                true => Some(tensor_like(input_gradient(dims, w_view.slice::<T>()?, grad), x)?),
                false => None,
            };
            let (dw, db) = weight_gradients(dims, x_view.slice::<T>()?, grad);
            Ok((dx, tensor_like(dw, w)?, Tensor::from_vec(db, dims.outputs, x.device())?))
        })
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), (s2, l2), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = self.backward(x, w, grad)?;
        Ok((dx, Some(dw)))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear-bias"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), (s2, l2), Some((s3, l3)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, db) = self.backward(x, w, grad)?;
        Ok((dx, Some(dw), Some(db)))
    }
}

fn forward<T: Real>(dims: Dims, x: &[T], w: &[T], bias: Option<&[T]>) -> Vec<T> {
    let Dims { rows, inputs, outputs } = dims;
    let part = dims.rows_per_part();
    let mut y = vec![T::ZERO; rows * outputs];
    let w = Matrix::new(w, MatrixShape::row_major(outputs, inputs).transposed());
    y.par_chunks_mut(part * outputs).zip(x.par_chunks(part * inputs)).for_each(|(y, x)| {
        let rows = y.len() / outputs;
        if let Some(bias) = bias {
            y.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
        }
        let write = if bias.is_some() { Write::Add } else { Write::Replace };
        let x = Matrix::new(x, MatrixShape::row_major(rows, inputs));
        x.multiply_into(w, y, MatrixShape::row_major(rows, outputs), write);
    });
    y
}

fn input_gradient<T: Real>(dims: Dims, w: &[T], grad: &[T]) -> Vec<T> {
    let Dims { rows, inputs, outputs } = dims;
    let part = dims.rows_per_part();
    let mut dx = vec![T::ZERO; rows * inputs];
    let w = Matrix::new(w, MatrixShape::row_major(outputs, inputs));
    dx.par_chunks_mut(part * inputs).zip(grad.par_chunks(part * outputs)).for_each(|(dx, grad)| {
        let rows = dx.len() / inputs;
        let grad = Matrix::new(grad, MatrixShape::row_major(rows, outputs));
        grad.multiply_into(w, dx, MatrixShape::row_major(rows, inputs), Write::Replace);
    });
    dx
}

fn weight_gradients<T: Real>(dims: Dims, x: &[T], grad: &[T]) -> (Vec<T>, Vec<T>) {
    let Dims { rows, inputs, outputs } = dims;
    let part = dims.outputs_per_part();
    let mut dw = vec![T::ZERO; outputs * inputs];
    let mut db = vec![T::ZERO; outputs];
    let x = Matrix::new(x, MatrixShape::row_major(rows, inputs));
    dw.par_chunks_mut(part * inputs).zip(db.par_chunks_mut(part)).enumerate().for_each(
        |(index, (dw, db))| {
            let block = MatrixShape::with_row_stride(rows, db.len(), outputs);
            let grad = &grad[index * part..];
            let dw_shape = MatrixShape::row_major(db.len(), inputs);
            Matrix::new(grad, block.transposed()).multiply_into(x, dw, dw_shape, Write::Replace);
            for row in grad.chunks(outputs) {
                // The last chunk may be cut short by the block's offset, never by less than the block.
                for (sum, &g) in db.iter_mut().zip(row) {
                    *sum += g;
                }
            }
        },
    );
    (dw, db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::gradient_check::{assert_gradients, assert_same, random};

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [random((2, 3, 5), 1), random((4, 5), 2), random(4, 3)];
        assert_gradients(&inputs, |x| linear(&x[0], &x[1], Some(&x[2])));
        assert_gradients(&inputs, |x| reference(&x[0], &x[1], Some(&x[2]), Precision::F32));
        assert_gradients(&inputs[..2], |x| linear(&x[0], &x[1], None));
        assert_gradients(&inputs[..2], |x| reference(&x[0], &x[1], None, Precision::F32));
    }

    #[test]
    fn several_parts_give_what_one_product_gives() {
        let inputs = [random((300, 7), 1), random((150, 7), 2), random(150, 3)];
        assert_same(
            &inputs,
            |x| linear(&x[0], &x[1], Some(&x[2])),
            |x| reference(&x[0], &x[1], Some(&x[2]), Precision::F32),
        );
    }

    #[test]
    fn a_weight_for_another_width_is_refused() {
        assert!(linear(&random((2, 3), 1), &random((4, 5), 2), None).is_err());
        assert!(linear(&random((2, 5), 1), &random((4, 5), 2), Some(&random(3, 3))).is_err());
    }
}
