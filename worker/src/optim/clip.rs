//! The size of a gradient and how much of it is let through.

use tch::{Kind, Tensor};

use super::chunks;

/// The L2 norm of a flat fp32 gradient, accumulated in fp64.
///
/// Its last bits depend on the device and the thread count, so ranks agree on one rank's value.
pub fn norm(gradient: &Tensor) -> f64 {
    let squares = chunks(gradient.size()[0]).map(|(start, length)| {
        let norm = gradient
            .narrow(0, start, length)
            .norm_scalaropt_dtype(2, Kind::Double)
            .double_value(&[]);
        norm * norm
    });
    squares.sum::<f64>().sqrt()
}

/// The factor that brings a gradient of this norm to at most `limit`.
pub fn coefficient(norm: f64, limit: f64) -> f64 {
    if norm > limit { limit / norm } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_spans_chunks() {
        let elements = super::super::CHUNK + 7;
        let gradient = Tensor::full([elements], 2.0, (Kind::Float, tch::Device::Cpu));
        assert!((norm(&gradient) - 2.0 * (elements as f64).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn large_values_do_not_overflow_and_nan_shows() {
        let gradient = Tensor::from_slice(&[1e30f32, 1e30]);
        assert!((norm(&gradient) / 2f64.sqrt() / 1e30 - 1.0).abs() < 1e-6);
        assert!(norm(&Tensor::from_slice(&[1.0f32, f32::NAN])).is_nan());
        assert!(norm(&Tensor::from_slice(&[1.0f32, f32::INFINITY])).is_infinite());
    }

    #[test]
    fn only_large_gradients_are_clipped() {
        assert_eq!(coefficient(0.5, 1.0), 1.0);
        assert_eq!(coefficient(4.0, 1.0), 0.25);
    }
}
