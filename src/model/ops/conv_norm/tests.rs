use candle_core::{DType, Tensor, Var};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::super::batch_norm::batch_norm_train;
use super::*;
use crate::model::ops::gradient_check::{
    assert_close, assert_gradients, assert_near, assert_same, random, weighted_sum,
};

/// Large enough that channels of few values, which may hardly vary, are not blown up together with their rounding.
const EPS: f64 = 1e-2;

fn rule(precision: Precision) -> ConvNormRule {
    ConvNormRule { eps: EPS, precision }
}

fn window(kernel: usize, stride: usize) -> Window {
    Window { kernel, stride, padding: kernel / 2 }
}

/// What is tested: one step, or a block of some kind.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Single { window: Window, activation: Activation },
    Block { kernel: usize, stride: usize, downsample: bool },
}

/// Sides, and channels in and out.
type Sizes = ((usize, usize, usize), (usize, usize));

impl Shape {
    fn windows(self) -> Vec<Window> {
        match self {
            Shape::Single { window, .. } => vec![window],
            Shape::Block { kernel, stride, downsample } => {
                let round = downsample.then_some(Window { kernel: 1, stride, padding: 0 });
                [window(kernel, stride), window(3, 1)].into_iter().chain(round).collect()
            }
        }
    }

    /// An input, and each step's weight, gamma and beta.
    fn inputs(self, ((batch, height, width), (channels, out)): Sizes) -> Vec<Tensor> {
        let mut inputs = vec![random((batch, height, width, channels), 1)];
        for (index, window) in self.windows().into_iter().enumerate() {
            let from = if index == 1 { out } else { channels };
            let seed = 10 * index as u64;
            inputs.push(random((out, from, window.kernel, window.kernel), 2 + seed));
            inputs.push((random(out, 3 + seed) + 1.5).unwrap());
            inputs.push(random(out, 4 + seed));
        }
        inputs
    }

    fn steps(self, x: &[Tensor]) -> Vec<ConvNormStep<'_>> {
        let parts = x[1..].chunks_exact(3).zip(self.windows());
        parts.map(|(p, window)| ConvNormStep { weight: &p[0], gamma: &p[1], beta: &p[2], window }).collect()
    }

    fn residual(self, x: &[Tensor]) -> ResidualSteps<'_> {
        let steps = self.steps(x);
        ResidualSteps { first: steps[0], second: steps[1], downsample: steps.get(2).copied() }
    }

    fn apply(self, x: &[Tensor], precision: Precision) -> Result<(Tensor, Vec<Moments>)> {
        match self {
            Shape::Single { activation, .. } => {
                let (y, moments) = conv_norm(&x[0], self.steps(x)[0], activation, rule(precision))?;
                Ok((y, vec![moments]))
            }
            Shape::Block { .. } => residual_block(&x[0], self.residual(x), rule(precision)),
        }
    }

    fn reference(self, x: &[Tensor]) -> Result<(Tensor, Vec<Moments>)> {
        match self {
            Shape::Single { activation, .. } => {
                let (y, moments) = reference_step(&x[0], self.steps(x)[0], activation, rule(Precision::F32))?;
                Ok((y, vec![moments]))
            }
            Shape::Block { .. } => reference_block(&x[0], self.residual(x), rule(Precision::F32)),
        }
    }

    /// By operations of their own, which keep f32 between them.
    fn separately(self, x: &[Tensor], precision: Precision) -> Result<Tensor> {
        let steps = self.steps(x);
        let step = |x: &Tensor, step: ConvNormStep<'_>, activation| {
            let x = &conv2d::conv2d(x, step.weight, step.window, precision)?;
            let ConvNormStep { gamma, beta, .. } = step;
            Ok(batch_norm_train(BatchNormInput { x, gamma, beta, eps: EPS, activation })?.0)
        };
        match self {
            Shape::Single { activation, .. } => step(&x[0], steps[0], activation),
            Shape::Block { .. } => {
                let hidden = step(&x[0], steps[0], Activation::Relu)?;
                let y = step(&hidden, steps[1], Activation::Identity)?;
                let shortcut =
                    steps.get(2).map(|&round| step(&x[0], round, Activation::Identity)).transpose()?;
                add_relu::add_relu(&y, shortcut.as_ref().unwrap_or(&x[0]))
            }
        }
    }

    fn results(self, inputs: &[Tensor], precision: Precision) -> Vec<Vec<f32>> {
        results(inputs, |x| Ok(self.apply(x, precision)?.0))
    }
}

/// The result of `f`, and the gradients of the input and of every parameter, in one vector each.
fn results(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Vec<f32>> {
    let vars: Vec<Var> =
        inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let grads = weighted_sum(&y).backward().unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let gradients = vars.iter().map(|var| flat(grads.get(var).unwrap()));
    std::iter::once(flat(&y)).chain(gradients).collect()
}

/// Root of the mean square of what differs, in units of the size of `exact`.
fn distance(exact: &[f32], rounded: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value).powi(2);
    let differs: f64 = exact.iter().zip(rounded).map(|(a, b)| square(a - b)).sum();
    (differs / exact.iter().map(|a| square(*a)).sum::<f64>()).sqrt()
}

const SHAPES: [Shape; 5] = [
    Shape::Single { window: Window { kernel: 3, stride: 2, padding: 1 }, activation: Activation::Relu },
    Shape::Single { window: Window { kernel: 5, stride: 3, padding: 1 }, activation: Activation::Identity },
    Shape::Block { kernel: 3, stride: 1, downsample: false },
    Shape::Block { kernel: 3, stride: 2, downsample: true },
    Shape::Block { kernel: 3, stride: 1, downsample: true },
];

/// Channels in that the shape allows.
fn channels(shape: Shape, channels: usize, out: usize) -> (usize, usize) {
    match shape {
        Shape::Block { downsample: false, .. } => (out, out),
        _ => (channels, out),
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for shape in SHAPES {
        let inputs = shape.inputs(((2, 4, 5), channels(shape, 3, 2)));
        assert_gradients(&inputs, |x| Ok(shape.apply(x, Precision::F32)?.0));
        assert_gradients(&inputs, |x| Ok(shape.reference(x)?.0));
    }
}

#[test]
fn several_tiles_give_what_the_reference_gives() {
    for shape in SHAPES {
        // 4 x 17 x 18 positions: tiles that end inside a line, several in each part.
        let inputs = shape.inputs(((4, 17, 18), channels(shape, 3, 24)));
        let own = |x: &[Tensor]| Ok(shape.apply(x, Precision::F32)?.0);
        assert_same(&inputs, own, |x| Ok(shape.reference(x)?.0));
        let (own, expected) =
            (shape.apply(&inputs, Precision::F32).unwrap().1, shape.reference(&inputs).unwrap().1);
        assert_eq!(own.len(), expected.len());
        for (own, expected) in own.iter().zip(&expected) {
            assert_close(&own.mean, &expected.mean, 1e-10, "mean");
            assert_close(&own.variance, &expected.variance, 1e-10, "variance");
        }
    }
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let single =
        (1usize..6, 1usize..4, 0usize..4, any::<bool>()).prop_map(|(kernel, stride, padding, relu)| {
            let activation = if relu { Activation::Relu } else { Activation::Identity };
            Shape::Single { window: Window { kernel, stride, padding }, activation }
        });
    let plain =
        (0usize..3).prop_map(|half| Shape::Block { kernel: 2 * half + 1, stride: 1, downsample: false });
    let down = (0usize..3, 1usize..4).prop_map(|(half, stride)| Shape::Block {
        kernel: 2 * half + 1,
        stride,
        downsample: true,
    });
    prop_oneof![single, plain, down]
}

proptest! {
    // The same cases each time: once in some thousand a value lies so near a ReLU's 0 that f32 passes it in one way of
    // computing and not in the other, and then the gradients rightly differ; for bf16 that happens in more of them.
    #![proptest_config(ProptestConfig { cases: 32, rng_seed: RngSeed::Fixed(5), ..ProptestConfig::default() })]
    /// Any sizes, odd ones included: f32 equals the reference, bf16 resembles it, although in so few elements every one that
    /// passes a ReLU in one arithmetic alone is seen.
    #[test]
    fn every_shape_gives_what_the_reference_gives(
        shape in any_shape(), batch in 2usize..8, (height, width) in (1usize..14, 1usize..14),
        from in 1usize..7, half_out in 1usize..18,
    ) {
        let windows = shape.windows();
        prop_assume!(windows[0].positions(height) * windows[0].positions(width) > 0);
        let inputs = shape.inputs(((batch, height, width), channels(shape, from, 2 * half_out)));
        let own = |x: &[Tensor]| Ok(shape.apply(x, Precision::F32)?.0);
        assert_same(&inputs, own, |x| Ok(shape.reference(x)?.0));
        let exact = shape.results(&inputs, Precision::F32);
        let rounded = shape.results(&inputs, Precision::Bf16);
        exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(exact, rounded, 0.3));
    }
}

/// Most of the distance of gradients is that of the few elements near 0 that pass a ReLU in one arithmetic alone: of one
/// input it is chance (the ratio below lay between 0.3 and 4.7), so that it is taken over several. There results are 1.3
/// times as far, because the convolution's is rounded too, and gradients 0.8 to 1.35 times.
#[test]
fn bf16_is_about_as_close_to_f32_as_separate_operations_are() {
    const INPUTS: u64 = 6;
    for shape in SHAPES {
        let mut squares: Vec<[f64; 2]> = Vec::new();
        for seed in 0..INPUTS {
            let mut inputs = shape.inputs(((8, 16, 16), channels(shape, 24, 24)));
            inputs[0] = random(inputs[0].shape(), 100 + seed);
            let exact = shape.results(&inputs, Precision::F32);
            let own = shape.results(&inputs, Precision::Bf16);
            let separate = results(&inputs, |x| shape.separately(x, Precision::Bf16));
            squares.resize(exact.len(), [0.0; 2]);
            for (squares, ((exact, own), separate)) in
                squares.iter_mut().zip(exact.iter().zip(&own).zip(&separate))
            {
                squares[0] += distance(exact, own).powi(2) / INPUTS as f64;
                squares[1] += distance(exact, separate).powi(2) / INPUTS as f64;
            }
        }
        for (index, squares) in squares.iter().enumerate() {
            let [own, separate] = squares.map(f64::sqrt);
            assert!(own < 1.5 * separate + 1e-4, "{shape:?}, {index}: {own}, separately {separate}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for shape in SHAPES {
        let inputs = shape.inputs(((9, 17, 16), channels(shape, 4, 6)));
        for precision in [Precision::F32, Precision::Bf16] {
            let with = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| shape.results(&inputs, precision))
            };
            assert_eq!(with(1), with(3));
        }
    }
}

#[test]
fn what_is_kept_for_the_backward_pass_changes_no_result() {
    for shape in SHAPES {
        let inputs = shape.inputs(((3, 9, 9), channels(shape, 4, 6)));
        let plain: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let y =
                shape.apply(&plain, precision).unwrap().0.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(y, shape.results(&inputs, precision)[0]);
        }
    }
}

#[test]
fn a_nan_passes_the_relu() {
    let shape = SHAPES[0];
    let mut inputs = shape.inputs(((2, 5, 5), (2, 2)));
    inputs[1] = (&inputs[1] * f64::NAN).unwrap();
    let y = shape.apply(&inputs, Precision::F32).unwrap().0;
    assert!(y.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0].is_nan());
}

#[test]
fn steps_that_do_not_meet_are_refused() {
    let fails = |shape: Shape, sizes: Sizes, precision| {
        let inputs: Vec<Tensor> =
            shape.inputs(sizes).iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
        shape.apply(&inputs, precision).is_err()
    };
    let block = |stride, downsample| Shape::Block { kernel: 3, stride, downsample };
    // The input goes round, but has other channels or another size.
    assert!(fails(block(1, false), ((2, 4, 4), (2, 4)), Precision::F32));
    assert!(fails(block(2, false), ((2, 4, 4), (4, 4)), Precision::F32));
    // bf16 wants pairs.
    assert!(fails(block(1, true), ((2, 4, 4), (2, 3)), Precision::Bf16));
    assert!(!fails(block(1, true), ((2, 4, 4), (2, 3)), Precision::F32));
}
