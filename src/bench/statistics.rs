//! The few statistics of a comparison over seeds: pure functions of numbers.

/// Mean and standard deviation (n - 1) over seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub mean: f64,
    /// `None` of one value.
    pub deviation: Option<f64>,
}

impl Spread {
    /// `None` of no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        Some(Self { mean, deviation })
    }
}

/// A mean with the bounds of its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub mean: f64,
    pub lower: f64,
    pub upper: f64,
}

impl Interval {
    /// Student's interval of the mean of `values`, of which two are the least that have one. Of paired differences it is the
    /// paired t-test's.
    pub fn of(values: &[f64]) -> Option<Self> {
        let Spread { mean, deviation } = Spread::of(values)?;
        let half = quantile(values.len() - 1) * deviation? / (values.len() as f64).sqrt();
        Some(Self { mean, lower: mean - half, upper: mean + half })
    }

    pub fn is_clear_of_zero(&self) -> bool {
        self.lower > 0.0 || self.upper < 0.0
    }
}

/// The ratio of two means of paired values, with the bounds of Fieller's 95 % interval: every ratio r for which the mean of
/// `numerator - r * denominator` is not clear of zero. `None` where the denominator's own mean is not clear of zero, for then any
/// ratio might be.
pub fn ratio(numerator: &[f64], denominator: &[f64]) -> Option<Interval> {
    let (x, y) = (Spread::of(numerator)?, Spread::of(denominator)?);
    let n = numerator.len() as f64;
    let products: f64 = numerator.iter().zip(denominator).map(|(a, b)| (a - x.mean) * (b - y.mean)).sum();
    let covariance = products / (n - 1.0);
    let share = quantile(numerator.len().checked_sub(1).filter(|freedom| *freedom > 0)?).powi(2) / n;
    let a = y.mean.powi(2) - share * y.deviation?.powi(2);
    let b = x.mean * y.mean - share * covariance;
    let c = x.mean.powi(2) - share * x.deviation?.powi(2);
    if a <= 0.0 {
        return None;
    }
    let root = (b * b - a * c).max(0.0).sqrt();
    Some(Interval { mean: x.mean / y.mean, lower: (b - root) / a, upper: (b + root) / a })
}

/// The 97.5 % quantile of Student's distribution with so many degrees of freedom.
fn quantile(freedom: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
        2.045, 2.042,
    ];
    const NORMAL: f64 = 1.959_964;
    match TABLE.get(freedom.wrapping_sub(1)) {
        Some(quantile) => *quantile,
        // The first terms of its expansion in 1 / freedom (Abramowitz & Stegun, 26.7.5).
        None => {
            let (z, n) = (NORMAL, freedom as f64);
            z + (z.powi(3) + z) / (4.0 * n) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * n * n)
        }
    }
}

/// Spearman's rank correlation of pairs, -1..1; equal values share their mean rank. `None` with fewer than three pairs or where
/// one side is constant.
pub fn rank_correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    if pairs.len() < 3 {
        return None;
    }
    let x = ranks(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>());
    let y = ranks(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>());
    let middle = (pairs.len() as f64 + 1.0) / 2.0;
    let product =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum() };
    let scale = (product(&x, &x) * product(&y, &y)).sqrt();
    (scale > 0.0).then(|| product(&x, &y) / scale)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let rank = first as f64 + (equal.len() as f64 + 1.0) / 2.0;
        equal.iter().for_each(|index| ranks[*index] = rank);
        first += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_students() {
        // scipy.stats.t.interval(0.95, 4, loc=3, scale=sqrt(2.5 / 5))
        let interval = Interval::of(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!((interval.lower - 1.036_757).abs() < 5e-4, "{interval:?}");
        assert!((interval.upper - 4.963_243).abs() < 5e-4, "{interval:?}");
        assert!(interval.is_clear_of_zero());
        assert_eq!(Interval::of(&[1.0]), None);
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[2.0]), Some(Spread { mean: 2.0, deviation: None }));
    }

    #[test]
    fn the_quantile_goes_on_where_its_table_ends() {
        // scipy.stats.t.ppf(0.975, [31, 60, 1000])
        for (freedom, expected) in [(31, 2.0395), (60, 2.0003), (1000, 1.9623)] {
            assert!((quantile(freedom) - expected).abs() < 2e-4, "{freedom}: {}", quantile(freedom));
        }
        assert!(quantile(30) > quantile(31));
    }

    #[test]
    fn a_ratios_bounds_are_where_the_difference_is_just_clear_of_zero() {
        let (x, y) = ([1.0, 1.4, 0.8, 2.1, 1.2], [3.0, 3.3, 2.4, 4.6, 3.9]);
        let found = ratio(&x, &y).unwrap();
        assert!((found.mean - 6.5 / 17.2).abs() < 1e-12);
        for bound in [found.lower, found.upper] {
            let differences: Vec<f64> = x.iter().zip(&y).map(|(x, y)| x - bound * y).collect();
            let interval = Interval::of(&differences).unwrap();
            assert!(interval.lower.abs().min(interval.upper.abs()) < 1e-9, "{interval:?}");
        }
        assert_eq!(ratio(&[1.0, 2.0], &[0.1, -0.2]), None);
        assert_eq!(ratio(&[1.0], &[2.0]), None);
    }

    #[test]
    fn ranks_correlate_whatever_the_scale() {
        let pairs = [(1.0, 10.0), (2.0, 100.0), (3.0, 1000.0)];
        assert_eq!(rank_correlation(&pairs), Some(1.0));
        assert_eq!(rank_correlation(&pairs.map(|(a, b)| (a, -b))), Some(-1.0));
        assert_eq!(rank_correlation(&pairs[..2]), None);
        assert_eq!(rank_correlation(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
        // scipy.stats.spearmanr([1, 2, 2, 4], [4, 1, 3, 2])
        let tied = rank_correlation(&[(1.0, 4.0), (2.0, 1.0), (2.0, 3.0), (4.0, 2.0)]).unwrap();
        assert!((tied + 0.632_456).abs() < 1e-6, "{tied}");
    }
}
