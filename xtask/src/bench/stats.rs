//! Ratios of costs within cycles: their median, and how sure it is.

/// Resamples of the bootstrap: enough for the third digit of a 95 % interval.
const RESAMPLES: usize = 2_000;

/// A ratio (or a difference) with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Median over the cycles.
    pub median: f64,
    /// 2.5th percentile of the resampled medians.
    pub lo: f64,
    /// 97.5th percentile.
    pub hi: f64,
}

/// Median of `values`; none of an empty list.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((upper + sorted.get(middle - 1)?) / 2.0)
}

/// Ratio of the costs `of` to the costs `to`, which are of the same cycles in the same order.
pub fn ratio(of: &[f64], to: &[f64]) -> Option<Ratio> {
    let ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
    interval(&ratios)
}

/// By how much the costs `of` are more than the costs `to`; see [`ratio`].
pub fn difference(of: &[f64], to: &[f64]) -> Option<Ratio> {
    let differences: Vec<f64> = of.iter().zip(to).map(|(of, to)| of - to).collect();
    interval(&differences)
}

/// The same numbers give the same interval: the resampling starts from a fixed seed.
fn interval(values: &[f64]) -> Option<Ratio> {
    let middle = median(values)?;
    let mut random = fastrand::Rng::with_seed(1);
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            let resampled: Vec<f64> = (0..values.len())
                .filter_map(|_| values.get(random.usize(..values.len())).copied())
                .collect();
            median(&resampled)
        })
        .collect();
    medians.sort_unstable_by(f64::total_cmp);
    Some(Ratio {
        median: middle,
        lo: *medians.get(RESAMPLES / 40)?,
        hi: *medians.get(RESAMPLES - 1 - RESAMPLES / 40)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_lists() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_ratio_is_taken_within_cycles() {
        // The machine slows down eightfold, and the ratio stays.
        let to: Vec<f64> = (0..200)
            .map(|cycle| 1.0 + f64::from(cycle) / 25.0)
            .collect();
        let of: Vec<f64> = to.iter().map(|cost| cost * 1.25).collect();
        let ratio = ratio(&of, &to).unwrap();
        assert!((ratio.median - 1.25).abs() < 1e-9);
        assert!((ratio.hi - ratio.lo).abs() < 1e-9);
    }

    #[test]
    fn the_interval_covers_the_truth_and_not_everything() {
        let mut random = fastrand::Rng::with_seed(7);
        let to = vec![100.0; 100];
        let mut covered = 0;
        for _ in 0..10 {
            let of: Vec<f64> = (0..100).map(|_| 95.0 + 20.0 * random.f64()).collect();
            let ratio = ratio(&of, &to).unwrap();
            covered += u32::from(ratio.lo < 1.05 && 1.05 < ratio.hi);
            assert!(ratio.hi - ratio.lo < 0.07, "{ratio:?}");
        }
        assert!(covered >= 8, "{covered} of 10");
    }
}
