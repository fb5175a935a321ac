//! Analytic gradients against central finite differences, in f64.
//!
//! The scalar that is differentiated is the sum of the result's elements times fixed random numbers, so that every
//! element of the result takes part with a weight of its own.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

use crate::model::init::Stream;

/// Half the distance of the two points: the error of the difference is of order STEP^2, its noise of order 1e-16 / STEP.
const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 1e-7;

/// Values in [-1, 1) from a closed formula: f64, on the CPU.
pub(crate) fn random(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let stream = Stream::named(seed, "gradient check");
    let data: Vec<f64> = (0..shape.elem_count() as u64).map(|i| 2.0 * stream.uniform(i) - 1.0).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// `sum(result * weights)`, a scalar.
pub(crate) fn weighted_sum(result: &Tensor) -> Tensor {
    let weights = random(result.shape(), 77).to_dtype(result.dtype()).unwrap();
    (result * weights).unwrap().sum_all().unwrap()
}

/// The central difference of `loss` where each of `moves`' elements of `var` moves by its factor at once: to compare
/// with the sum of gradient * factor. The content is put back afterwards.
pub(crate) fn central_difference(
    var: &Var,
    moves: &[(usize, f64)],
    step: f64,
    loss: &dyn Fn() -> f64,
) -> f64 {
    let original = var.as_tensor().copy().unwrap();
    let mut values: Vec<f64> = original.flatten_all().unwrap().to_vec1().unwrap();
    let mut at = |offset: f64| {
        let before = values.clone();
        moves.iter().for_each(|&(index, factor)| values[index] += offset * factor);
        let moved = std::mem::replace(&mut values, before);
        var.set(&Tensor::from_vec(moved, original.shape(), &Device::Cpu).unwrap()).unwrap();
        loss()
    };
    let difference = (at(step) - at(-step)) / (2.0 * step);
    var.set(&original).unwrap();
    difference
}

/// Compares the gradient of every element of every input.
pub(crate) fn assert_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let loss = || weighted_sum(&f(&tensors).unwrap()).to_scalar::<f64>().unwrap();
    let grads = weighted_sum(&f(&tensors).unwrap()).backward().unwrap();
    for (position, var) in vars.iter().enumerate() {
        let grad = grads.get(var).unwrap_or_else(|| panic!("input {position} got no gradient"));
        assert_eq!(grad.shape(), var.shape(), "shape of the gradient of input {position}");
        let grad: Vec<f64> = grad.flatten_all().unwrap().to_vec1().unwrap();
        for (index, &analytic) in grad.iter().enumerate() {
            let numeric = central_difference(var, &[(index, 1.0)], STEP, &loss);
            assert!(
                (analytic - numeric).abs() <= TOLERANCE * (1.0 + analytic.abs()),
                "input {position}, element {index}: analytic {analytic}, numeric {numeric}"
            );
        }
    }
}

/// Results and gradients of `f` and `g` agree: in f64 to rounding, in f32 to what its rounding allows.
pub(crate) fn assert_same(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    g: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-5)] {
        let vars: Vec<Var> =
            inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let (a, b) = (f(&tensors).unwrap(), g(&tensors).unwrap());
        assert_close(&a, &b, tolerance, "result");
        let (a, b) = (weighted_sum(&a).backward().unwrap(), weighted_sum(&b).backward().unwrap());
        for (position, var) in vars.iter().enumerate() {
            assert_close(
                a.get(var).unwrap(),
                b.get(var).unwrap(),
                tolerance,
                &format!("gradient {position}"),
            );
        }
    }
}

/// # Panics
/// When results with rounded operands are further from exact ones than `tolerance`, as the root of the mean square, in
/// units of one and of the exact ones' size.
pub(crate) fn assert_near(exact: &[f32], rounded: &[f32], tolerance: f64) {
    assert_eq!(exact.len(), rounded.len());
    let distance: f64 = exact.iter().zip(rounded).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let size: f64 = exact.iter().map(|a| 1.0 + f64::from(*a).powi(2)).sum();
    assert!((distance / size).sqrt() <= tolerance, "{distance} of {size}");
}

/// # Panics
/// When shapes differ or an element differs by more than `tolerance * (1 + the largest element)`: sums that cancel keep
/// the rounding of what they were summed from.
pub(crate) fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(a.shape(), b.shape(), "shape of {what}");
    let values =
        |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let (a, b) = (values(a), values(b));
    let largest = a.iter().fold(0.0, |largest: f64, a| largest.max(a.abs()));
    for (index, (a, b)) in a.into_iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + largest), "{what}, element {index}: {a} and {b}");
    }
}
