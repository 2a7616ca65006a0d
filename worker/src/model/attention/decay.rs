//! Decay of the heads. Fixed, the same in every block, stored nowhere.
//!
//! Only powers gamma^n with n >= 0 are ever formed, as exp(-slope * n) in fp64 and rounded once: factoring
//! gamma^(t-j) as gamma^t * gamma^-j would overflow.

use tch::{Device, Kind, Tensor};

use crate::model::Decay;

/// s_h = -ln(gamma_h) for each of H query heads.
pub fn slopes(decay: Decay, heads: i64) -> Vec<f64> {
    match decay {
        Decay::Alibi => alibi(heads),
        Decay::Retnet => (0..heads)
            .map(|head| -(-((-5 - head) as f64).exp2()).ln_1p())
            .collect(),
        Decay::None => vec![0.0; heads as usize],
    }
}

/// gamma_h = exp(-s_h).
pub fn gammas(decay: Decay, heads: i64) -> Vec<f64> {
    slopes(decay, heads)
        .into_iter()
        .map(|slope| (-slope).exp())
        .collect()
}

/// s_h = 2^(-8(h+1)/H). Where H is no power of two: the slopes of n heads, n the next lower power, then those of 2n
/// heads at indices 0, 2, 4, ... until there are H.
fn alibi(heads: i64) -> Vec<f64> {
    let regular = |heads: i64| (1..=heads).map(move |h| (-8.0 * h as f64 / heads as f64).exp2());
    let lower = 1 << heads.max(1).ilog2();
    regular(lower)
        .chain(regular(2 * lower).step_by(2))
        .take(heads as usize)
        .collect()
}

/// gamma_h^exponent as [H, ...exponents]: fp64 on the exponents' device, to be rounded by the caller. Exponents must
/// not be negative.
pub fn powers(slopes_h: &[f64], exponents: &Tensor) -> Tensor {
    let mut shape = vec![1; exponents.dim() + 1];
    shape[0] = slopes_h.len() as i64;
    let slopes = Tensor::from_slice(slopes_h)
        .to_device(exponents.device())
        .view(shape.as_slice());
    (exponents.to_kind(Kind::Double).unsqueeze(0) * slopes)
        .neg()
        .exp()
}

/// i - j for i, j in 0..n, 0 where j > i: the age of token j when token i looks at it. [n, n], fp64.
pub fn ages(n: i64, device: Device) -> Tensor {
    let i = Tensor::arange(n, (Kind::Double, device));
    (i.unsqueeze(1) - i.unsqueeze(0)).clamp_min(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log2(slopes: Vec<f64>) -> Vec<f64> {
        slopes.into_iter().map(|slope| slope.log2()).collect()
    }

    #[test]
    fn alibi_takes_any_number_of_heads() {
        assert_eq!(log2(slopes(Decay::Alibi, 1)), [-8.0]);
        assert_eq!(log2(slopes(Decay::Alibi, 4)), [-2.0, -4.0, -6.0, -8.0]);
        assert_eq!(
            log2(slopes(Decay::Alibi, 6)),
            [-2.0, -4.0, -6.0, -8.0, -1.0, -3.0]
        );
        assert_eq!(log2(slopes(Decay::Alibi, 3)), [-4.0, -8.0, -2.0]);
        assert_eq!(slopes(Decay::Alibi, 40).len(), 40);
    }

    #[test]
    fn the_published_model_has_its_decays() {
        let gammas = gammas(Decay::Alibi, 32);
        assert!((gammas[0] - 0.4313).abs() < 1e-4 && (gammas[31] - 0.996101).abs() < 1e-6);
        assert!((gammas[31].powi(2048) - 3.35e-4).abs() < 1e-6);
    }

    #[test]
    fn retnet_and_none() {
        let gammas = gammas(Decay::Retnet, 3);
        for (gamma, expected) in
            gammas
                .iter()
                .zip([1.0 - 1.0 / 32.0, 1.0 - 1.0 / 64.0, 1.0 - 1.0 / 128.0])
        {
            assert!((gamma - expected).abs() < 1e-15);
        }
        assert!(
            slopes(Decay::Retnet, 64).iter().all(|&slope| slope > 0.0),
            "no head loses its decay to rounding"
        );
        assert_eq!(super::gammas(Decay::None, 2), [1.0, 1.0]);
    }
}
