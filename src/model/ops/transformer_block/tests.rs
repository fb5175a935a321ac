use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::*;
use crate::model::ops::gradient_check::{
    assert_close, assert_gradients, assert_near, assert_same, random, weighted_sum,
};

/// Large enough that rows of two numbers, which may hardly vary, are not blown up together with their rounding.
const EPS: f64 = 1e-2;

fn spec(heads: usize, precision: Precision) -> BlockSpec {
    BlockSpec { heads, norm_eps: EPS, precision, output: Output::AllTokens }
}

/// An input and parameters that keep every part of the block at work.
fn inputs(batch: usize, tokens: usize, width: usize) -> [Tensor; 2] {
    let parameters = random(BlockLayout { width }.elements(), 2);
    [random((batch, tokens, width), 1), (parameters * 0.7).unwrap()]
}

#[test]
fn gradients_equal_finite_differences() {
    let inputs = inputs(2, 3, 4);
    for output in [Output::AllTokens, Output::FirstToken] {
        let spec = BlockSpec { output, ..spec(2, Precision::F32) };
        assert_gradients(&inputs, |x| transformer_block(&x[0], &x[1], spec));
        assert_gradients(&inputs, |x| reference(&x[0], &x[1], spec));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Sizes that leave a rest everywhere, among them several tiles and more tiles than parts.
    #[test]
    fn every_shape_gives_what_the_reference_gives(
        batch in 1usize..4, tokens in 1usize..140, heads in 1usize..4, head_width in 1usize..6, first: bool,
    ) {
        let inputs = inputs(batch, tokens, heads * head_width);
        let output = if first { Output::FirstToken } else { Output::AllTokens };
        let spec = BlockSpec { output, ..spec(heads, Precision::F32) };
        assert_same(&inputs, |x| transformer_block(&x[0], &x[1], spec), |x| reference(&x[0], &x[1], spec));
    }
}

#[test]
fn many_tiles_give_what_the_reference_gives() {
    // 40 tiles of one image: more than there are parts, so that a part has several.
    let inputs = inputs(40, 150, 4);
    let spec = spec(2, Precision::F32);
    assert_same(&inputs, |x| transformer_block(&x[0], &x[1], spec), |x| reference(&x[0], &x[1], spec));
}

/// Result and both gradients, in one vector each.
fn results(inputs: &[Tensor; 2], spec: BlockSpec) -> [Vec<f32>; 3] {
    let vars = inputs.each_ref().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap());
    let y = transformer_block(vars[0].as_tensor(), vars[1].as_tensor(), spec).unwrap();
    let grads = weighted_sum(&y).backward().unwrap();
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    [flat(&y), flat(grads.get(&vars[0]).unwrap()), flat(grads.get(&vars[1]).unwrap())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// bf16 keeps 8 bits: results and gradients lie as close to f32's as that allows, measured over all elements.
    #[test]
    fn bf16_stays_close_to_f32(
        batch in 1usize..4, tokens in 1usize..100, heads in 1usize..4, half_head_width in 1usize..5, first: bool,
    ) {
        let inputs = inputs(batch, tokens, 2 * heads * half_head_width);
        let output = if first { Output::FirstToken } else { Output::AllTokens };
        let exact = results(&inputs, BlockSpec { output, ..spec(heads, Precision::F32) });
        let rounded = results(&inputs, BlockSpec { output, ..spec(heads, Precision::Bf16) });
        exact.iter().zip(&rounded).for_each(|(exact, rounded)| assert_near(exact, rounded, 0.02));
    }
}

#[test]
fn what_is_kept_for_the_backward_pass_changes_no_result() {
    let [x, parameters] = inputs(3, 90, 8).map(|t| t.to_dtype(DType::F32).unwrap());
    let var = Var::from_tensor(&x).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let tracked = transformer_block(var.as_tensor(), &parameters, spec(2, precision)).unwrap();
        let plain = transformer_block(&x, &parameters, spec(2, precision)).unwrap();
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(&tracked), values(&plain));
    }
}

#[test]
fn threads_change_no_bit() {
    let inputs = inputs(40, 17, 8);
    for precision in [Precision::F32, Precision::Bf16] {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| results(&inputs, spec(2, precision)))
        };
        assert_eq!(with(1), with(3));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let x = Tensor::zeros((1, 2, 6), DType::F32, &Device::Cpu).unwrap();
    let parameters =
        |width| Tensor::zeros(BlockLayout { width }.elements(), DType::F32, &Device::Cpu).unwrap();
    assert!(transformer_block(&x, &parameters(6), spec(4, Precision::F32)).is_err());
    assert!(transformer_block(&x, &parameters(6), spec(2, Precision::Bf16)).is_err());
    assert!(transformer_block(&x, &parameters(8), spec(2, Precision::F32)).is_err());
    assert!(transformer_block(&x, &parameters(6), spec(2, Precision::F32)).is_ok());
}

#[test]
fn parameters_one_by_one_give_what_the_joined_ones_give() {
    let layout = BlockLayout { width: 6 };
    let parts = BlockParameter::ALL.map(|parameter| random(layout.shape(parameter), parameter as u64));
    let (x, spec) = (random((2, 3, 6), 1), spec(2, Precision::F32));
    let joined = transformer_block(&x, &layout.join(&parts).unwrap(), spec).unwrap();
    let of_parts = transformer_block_of(&x, &parts, spec).unwrap();
    assert_eq!(joined.to_vec3::<f64>().unwrap(), of_parts.to_vec3::<f64>().unwrap());
    let composed = compose(&x, |parameter| Ok(parts[parameter as usize].clone()), spec).unwrap();
    assert_close(&joined, &composed, 1e-12, "the composition");
    let error = transformer_block_of(&x, &parts[1..], spec).unwrap_err().to_string();
    assert!(error.contains("are not the parameters of width 6"), "{error}");
}

/// What a GPU computes a block of, in bf16.
#[test]
fn the_composition_in_bf16_is_as_close_as_8_bits_allow() {
    let [x, parameters] = inputs(2, 5, 8).map(|tensor| tensor.to_dtype(DType::F32).unwrap());
    let values = |precision| {
        let y = reference(&x, &parameters, spec(2, precision)).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (exact, rounded) = (values(Precision::F32), values(Precision::Bf16));
    assert_ne!(exact, rounded);
    assert_near(&exact, &rounded, 0.02);
}
