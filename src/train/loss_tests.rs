//! The golden values are those of the method's description, computed there in float64 with NumPy; gradients
//! are compared with central finite differences in f64.

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::*;

const Z1: [[f64; 3]; 3] = [[1., 0.5, -0.2], [0.3, -1., 0.8], [-0.6, 0.1, 1.2]];
const Z2: [[f64; 3]; 3] = [[0.9, 0.7, -0.1], [0.1, -0.8, 1.1], [-0.9, 0.4, 0.7]];
const Q1: [[f64; 3]; 3] = [[0.8, 0.2, 0.1], [0.4, -0.7, 0.6], [-0.5, 0.3, 0.9]];
const Q2: [[f64; 3]; 3] = [[0.7, 0.9, 0.2], [0.2, -1.1, 0.9], [-1., 0.2, 0.5]];
const NTXENT: [(f64, f64); 2] = [(0.2, 0.1130988896), (0.5, 0.4650966839)];
const DISTILLATION: [(f64, f64); 2] = [(0.2, 0.5843919948), (0.5, 0.8832151976)];

fn matrix(rows: &[[f64; 3]; 3], dtype: DType) -> Tensor {
    Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn stacked(a: &[[f64; 3]; 3], b: &[[f64; 3]; 3], dtype: DType) -> Tensor {
    Tensor::cat(&[matrix(a, dtype), matrix(b, dtype)], 0).unwrap()
}

fn value(loss: &Tensor) -> f64 {
    loss.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

fn random(seed: u64, rows: usize, columns: usize) -> Tensor {
    let place = crate::train::rng::Place {
        domain: crate::train::rng::Domain::Augmentation,
        step: 0,
        frame: 0,
        view: 0,
    };
    let mut draws = crate::train::rng::Draws::new(seed, place);
    let data: Vec<f64> = (0..rows * columns).map(|_| draws.normal()).collect();
    Tensor::from_vec(data, (rows, columns), &Device::Cpu).unwrap()
}

#[test]
fn losses_have_their_golden_values() {
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-6)] {
        for (tau, expected) in NTXENT {
            let loss = value(&ntxent(&matrix(&Z1, dtype), &matrix(&Z2, dtype), tau, &[]).unwrap());
            assert!((loss - expected).abs() < tolerance, "{dtype:?} {tau}: {loss}");
        }
        for (tau, expected) in DISTILLATION {
            let (q, t) = (stacked(&Q1, &Q2, dtype), stacked(&Z1, &Z2, dtype));
            let loss = value(&distillation(&q, &t, tau, &[]).unwrap());
            assert!((loss - expected).abs() < tolerance, "{dtype:?} {tau}: {loss}");
        }
    }
}

#[test]
fn equal_rows_give_the_logarithm_of_the_number_of_choices() {
    let row = [[0.3, -0.4, 0.5]; 3];
    let half = matrix(&row, DType::F64);
    let all = stacked(&row, &row, DType::F64);
    for tau in [0.2, 0.5] {
        let loss = value(&ntxent(&half, &half, tau, &[]).unwrap());
        assert!((loss - 1.6094379124).abs() < 1e-9, "{loss}");
        let loss = value(&distillation(&all, &all, tau, &[]).unwrap());
        assert!((loss - 1.7917594692).abs() < 1e-9, "{loss}");
    }
}

#[test]
fn feature_cosine_is_one_minus_the_mean_cosine() {
    let cosine = |a: &[f64; 3], b: &[f64; 3]| {
        let dot = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let expected = 1.0 - (0..3).map(|row| cosine(&Q1[row], &Z1[row])).sum::<f64>() / 3.0;
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-6)] {
        let (h, t) = (matrix(&Q1, dtype), matrix(&Z1, dtype));
        let loss = value(&feature_cosine(&h, &t).unwrap());
        assert!((loss - expected).abs() < tolerance, "{dtype:?}: {loss}");
        assert!(value(&feature_cosine(&h, &(&h * 3.0).unwrap()).unwrap()).abs() < tolerance);
    }
}

/// Both losses by their definition, view by view: `-log` of the positive's share among all that `counts` lets in.
fn by_definition(
    rows: [&[Vec<f64>]; 2],
    tau: f64,
    positive: impl Fn(usize) -> usize,
    counts: impl Fn(usize, usize) -> bool,
) -> f64 {
    let unit = |row: &[f64]| {
        let length = row.iter().map(|value| value * value).sum::<f64>().sqrt();
        row.iter().map(|value| value / length).collect::<Vec<f64>>()
    };
    let [from, to] = rows.map(|rows| rows.iter().map(|row| unit(row)).collect::<Vec<_>>());
    let term = |i: usize, j: usize| (from[i].iter().zip(&to[j]).map(|(a, b)| a * b).sum::<f64>() / tau).exp();
    let of_view = |i: usize| {
        let all: f64 = (0..to.len()).filter(|j| counts(i, *j)).map(|j| term(i, j)).sum();
        -(term(i, positive(i)) / all).ln()
    };
    (0..from.len()).map(of_view).sum::<f64>() / from.len() as f64
}

#[test]
fn frames_that_show_the_same_are_not_each_others_negatives() {
    const FRAMES: usize = 4;
    let same = [(0, 2), (3, 1)];
    let paired = |i: usize, j: usize| {
        let (a, b) = (i % FRAMES, j % FRAMES);
        same.contains(&(a, b)) || same.contains(&(b, a))
    };
    let (z, t) = (random(3, 2 * FRAMES, 5), random(4, 2 * FRAMES, 5));
    let (z1, z2) = (z.narrow(0, 0, FRAMES).unwrap(), z.narrow(0, FRAMES, FRAMES).unwrap());
    let [zs, ts] = [&z, &t].map(|rows| rows.to_vec2::<f64>().unwrap());
    let other_view = |i: usize| (i + FRAMES) % (2 * FRAMES);
    let expected = by_definition([&zs, &zs], 0.2, other_view, |i, j| i != j && !paired(i, j));
    let loss = value(&ntxent(&z1, &z2, 0.2, &same).unwrap());
    assert!((loss - expected).abs() < 1e-9, "{loss} {expected}");
    assert!((loss - value(&ntxent(&z1, &z2, 0.2, &[]).unwrap())).abs() > 1e-3);

    let [forth, back] = [[&zs, &ts], [&ts, &zs]]
        .map(|[from, to]| by_definition([from, to], 0.2, |i| i, |i, j| !paired(i, j)));
    let loss = value(&distillation(&z, &t, 0.2, &same).unwrap());
    assert!((loss - (forth + back) / 2.0).abs() < 1e-9, "{loss} {forth} {back}");

    assert_gradient(&z1, |z| ntxent(z, &z2, 0.2, &same).unwrap());
    assert_gradient(&z, |q| distillation(q, &t, 0.2, &same).unwrap());
}

#[test]
fn a_batch_of_one_scene_has_nothing_to_push_apart_and_a_pair_of_no_two_frames_is_refused() {
    let (a, b) = (random(1, 3, 4), random(2, 3, 4));
    let all = [(0, 1), (0, 2), (1, 2)];
    assert!(value(&ntxent(&a, &b, 0.2, &all).unwrap()).abs() < 1e-12);
    assert_gradient(&a, |z| ntxent(z, &b, 0.2, &all).unwrap());
    for pair in [(1, 1), (0, 3)] {
        let error = ntxent(&a, &b, 0.2, &[pair]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{pair:?} is no pair of 3 frames")), "{error}");
    }
}

/// Compares the gradient of `loss` at `at` with central differences.
fn assert_gradient(at: &Tensor, loss: impl Fn(&Tensor) -> Tensor) {
    let var = Var::from_tensor(at).unwrap();
    let gradient = loss(var.as_tensor()).backward().unwrap();
    let gradient = gradient.get(var.as_tensor()).unwrap();
    let gradient: Vec<f64> = gradient.flatten_all().unwrap().to_vec1().unwrap();
    let flat: Vec<f64> = at.flatten_all().unwrap().to_vec1().unwrap();
    let h = 1e-5;
    for i in 0..flat.len() {
        let moved = |by: f64| {
            let mut data = flat.clone();
            data[i] += by;
            value(&loss(&Tensor::from_vec(data, at.shape(), &Device::Cpu).unwrap()))
        };
        let difference = (moved(h) - moved(-h)) / (2.0 * h);
        assert!(
            (difference - gradient[i]).abs() < 1e-7 * (1.0 + difference.abs()),
            "entry {i}: {difference} by differences, {} by backward",
            gradient[i]
        );
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let (a, b) = (random(1, 5, 4), random(2, 5, 4));
    assert_gradient(&a, |z| ntxent(z, &b, 0.2, &[]).unwrap());
    assert_gradient(&a, |z| ntxent(&b, z, 0.5, &[]).unwrap());
    assert_gradient(&a, |q| distillation(q, &b, 0.2, &[]).unwrap());
    assert_gradient(&a, |h| feature_cosine(h, &b).unwrap());
    let total = |z: &Tensor| {
        let distilled = distillation(z, &b, 0.3, &[]).unwrap();
        LossTerms::combine(ntxent(z, &b, 0.2, &[]).unwrap(), Some((distilled, 4.0))).unwrap().total
    };
    assert_gradient(&a, total);
}

#[test]
fn no_gradient_reaches_the_teacher() {
    let (q, t) = (Var::from_tensor(&random(1, 6, 4)).unwrap(), Var::from_tensor(&random(2, 6, 4)).unwrap());
    let grads = distillation(q.as_tensor(), t.as_tensor(), 0.2, &[]).unwrap().backward().unwrap();
    assert!(grads.get(q.as_tensor()).is_some());
    assert!(grads.get(t.as_tensor()).is_none());
}

#[test]
fn a_row_of_zeros_has_a_finite_loss_and_gradient() {
    let zeros = Var::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    let other = random(1, 3, 4).to_dtype(DType::F32).unwrap();
    for loss in [
        ntxent(zeros.as_tensor(), &other, 0.2, &[]).unwrap(),
        distillation(zeros.as_tensor(), &other, 0.2, &[]).unwrap(),
    ] {
        let grads = loss.backward().unwrap();
        let gradient = grads.get(zeros.as_tensor()).unwrap().flatten_all().unwrap();
        assert!(value(&loss).is_finite());
        assert!(gradient.to_vec1::<f32>().unwrap().iter().all(|g| g.is_finite()));
    }
}

#[test]
fn a_temperature_that_overflows_exp_stays_finite() {
    let (a, b) = (matrix(&Z1, DType::F32), matrix(&Z2, DType::F32));
    assert!(value(&ntxent(&a, &b, 0.001, &[]).unwrap()).is_finite());
    assert!(value(&distillation(&a, &b, 0.001, &[]).unwrap()).is_finite());
}

#[test]
fn unequal_shapes_are_refused() {
    assert!(ntxent(&random(1, 3, 4), &random(1, 3, 5), 0.2, &[]).is_err());
    assert!(distillation(&random(1, 3, 4), &random(1, 4, 4), 0.2, &[]).is_err());
}

fn permuted(z: &Tensor, order: &[u32]) -> Tensor {
    let order = Tensor::new(order, &Device::Cpu).unwrap();
    z.index_select(&order, 0).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_order_of_frames_and_of_views_does_not_matter(
        seed in 0u64..1000,
        order in Just((0..6u32).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let (a, b) = (random(seed, 6, 5), random(seed + 1000, 6, 5));
        let (pa, pb) = (permuted(&a, &order), permuted(&b, &order));
        let base = value(&ntxent(&a, &b, 0.2, &[]).unwrap());
        prop_assert!((base - value(&ntxent(&pa, &pb, 0.2, &[]).unwrap())).abs() < 1e-12);
        prop_assert!((base - value(&ntxent(&b, &a, 0.2, &[]).unwrap())).abs() < 1e-12);
        let base = value(&distillation(&a, &b, 0.2, &[]).unwrap());
        prop_assert!((base - value(&distillation(&pa, &pb, 0.2, &[]).unwrap())).abs() < 1e-12);
        prop_assert!((base - value(&distillation(&b, &a, 0.2, &[]).unwrap())).abs() < 1e-12);
    }

    #[test]
    fn the_length_of_rows_does_not_matter(seed in 0u64..1000, scale in 0.1f64..50.0) {
        let (a, b) = (random(seed, 4, 5), random(seed + 1000, 4, 5));
        let longer = (&a * scale).unwrap();
        let difference = |x: Tensor, y: Tensor| (value(&x) - value(&y)).abs();
        prop_assert!(difference(ntxent(&a, &b, 0.2, &[]).unwrap(), ntxent(&longer, &b, 0.2, &[]).unwrap()) < 1e-9);
        prop_assert!(
            difference(distillation(&a, &b, 0.2, &[]).unwrap(), distillation(&longer, &b, 0.2, &[]).unwrap()) < 1e-9
        );
    }
}
