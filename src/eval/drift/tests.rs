use proptest::prelude::*;

use super::*;
use crate::eval::golden;
use crate::eval::random::SplitMix64;

/// Roughly Gaussian: the sum of four uniform draws, variance 1.
fn cloud(rows: usize, dim: usize, seed: u64) -> Embeddings {
    let mut random = SplitMix64::new(seed);
    let mut uniform = || (random.next() >> 40) as f64 / (1_u64 << 24) as f64 - 0.5;
    let data = (0..rows * dim).map(|_| ((0..4).map(|_| uniform()).sum::<f64>() * 3_f64.sqrt()) as f32);
    Embeddings::new(rows, dim, data.collect())
}

/// Rotates the first two columns and scales and shifts all.
fn moved(x: &Embeddings, angle: f32, scale: f32, shift: f32) -> Embeddings {
    let mut data = x.data.clone();
    for row in data.chunks_exact_mut(x.dim) {
        let (a, b) = (row[0], row[1]);
        row[0] = a * angle.cos() - b * angle.sin();
        row[1] = a * angle.sin() + b * angle.cos();
        row.iter_mut().for_each(|value| *value = *value * scale + shift);
    }
    Embeddings::new(x.rows, x.dim, data)
}

/// Of the neighbourhoods in `old`, in `new`.
fn retained(new: &Embeddings, old: &Embeddings, k: usize) -> f64 {
    retention(&Neighbourhoods::of(new, k).retained_from(&Neighbourhoods::of(old, k)))
}

fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() < tolerance, "{got}, not {want}");
}

#[test]
fn every_measure_equals_numpys() {
    let (x, y) = (golden::points(), golden::other_points());
    let (rows, next) = ((0..119).collect::<Vec<_>>(), (1..120).collect::<Vec<_>>());
    // Its products are f32.
    close(linear_cka(&x, &y), golden::CKA, 1e-6);
    close(neighbour_overlap(&x, &y, 10), golden::OVERLAP, 1e-9);
    close(retained(&x, &y, 10), golden::RETENTION, 1e-6);
    close(recoverability(&x, &y, &golden::halves()), golden::RECOVERABILITY, 1e-9);
    close(uniformity(&x), golden::UNIFORMITY, 1e-6);
    close(alignment(&x.select(&rows), &x.select(&next)), golden::ALIGNMENT, 1e-6);
    close(effective_rank(&x), golden::RANK, 1e-6);
}

#[test]
fn an_isotropic_cloud_has_full_rank_and_a_line_rank_one() {
    let full = effective_rank(&cloud(4000, 16, 1));
    assert!((15.9..=16.0).contains(&full), "{full}");
    let line = Embeddings::new(50, 3, (0..50).flat_map(|i| [i as f32, 2.0 * i as f32, 0.0]).collect());
    close(effective_rank(&line), 1.0, 1e-6);
    assert_eq!(effective_rank(&Embeddings::new(5, 3, vec![0.0; 15])), 0.0);
    let wide = effective_rank(&cloud(8, 64, 2));
    assert!((7.0..=8.0).contains(&wide), "rank is bounded by the rows: {wide}");
}

#[test]
fn unrelated_spaces_share_little() {
    let (x, y) = (cloud(1000, 8, 1), cloud(1000, 8, 2));
    assert!(linear_cka(&x, &y) < 0.03);
    assert!(neighbour_overlap(&x, &y, 20) < 0.05);
    assert!(retained(&x, &y, 20).abs() < 0.05);
    let split = Split { bank: (0..500).collect(), queries: (500..1000).collect() };
    assert!(recoverability(&x, &y, &split) < 0.05);
}

/// Cameras that stand still: which of a scene's frames are nearest is noise in every space.
#[test]
fn frames_of_one_scene_that_change_places_are_no_loss() {
    let (scenes, first, second) = (cloud(8, 16, 1), cloud(800, 16, 2), cloud(800, 16, 3));
    let seen = |noise: &Embeddings| {
        let value = |i: usize, j: usize| scenes.row(i / 100)[j] + 0.02 * noise.row(i)[j];
        Embeddings::new(
            800,
            16,
            (0..800).flat_map(|i| (0..16).map(move |j| (i, j))).map(|(i, j)| value(i, j)).collect(),
        )
    };
    let (before, now) = (seen(&first), seen(&second));
    assert!(neighbour_overlap(&now, &before, 20) < 0.3);
    assert!(retained(&now, &before, 20) > 0.99);
    // As many frames that take the places of other scenes' are one.
    let elsewhere: Vec<usize> = (0..800).map(|row| (row * 101) % 800).collect();
    assert!(retained(&now.select(&elsewhere), &before, 20) < 0.2);
}

#[test]
fn chance_retains_nothing_however_few_the_frames() {
    for rows in [24, 60, 400] {
        let mean = (0..20)
            .map(|seed| retained(&cloud(rows, 16, seed), &cloud(rows, 16, seed + 100), 20))
            .sum::<f64>()
            / 20.0;
        assert!(mean.abs() < 0.15, "{rows}: {mean}");
    }
}

#[test]
fn a_constant_embedding_is_uniform_nowhere_and_aligned_with_nothing() {
    let constant = Embeddings::new(10, 4, vec![1.0; 40]);
    assert_eq!(linear_cka(&constant, &cloud(10, 4, 1)), 0.0);
    close(uniformity(&constant), 0.0, 1e-6);
    assert_eq!(
        recoverability(&cloud(10, 4, 1), &constant, &Split { bank: vec![0, 1], queries: vec![2, 3] }),
        0.0
    );
    close(alignment(&constant, &constant), 0.0, 1e-12);
    // There was nothing to be retained.
    assert_eq!(retained(&cloud(10, 4, 1), &Embeddings::new(10, 4, vec![0.0; 40]), 3), 1.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn rotation_and_scale_change_neither_cka_nor_overlap_nor_recoverability(
        angle in 0.0_f32..6.3, scale in 0.1_f32..10.0, shift in -2.0_f32..2.0, seed: u64,
    ) {
        let x = cloud(150, 5, seed);
        let y = moved(&x, angle, scale, shift);
        prop_assert!((linear_cka(&x, &y) - 1.0).abs() < 1e-5);
        // Cosine sees a shift, so the overlap is asked without one.
        prop_assert!(neighbour_overlap(&x, &moved(&x, angle, scale, 0.0), 10) > 0.99);
        prop_assert!(retained(&moved(&x, angle, scale, 0.0), &x, 10) > 0.9999);
        let split = Split { bank: (0..75).collect(), queries: (75..150).collect() };
        prop_assert!(recoverability(&x, &y, &split) > 0.999);
    }

    #[test]
    fn measures_stay_within_their_ranges(seed: u64, rows in 2_usize..60, dim in 1_usize..8) {
        let (x, y) = (cloud(rows, dim, seed), cloud(rows, dim, seed ^ 1));
        prop_assert!((0.0..=1.0 + 1e-6).contains(&linear_cka(&x, &y)));
        prop_assert!((0.0..=1.0).contains(&neighbour_overlap(&x, &y, 5)));
        prop_assert!((-1.0..=1.0 + 1e-9).contains(&retained(&x, &y, 5)));
        prop_assert!((0.0..=4.0001).contains(&alignment(&x, &y)));
        prop_assert!((-8.0001..=1e-6).contains(&uniformity(&x)));
        prop_assert!((1.0 - 1e-9..=rows.min(dim) as f64 + 1e-9).contains(&effective_rank(&x)));
    }
}
