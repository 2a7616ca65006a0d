//! What the held-out loss will be when the budget is spent: a straight line through the newest evaluations over the logarithm
//! of the tokens, a plain function of them.
//!
//! All evaluations of a run read the same windows, so between two of them only the parameters differ, and a handful is enough.
//! Those of the newer half of the training so far count: by then warm-up and the first recovery from the change of attention
//! are past. The learning rate's way down to its final value takes the loss lower than the line, so the forecast errs to the
//! high side; a target is called missed only when even the interval's lower end is above it.

use supra_proto::v1;

/// Fewest evaluations that a forecast follows from.
const FEWEST: usize = 5;

/// The held-out loss at the end of a budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// The expected one, nats per token.
    pub loss: f64,
    /// Between this
    pub low: f64,
    /// and this in 19 of 20 cases, as far as the line holds.
    pub high: f64,
    /// Evaluations that it follows from.
    pub points: u32,
}

impl Forecast {
    /// Even the best that is to be expected does not reach `target`.
    pub fn misses(&self, target: f64) -> bool {
        self.low > target
    }

    /// The same on the wire, beside the target of the run, if it has one.
    pub fn show(&self, target: Option<f64>) -> v1::Forecast {
        v1::Forecast {
            loss: self.loss,
            low: self.low,
            high: self.high,
            points: self.points,
            target,
            missed: target.is_some_and(|target| self.misses(target)),
        }
    }
}

/// The forecast for `end` tokens from losses after so many tokens, in order of tokens. None when they are too few, not
/// numbers, or all from one place.
pub fn forecast(losses: impl IntoIterator<Item = (u64, f64)>, end: u64) -> Option<Forecast> {
    let known: Vec<(u64, f64)> = losses
        .into_iter()
        .filter(|(tokens, loss)| *tokens > 0 && loss.is_finite())
        .collect();
    let (last, _) = *known.last()?;
    let newer = known.iter().filter(|(tokens, _)| *tokens >= last / 2);
    let points: Vec<(f64, f64)> = newer
        .map(|(tokens, loss)| ((*tokens as f64).ln(), *loss))
        .collect();
    if points.len() < FEWEST || end <= last {
        return None;
    }
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x_mean, y_mean) = (mean(|it| it.0), mean(|it| it.1));
    let spread: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
    if spread <= 0.0 {
        return None;
    }
    let slope = points
        .iter()
        .map(|(x, y)| (x - x_mean) * (y - y_mean))
        .sum::<f64>()
        / spread;
    let line = |x: f64| y_mean + slope * (x - x_mean);
    let residuals: f64 = points.iter().map(|(x, y)| (y - line(*x)).powi(2)).sum();
    let x = (end as f64).ln();
    let freedom = points.len() - 2;
    let variance = residuals / freedom as f64 * (1.0 + 1.0 / n + (x - x_mean).powi(2) / spread);
    let (loss, reach) = (line(x), student(freedom) * variance.sqrt());
    Some(Forecast {
        loss: loss.max(0.0),
        low: (loss - reach).max(0.0),
        high: (loss + reach).max(0.0),
        points: points.len() as u32,
    })
}

/// The 0.975 quantile of Student's t distribution with so many degrees of freedom, at least 3: Cornish and Fisher's expansion
/// around the normal quantile, within 1 % of it.
fn student(freedom: usize) -> f64 {
    let (z, f) = (1.959_964_f64, freedom as f64);
    let (z3, z5, z7) = (z.powi(3), z.powi(5), z.powi(7));
    z + (z3 + z) / (4.0 * f)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * f * f)
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * f.powi(3))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVERY: u64 = 1_000_000;

    fn curve(points: u64, loss: impl Fn(f64) -> f64) -> impl Iterator<Item = (u64, f64)> {
        (0..=points).map(move |k| (k * EVERY, loss((k * EVERY) as f64)))
    }

    #[test]
    fn the_quantiles_are_those_of_the_tables() {
        for (freedom, table) in [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)] {
            assert!((student(freedom) / table - 1.0).abs() < 0.01, "{freedom}");
        }
    }

    #[test]
    fn too_little_is_no_forecast() {
        let line = |tokens: f64| 9.0 - 0.3 * tokens.max(1.0).ln();
        assert_eq!(forecast([], 1), None);
        assert_eq!(forecast(curve(7, line), 100 * EVERY), None, "4 points");
        assert!(forecast(curve(8, line), 100 * EVERY).is_some(), "5 points");
        assert_eq!(forecast(curve(8, line), 8 * EVERY), None, "at the end");
        assert_eq!(forecast(curve(20, |_| f64::NAN), 100 * EVERY), None);
        let one_place = std::iter::repeat_n((EVERY, 2.0), 9);
        assert_eq!(forecast(one_place, 100 * EVERY), None);
    }

    #[test]
    fn what_does_not_reach_its_target_is_told_only_when_it_is_clear() {
        let line = |tokens: f64| 9.0 - 0.3 * tokens.max(1.0).ln();
        let clear = forecast(curve(10, line), 100 * EVERY).unwrap();
        let end = line(1e8);
        assert!(clear.misses(end - 0.01) && !clear.misses(end + 0.01));
        let noisy = |tokens: f64| line(tokens) + 0.2 * (tokens / 3e5).sin();
        let unclear = forecast(curve(10, noisy), 100 * EVERY).unwrap();
        assert!(!unclear.misses(end - 0.01), "{unclear:?}");
        assert!(unclear.show(Some(0.1)).missed && !unclear.show(None).missed);
    }

    proptest! {
        #[test]
        fn a_line_is_found_again(
            at_start in 4.0..12.0f64, slope in -0.5..0.1f64, points in 8u64..200, more in 2u64..50,
        ) {
            let line = |tokens: f64| at_start + slope * (tokens.max(1.0) / 1e6).ln();
            let end = points * more * EVERY;
            let found = forecast(curve(points, line), end).unwrap();
            let expected = line(end as f64).max(0.0);
            prop_assert!((found.loss - expected).abs() < 1e-6, "{found:?}, not {expected}");
            prop_assert!(found.high - found.low < 1e-3);
        }

        #[test]
        fn the_interval_holds_the_end_of_a_noisy_line(
            slope in -0.3..0.0f64, noise in prop::collection::vec(-0.01..0.01f64, 33), more in 2u64..10,
        ) {
            let line = |tokens: f64| 3.0 + slope * (tokens.max(1.0) / 1e6).ln();
            let losses = curve(32, line).zip(&noise).map(|((tokens, loss), noise)| (tokens, loss + noise));
            let end = 32 * more * EVERY;
            let found = forecast(losses, end).unwrap();
            prop_assert!(found.low <= found.loss && found.loss <= found.high);
            // Bounded noise: three times the interval never fails.
            let reach = 3.0 * (found.high - found.loss) + 1e-9;
            prop_assert!((found.loss - line(end as f64)).abs() <= reach, "{found:?}");
        }
    }
}
