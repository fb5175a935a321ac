//! Every operation on a GPU against its twin on the CPU, values and gradients, in f32: `make gpu-test`. Without a GPU these tests
//! fail, they don't pass.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::cuda;
use crate::model::ops::gradient_check::{assert_close, assert_near, random};
use crate::model::ops::{
    Activation, AdamWStep, AdamWTensor, BatchNormInput, BlockLayout, BlockParameter, BlockSpec, ConvNormRule,
    ConvNormStep, FrozenBlock, Moments, Output, Precision, ResidualSteps, Window, adamw, add_relu,
    batch_norm_eval, batch_norm_train, channels_last, conv_norm, conv2d, layer_norm, linear, max_pool2d,
    residual_block, sums_of_squares, transformer_block_of,
};

/// Sums of some hundred terms, in another order than the CPU's.
const TOLERANCE: f64 = 1e-4;

fn gpu() -> Device {
    cuda::device(0).expect("no CUDA device, or not its libraries, work here: nothing was tested")
}

fn on(device: &Device, tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F32).unwrap().to_device(device).unwrap()
}

/// The result of `operation` and each input's gradient, computed on `device`.
fn run(device: &Device, inputs: &[Tensor], operation: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&on(device, t)).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = operation(&tensors).unwrap();
    let weights = on(device, &random(y.shape(), 77));
    let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let all = vars.iter().map(|var| grads.get(var).unwrap_or_else(|| panic!("no gradient")).clone());
    let all: Vec<Tensor> = std::iter::once(y).chain(all).collect();
    all.iter().map(|tensor| tensor.to_device(&Device::Cpu).unwrap()).collect()
}

/// Results and gradients of `operation` on the first GPU are the CPU's.
fn assert_parity(inputs: &[Tensor], operation: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let cpu = run(&Device::Cpu, inputs, &operation);
    for (index, (cpu, gpu)) in cpu.iter().zip(run(&gpu(), inputs, &operation)).enumerate() {
        let what = if index == 0 { "result".into() } else { format!("gradient of input {}", index - 1) };
        assert_close(cpu, &gpu, TOLERANCE, &what);
    }
}

/// In bf16 on the GPU they are as close to those in f32 on the CPU as 8 bits allow.
fn assert_parity_in_bf16(inputs: &[Tensor], operation: impl Fn(&[Tensor], Precision) -> Result<Tensor>) {
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let exact = run(&Device::Cpu, inputs, |x| operation(x, Precision::F32));
    let rounded = run(&gpu(), inputs, |x| operation(x, Precision::Bf16));
    exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(&flat(exact), &flat(rounded), 0.02));
}

#[test]
fn layer_norm_is_the_cpus() {
    for (rows, width) in [(1, 5), (200, 70), (1970, 192)] {
        let inputs = [random((2, rows, width), 1), random(width, 2), random(width, 3)];
        assert_parity(&inputs, |x| layer_norm(&x[0], &x[1], &x[2], 1e-6));
        // Neither from the start of its memory nor in one piece.
        let part = |x: &Tensor| x.transpose(0, 1)?.narrow(0, rows / 2, rows - rows / 2);
        assert_parity(&inputs, |x| layer_norm(&part(&x[0])?, &x[1], &x[2], 1e-6));
    }
}

#[test]
fn linear_is_the_cpus() {
    let inputs = [random((3, 65, 96), 1), random((40, 96), 2), random(40, 3)];
    assert_parity(&inputs, |x| linear(&x[0], &x[1], Some(&x[2])));
    assert_parity(&inputs[..2], |x| linear(&x[0], &x[1], None));
}

#[test]
fn a_transformer_block_is_the_cpus() {
    let width = 12;
    let layout = BlockLayout { width };
    for output in [Output::AllTokens, Output::FirstToken] {
        let spec = BlockSpec { heads: 3, norm_eps: 1e-2, precision: Precision::F32, output };
        let mut inputs = vec![random((4, 37, width), 1)];
        let parts = BlockParameter::ALL.map(|parameter| random(layout.shape(parameter), parameter as u64));
        inputs.extend(parts.map(|part| (part * 0.7).unwrap()));
        assert_parity(&inputs, |x| transformer_block_of(&x[0], &x[1..], spec));
        assert_parity_in_bf16(&inputs, |x, precision| {
            transformer_block_of(&x[0], &x[1..], BlockSpec { precision, ..spec })
        });
        let frozen = |x: &[Tensor]| {
            let parts: Vec<Tensor> = inputs[1..].iter().map(|part| on(x[0].device(), part)).collect();
            FrozenBlock::new(layout.join(&parts)?, width, spec.precision)?.forward(&x[0], spec)
        };
        assert_parity(&inputs[..1], frozen);
    }
}

#[test]
fn convolutions_norms_and_pools_are_the_cpus() {
    let window = Window { kernel: 3, stride: 2, padding: 1 };
    let (x, weight) = (random((3, 9, 8, 4), 1), random((6, 4, 3, 3), 2));
    let (gamma, beta) = (random(6, 3), random(6, 4));
    assert_parity(&[x.clone(), weight.clone()], |x| conv2d(&x[0], &x[1], window, Precision::F32));
    assert_parity(std::slice::from_ref(&x), |x| max_pool2d(&x[0], window));
    assert_parity(&[random((2, 3, 5, 4), 12)], |x| channels_last(&x[0]));
    assert_parity(&[x.clone(), random(x.shape(), 5)], |x| add_relu(&x[0], &x[1]));
    let rule = ConvNormRule { eps: 1e-2, precision: Precision::F32 };
    let inputs = [x.clone(), weight, gamma.clone(), beta.clone()];
    assert_parity(&inputs, |x| {
        let step = ConvNormStep { weight: &x[1], gamma: &x[2], beta: &x[3], window };
        Ok(conv_norm(&x[0], step, Activation::Relu, rule)?.0)
    });
    let same = Window { kernel: 3, stride: 1, padding: 1 };
    assert_parity_in_bf16(&inputs, |x, precision| {
        let step = ConvNormStep { weight: &x[1], gamma: &x[2], beta: &x[3], window };
        Ok(conv_norm(&x[0], step, Activation::Identity, ConvNormRule { precision, ..rule })?.0)
    });
    let inputs = [x, random((4, 4, 3, 3), 6), random(4, 7), random(4, 8)];
    assert_parity(&inputs, |x| {
        let step = ConvNormStep { weight: &x[1], gamma: &x[2], beta: &x[3], window: same };
        Ok(residual_block(&x[0], ResidualSteps { first: step, second: step, downsample: None }, rule)?.0)
    });
    let inputs = [random((70, 6), 9), gamma, beta];
    fn input(x: &[Tensor]) -> BatchNormInput<'_> {
        BatchNormInput { x: &x[0], gamma: &x[1], beta: &x[2], eps: 1e-2, activation: Activation::Relu }
    }
    assert_parity(&inputs, |x| Ok(batch_norm_train(input(x))?.0));
    assert_parity(&inputs, |x| {
        let device = x[0].device();
        let mean = on(device, &random(6, 10));
        let variance = on(device, &(random(6, 11).abs()? + 0.5)?);
        batch_norm_eval(input(x), &Moments { mean, variance })
    });
}

#[test]
fn adamw_and_sums_of_squares_are_the_cpus() {
    let step = AdamWStep { scale: 0.7, beta1: 0.9, beta2: 0.999, rate: 0.01, root_correction: 0.5 };
    let run = |device: &Device| {
        let tensors = |seed| [1, 4096, 9001].map(|length| on(device, &random(length, seed)));
        let (parameters, gradients, first) = (tensors(1), tensors(2), tensors(3));
        let second = tensors(4).map(|tensor| tensor.sqr().unwrap());
        let moved: Vec<_> = (0..3)
            .map(|i| {
                let moments = [&first[i], &second[i]];
                AdamWTensor { parameter: &parameters[i], gradient: &gradients[i], moments, keep: 0.99 }
            })
            .collect();
        adamw(&moved, step).unwrap();
        let sums = sums_of_squares(&gradients).unwrap();
        let all = parameters.into_iter().chain(first).chain(second).chain([sums]);
        all.map(|tensor| tensor.to_device(&Device::Cpu).unwrap()).collect::<Vec<_>>()
    };
    for (cpu, gpu) in run(&Device::Cpu).iter().zip(run(&gpu())) {
        assert_close(cpu, &gpu, 1e-5, "a tensor");
    }
}
