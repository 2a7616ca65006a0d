//! How likely given tokens are.

use tch::{Kind, Tensor};

/// How likely the model finds a token.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// Whether no other token is likelier.
    pub greedy: bool,
    /// The likeliest tokens with the logarithms of their probabilities, from the likeliest on.
    pub top: Vec<(u32, f64)>,
}

/// The score of one token per row of logits [r, V], with the `top` likeliest ones; none if logits are not numbers.
pub fn scores(logits_rv: &Tensor, tokens: &[u32], top: usize) -> Option<Vec<Score>> {
    let kind = match logits_rv.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let logprobs_rv = logits_rv.log_softmax(-1, kind);
    let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let ids_r1 = Tensor::from_slice(&ids)
        .unsqueeze(1)
        .to_device(logits_rv.device());
    let own = host(&logprobs_rv.gather(1, &ids_r1, false));
    if own.iter().any(|logprob| logprob.is_nan()) {
        return None;
    }
    let count = (top as i64).clamp(1, logprobs_rv.size()[1]);
    let (best_rk, tokens_rk) = logprobs_rv.topk(count, -1, true, true);
    let (best, likeliest) = (host(&best_rk), host(&tokens_rk));
    let row = |(at, &logprob): (usize, &f64)| {
        let first = at * count as usize;
        let best = &best[first..first + count as usize];
        let named = likeliest[first..].iter().map(|&token| token as u32);
        Score {
            logprob,
            greedy: logprob >= best[0],
            top: named.zip(best.iter().copied()).take(top).collect(),
        }
    };
    Some(own.iter().enumerate().map(row).collect())
}

fn host(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.reshape([-1]).to_kind(Kind::Double);
    let mut numbers = vec![0f64; flat.numel()];
    flat.copy_data(&mut numbers, flat.numel());
    numbers
}
