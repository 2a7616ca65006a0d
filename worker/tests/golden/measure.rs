//! Differences, and the bounds they must keep.

use tch::{Kind, Tensor};

fn wide(tensor: &Tensor) -> Tensor {
    tensor.detach().to_kind(Kind::Double)
}

/// Both in fp64, of the same shape.
fn pair(found: &Tensor, golden: &Tensor) -> (Tensor, Tensor) {
    assert_eq!(found.size(), golden.size());
    (wide(found), wide(golden))
}

fn number(tensor: Tensor) -> f64 {
    tensor.double_value(&[])
}

/// Largest difference.
pub fn max_abs(found: &Tensor, golden: &Tensor) -> f64 {
    let (found, golden) = pair(found, golden);
    number((found - golden).abs().max())
}

/// Largest difference over largest value.
pub fn max_relative(found: &Tensor, golden: &Tensor) -> f64 {
    max_abs(found, golden) / number(wide(golden).abs().max())
}

/// Relative L2, which is relative RMSE as well.
pub fn l2_relative(found: &Tensor, golden: &Tensor) -> f64 {
    let (found, golden) = pair(found, golden);
    number((found - &golden).norm()) / number(golden.norm())
}

/// Relative difference of two numbers.
pub fn relative(found: f64, golden: f64) -> f64 {
    ((found - golden) / golden).abs()
}

/// Measured errors of one fixture; panics at the end if any is too large, after all are printed.
pub struct Verdict {
    title: String,
    failures: Vec<String>,
}

impl Verdict {
    pub fn new(title: impl Into<String>) -> Verdict {
        Verdict {
            title: title.into(),
            failures: Vec::new(),
        }
    }

    /// A NaN is too large.
    pub fn bound(&mut self, what: &str, error: f64, bound: f64) {
        let line = format!("{}: {what}: {error:.1e} of {bound:.0e}", self.title);
        println!("{line}");
        if error.is_nan() || error > bound {
            self.failures.push(line);
        }
    }

    pub fn close(self) {
        assert!(
            self.failures.is_empty(),
            "out of bounds:\n{}",
            self.failures.join("\n")
        );
    }
}
