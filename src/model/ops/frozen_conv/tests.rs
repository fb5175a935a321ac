use super::*;
use crate::model::ops::batch_norm::{BatchNormInput, Moments, batch_norm_eval};
use crate::model::ops::gradient_check::{assert_near, random};
use crate::model::ops::{add_relu, conv2d};
use proptest::prelude::*;

const SAME: Window = Window { kernel: 3, stride: 1, padding: 1 };

struct Case {
    x: Tensor,
    weight: Tensor,
    /// gamma, beta, mean, variance
    norm: [Tensor; 4],
    shortcut: Option<Tensor>,
    window: Window,
    activation: Activation,
}

impl Case {
    /// `shape`: batch, height, width, channels.
    fn new(shape: (usize, usize, usize, usize), out: usize, window: Window) -> Self {
        let f32s = |tensor: Tensor| tensor.to_dtype(DType::F32).unwrap();
        let weight = random((out, shape.3, window.kernel, window.kernel), 2);
        let variance = (random(out, 6).abs().unwrap() + 0.5).unwrap();
        Case {
            x: f32s(random(shape, 1)),
            weight: f32s(weight),
            norm: [random(out, 3), random(out, 4), random(out, 5), variance].map(f32s),
            shortcut: None,
            window,
            activation: Activation::Identity,
        }
    }

    fn rectified(self) -> Self {
        Case { activation: Activation::Relu, ..self }
    }

    fn with_shortcut(self) -> Self {
        let shape = self.apart().shape().clone();
        let shortcut = Some(random(shape, 7).to_dtype(DType::F32).unwrap());
        Case { shortcut, ..self }
    }

    fn frozen(&self, precision: Precision) -> FrozenConvNorm {
        let [gamma, beta, mean, variance] = &self.norm;
        let norm = FrozenNorm { gamma, beta, mean, variance, eps: 1e-5, activation: self.activation };
        FrozenConvNorm::new(&self.weight, norm, self.window, precision).unwrap().unwrap()
    }

    fn together(&self, precision: Precision) -> Tensor {
        self.frozen(precision).forward(&self.x, self.shortcut.as_ref()).unwrap()
    }

    /// By the operations that training uses, in f32.
    fn apart(&self) -> Tensor {
        let [gamma, beta, mean, variance] = &self.norm;
        let x = conv2d(&self.x, &self.weight, self.window, Precision::F32).unwrap();
        let activation = if self.shortcut.is_some() { Activation::Identity } else { self.activation };
        let input = BatchNormInput { x: &x, gamma, beta, eps: 1e-5, activation };
        let moments = Moments { mean: mean.clone(), variance: variance.clone() };
        let y = batch_norm_eval(input, &moments).unwrap();
        match &self.shortcut {
            None => y,
            Some(shortcut) => add_relu(&y, shortcut).unwrap(),
        }
    }

    fn check(&self) {
        let apart = flat(&self.apart());
        let scale = apart.iter().fold(1f32, |largest, value| largest.max(value.abs()));
        let together = flat(&self.together(Precision::F32));
        assert_eq!(apart.len(), together.len());
        for (index, (a, b)) in apart.iter().zip(&together).enumerate() {
            assert!((a - b).abs() < 4e-6 * scale, "element {index}: {a} apart, {b} together");
        }
        assert_near(&apart, &flat(&self.together(Precision::Bf16)), 0.02);
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Any window and size, odd ones included.
    #[test]
    fn it_computes_what_its_parts_compute(
        shape in (1usize..5, 1usize..14, 1usize..14, 1usize..20),
        out in 1usize..150,
        (kernel, stride, padding) in (1usize..5, 1usize..3, 0usize..3),
        rectified: bool,
        shortcut: bool,
    ) {
        let window = Window { kernel, stride, padding };
        prop_assume!(window.positions(shape.1) * window.positions(shape.2) > 0);
        let case = Case::new(shape, out, window);
        let case = if rectified { case.rectified() } else { case };
        if shortcut { case.with_shortcut().check() } else { case.check() }
    }

    /// Winograd's tiles: few and many, odd sides, channels that fill no register.
    #[test]
    fn three_by_three_at_stride_one_too(
        shape in (1usize..12, 1usize..20, 1usize..20, 1usize..40),
        out in 1usize..100,
        shortcut: bool,
    ) {
        let case = Case::new(shape, out, SAME).rectified();
        if shortcut { case.with_shortcut().check() } else { case.check() }
    }
}

/// Panels of 24 columns, which 64 is no multiple of, with AVX2.
#[test]
fn channels_in_odd_multiples_of_24_at_few_positions_too() {
    for out in [72, 120] {
        Case::new((1, 2, 3, 24), out, Window { kernel: 3, stride: 2, padding: 1 }).check();
    }
}

#[test]
fn many_blocks_of_tiles_and_a_lone_one_give_the_same_image() {
    let case = Case::new((9, 13, 16, 64), 64, SAME).with_shortcut();
    let frozen = case.frozen(Precision::F32);
    let all = flat(&case.together(Precision::F32));
    let one = |tensor: &Tensor| tensor.narrow(0, 8, 1).unwrap();
    let last = flat(&frozen.forward(&one(&case.x), case.shortcut.as_ref().map(one).as_ref()).unwrap());
    assert_eq!(all[all.len() - last.len()..], last);
}

#[test]
fn threads_change_no_bit() {
    let wide = Case::new((1, 2, 2, 96), 200, Window { kernel: 3, stride: 2, padding: 1 });
    for case in [wide, Case::new((7, 13, 16, 24), 48, SAME), Case::new((1, 12, 9, 24), 48, SAME)] {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| flat(&case.together(Precision::F32)))
        };
        assert_eq!(with(1), with(3));
    }
}

#[test]
fn what_is_not_a_number_stays_one() {
    let mut case = Case::new((1, 8, 8, 3), 5, SAME).rectified();
    case.x = (case.x * f64::NAN).unwrap();
    assert!(flat(&case.together(Precision::F32)).iter().all(|value| value.is_nan()));
}

#[test]
fn a_shortcut_or_a_normalisation_of_another_shape_is_refused() {
    let case = Case::new((2, 4, 4, 3), 5, SAME);
    assert!(case.frozen(Precision::F32).forward(&case.x, Some(&case.x)).is_err());
    let [gamma, beta, mean, variance] = &Case::new((2, 4, 4, 3), 6, SAME).norm;
    let norm = FrozenNorm { gamma, beta, mean, variance, eps: 1e-5, activation: Activation::Relu };
    assert!(FrozenConvNorm::new(&case.weight, norm, SAME, Precision::F32).is_err());
}
