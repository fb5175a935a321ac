use super::*;
use crate::eval::golden;
use objective::BLOCK;

#[test]
fn accuracy_and_weights_equal_scikit_learns() {
    let (points, labels, split) = (golden::points(), golden::labels(), golden::halves());
    assert!((linear(&points, &labels, &split) - golden::LINEAR).abs() < 1e-12);

    let x = points.select(&split.bank);
    let targets = (0..60).map(|i| i % 3).collect();
    let problem = Problem::new(&x, &Standardiser::fit(&x), targets, 3, 1.0 / 60.0);
    let weights = lbfgs::minimise(&problem);
    let squared: f64 = weights[..18].iter().map(|weight| weight * weight).sum();
    assert!((squared - golden::WEIGHTS).abs() < 1e-3, "{squared}");
}

#[test]
fn the_gradient_equals_finite_differences() {
    let points = golden::points().select(&(0..20).collect::<Vec<_>>());
    let problem =
        Problem::new(&points, &Standardiser::fit(&points), (0..20).map(|i| i % 3).collect(), 3, 0.1);
    let weights: Vec<f64> = (0..21).map(|i| 0.1 * f64::from(i) - 1.0).collect();
    let (_, gradient) = problem.evaluate(&weights);
    for index in 0..weights.len() {
        let at = |offset: f64| {
            let mut moved = weights.clone();
            moved[index] += offset;
            problem.evaluate(&moved).0
        };
        // Logits are f32: smaller steps would drown in their rounding.
        let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
        assert!((numeric - gradient[index]).abs() < 2e-5, "{index}: {numeric} {}", gradient[index]);
    }
}

#[test]
fn separable_labels_are_learned_from_few_shots() {
    let data = (0..200).flat_map(|i: u32| {
        let noise = (f64::from(i) * 1.7).sin() as f32 * 0.3;
        [if i.is_multiple_of(2) { 1.0 } else { -1.0 } + noise, noise * 2.0, 4.0]
    });
    let points = Embeddings::new(200, 3, data.collect());
    let labels: Vec<u32> = (0..200).map(|i| i % 2).collect();
    let split = Split { bank: (0..100).collect(), queries: (100..200).collect() };
    assert_eq!(linear(&points, &labels, &split), 1.0);
    assert_eq!(few_shot(&points, &labels, &split), 1.0);
}

#[test]
fn a_draw_takes_ten_of_each_label_and_another_draw_others() {
    let labels: Vec<u32> = (0..300).map(|i| if i < 4 { 9 } else { i % 2 }).collect();
    let bank: Vec<usize> = (0..300).collect();
    let drawn = draw_shots(&labels, &bank, 0);
    let count = |label| drawn.iter().filter(|&&row| labels[row] == label).count();
    assert_eq!((count(0), count(1), count(9)), (10, 10, 4));
    assert_eq!(drawn, draw_shots(&labels, &bank, 0));
    assert_ne!(drawn, draw_shots(&labels, &bank, 1));
}

#[test]
fn a_query_whose_label_the_bank_lacks_is_answered_wrongly() {
    let points = Embeddings::new(3, 1, vec![-1.0, 1.0, 1.0]);
    let split = Split { bank: vec![0, 1], queries: vec![1, 2] };
    assert_eq!(linear(&points, &[0, 1, 2], &split), 0.5);
}

/// More rows than one block, labels that overlap: no slope of the objective is left, whatever the preconditioner.
#[test]
fn the_fit_ends_where_the_gradient_is_small() {
    let (rows, dim) = (BLOCK + 70, 5);
    let data = (0..rows * dim).map(|i| ((i * i) as f64 * 0.37).sin() as f32 + (i % 3) as f32).collect();
    let x = Embeddings::new(rows, dim, data);
    let targets = (0..rows).map(|i| (i * i + i / 5) % 3).collect();
    let problem = Problem::new(&x, &Standardiser::fit(&x), targets, 3, 1.0 / rows as f64);
    let (_, gradient) = problem.evaluate(&lbfgs::minimise(&problem));
    assert!(gradient.iter().all(|slope| slope.abs() <= 1e-5), "{gradient:?}");
}

/// All columns say the same, so XᵀX has rank one and what f32 rounds off it is larger than the regularisation.
#[test]
fn a_collapsed_embedding_is_fitted() {
    let (rows, dim) = (6000, 96);
    let side = |i: usize| if i.is_multiple_of(2) { 1.0 } else { -1.0 };
    let data =
        (0..rows * dim).map(|i| (i % dim + 1) as f32 * (side(i / dim) + ((i / dim) as f32).sin() * 0.5));
    let points = Embeddings::new(rows, dim, data.collect());
    let labels: Vec<u32> = (0..rows as u32).map(|i| i % 2).collect();
    let split = Split { bank: (0..5000).collect(), queries: (5000..6000).collect() };
    assert_eq!(linear(&points, &labels, &split), 1.0);
}
