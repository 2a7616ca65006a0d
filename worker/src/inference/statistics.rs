//! Figures with their standard errors.

use serde::{Deserialize, Serialize};

/// A figure and how far chance may have moved it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its standard error; none where fewer than two things were measured.
    pub stderr: Option<f64>,
}

impl Estimate {
    /// The mean of independent values, with the standard error `s / sqrt(n)`, where `s` is the sample's standard deviation
    /// (divided by `n - 1`): lm-evaluation-harness's `mean_stderr`. None of no values.
    pub fn mean(values: &[f64]) -> Option<Estimate> {
        let n = values.len() as f64;
        (!values.is_empty()).then(|| {
            let value = values.iter().sum::<f64>() / n;
            let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
            let stderr = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
            Estimate { value, stderr }
        })
    }

    /// The mean of all values of several groups. Its standard error is pooled: what chance does inside the groups, which are not
    /// themselves drawn by chance (lm-evaluation-harness's `pooled_sample_stderr`).
    pub fn pooled(groups: &[Vec<f64>]) -> Option<Estimate> {
        let n: usize = groups.iter().map(Vec::len).sum();
        let whole = Estimate::mean(&groups.concat())?;
        let squares: f64 = groups
            .iter()
            .filter_map(|group| Some((group, Estimate::mean(group)?)))
            .map(|(group, mean)| group.iter().map(|x| (x - mean.value).powi(2)).sum::<f64>())
            .sum();
        let free = n.saturating_sub(groups.len());
        let stderr = (free > 0).then(|| (squares / free as f64 / n as f64).sqrt());
        Some(Estimate {
            value: whole.value,
            stderr,
        })
    }

    /// exp of the figure; the error by the first derivative.
    pub fn exp(self) -> Estimate {
        let value = self.value.exp();
        Estimate {
            value,
            stderr: self.stderr.map(|stderr| stderr * value),
        }
    }

    /// The figure and its error times a factor.
    pub fn scaled(self, factor: f64) -> Estimate {
        Estimate {
            value: self.value * factor,
            stderr: self.stderr.map(|stderr| stderr * factor.abs()),
        }
    }
}

/// Sums over one cluster: things that are measured together and depend on each other, such as the tokens of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Sum of what is measured.
    pub sum: f64,
    /// How many parts it has: tokens, bytes.
    pub count: u64,
}

impl Cluster {
    /// One more part.
    pub fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }
}

/// The mean over all parts of all clusters, sum by sum. Only clusters are taken as independent: the error is that of a ratio
/// estimator, `sqrt(m / (m - 1) * sum_c (sum_c - mean * count_c)^2) / count` over the `m` clusters that have parts. None without parts.
pub fn clustered(clusters: &[Cluster]) -> Option<Estimate> {
    let with_parts = || clusters.iter().filter(|cluster| cluster.count > 0);
    let count: u64 = with_parts().map(|cluster| cluster.count).sum();
    (count > 0).then(|| {
        let value = with_parts().map(|cluster| cluster.sum).sum::<f64>() / count as f64;
        let m = with_parts().count() as f64;
        let squares: f64 = with_parts()
            .map(|cluster| (cluster.sum - value * cluster.count as f64).powi(2))
            .sum();
        let stderr = (m > 1.0).then(|| (m / (m - 1.0) * squares).sqrt() / count as f64);
        Estimate { value, stderr }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() < 1e-12, "{found} for {expected}");
    }

    #[test]
    fn means_have_the_harness_s_errors() {
        // Values of lm-evaluation-harness 0.4.13: mean_stderr([1, 0, 1, 1, 0]), pooled_sample_stderr of two groups.
        let mean = Estimate::mean(&[1.0, 0.0, 1.0, 1.0, 0.0]).unwrap();
        assert_eq!(mean.value, 0.6);
        close(mean.stderr, 0.244_948_974_278_317_8);
        let pooled = Estimate::pooled(&[vec![1.0, 0.0, 1.0], vec![0.0, 0.0, 1.0, 1.0]]).unwrap();
        close(Some(pooled.value), 4.0 / 7.0);
        close(pooled.stderr, 0.218_217_890_235_992_4);
        assert_eq!(Estimate::mean(&[2.0]).unwrap().stderr, None);
        assert_eq!(Estimate::mean(&[]), None);
    }

    #[test]
    fn clusters_of_one_part_are_independent_values() {
        let values = [3.0, 1.0, 2.5, 0.5];
        let alone = values.map(|sum| Cluster { sum, count: 1 });
        let (clusters, mean) = (clustered(&alone).unwrap(), Estimate::mean(&values).unwrap());
        close(Some(clusters.value), mean.value);
        close(clusters.stderr, mean.stderr.unwrap());
        // Two copies of each value say no more than one.
        let doubled = values.map(|sum| Cluster {
            sum: 2.0 * sum,
            count: 2,
        });
        close(clustered(&doubled).unwrap().stderr, mean.stderr.unwrap());
        assert_eq!(clustered(&[Cluster::default()]), None);
    }
}
