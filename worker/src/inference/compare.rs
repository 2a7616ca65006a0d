//! Whether a model's forms agree on a text: parallel, chunkwise and token by token.

use std::fmt;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{
    engine::{Engine, EngineError, Output, Piece, Want},
    load::LoadedModel,
};
use crate::model::{Form, Params};

/// Most tokens of a text that are compared: the parallel form needs memory by the square of their number.
pub const MOST_TOKENS: usize = 4096;

/// Logits of two forms may differ by so much in fp32, times the greatest of them where that is above 1.
const IN_FP32: f64 = 5e-4;

/// Forms may differ by so many times the smaller of their own distances to fp32 where they compute in bf16. Two roundings that
/// have nothing to do with each other are 1.41 times as far apart as each is from the truth.
const OF_OWN_DISTANCE: f64 = 1.5;

/// A form of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ComparedForm {
    /// The whole text at once, every token with every earlier one, without any memory.
    Parallel,
    /// As prompts are read: the whole text at once, by chunks that hand a state over. A softmax model fills its cache.
    Chunkwise,
    /// As texts are continued: token by token, from the state. A softmax model reads its cache.
    Recurrent,
}

impl ComparedForm {
    /// All of them.
    pub const ALL: [ComparedForm; 3] = [
        ComparedForm::Parallel,
        ComparedForm::Chunkwise,
        ComparedForm::Recurrent,
    ];

    fn name(self) -> &'static str {
        match self {
            ComparedForm::Parallel => "parallel",
            ComparedForm::Chunkwise => "chunkwise",
            ComparedForm::Recurrent => "recurrent",
        }
    }
}

/// How far two forms are apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Apart {
    /// Which two.
    pub forms: [ComparedForm; 2],
    /// Greatest difference of two logits.
    pub max_abs: f64,
    /// Root mean square of the differences over that of the logits.
    pub relative_rmse: f64,
    /// Positions at which both have the same likeliest token.
    pub greedy_agree: i64,
    /// What may be apart: of `max_abs`, or in bf16 of `relative_rmse`.
    pub bound: f64,
    /// Whether it is within the bound.
    pub agree: bool,
}

/// The forms of a model on one text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Tokens compared: the first ones of the text.
    pub tokens: usize,
    /// Tokens of the text.
    pub of_tokens: usize,
    /// Greatest logit of the parallel form, either sign.
    pub max_logit: f64,
    /// In bf16, the relative RMSE of each form to fp32 on the same weights, in the order of [`ComparedForm::ALL`].
    pub to_fp32: Option<[f64; 3]>,
    /// Every two forms.
    pub apart: Vec<Apart>,
}

impl Comparison {
    /// Whether all forms agree within the bounds.
    pub fn agree(&self) -> bool {
        self.apart.iter().all(|apart| apart.agree)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = match self.tokens < self.of_tokens {
            true => format!(" of {}", self.of_tokens),
            false => String::new(),
        };
        writeln!(
            f,
            "logits of {}{rest} tokens in three forms, greatest {:.3}",
            self.tokens, self.max_logit
        )?;
        writeln!(
            f,
            "{:<24} {:>10} {:>10} {:>10}  same likeliest token",
            "", "max abs", "rel. RMSE", "bound"
        )?;
        for apart in &self.apart {
            let names = apart.forms.map(ComparedForm::name).join(" - ");
            writeln!(
                f,
                "{names:<24} {:>10.2e} {:>10.2e} {:>10.2e}  at {} of {}{}",
                apart.max_abs,
                apart.relative_rmse,
                apart.bound,
                apart.greedy_agree,
                self.tokens,
                if apart.agree { "" } else { "; TOO FAR APART" }
            )?;
        }
        match self.to_fp32 {
            None => write!(f, "bound on max abs"),
            Some(own) => write!(
                f,
                "bound on the relative RMSE, {OF_OWN_DISTANCE} times the smaller distance of the two to fp32: {}",
                ComparedForm::ALL
                    .map(ComparedForm::name)
                    .iter()
                    .zip(own)
                    .map(|(name, own)| format!("{name} {own:.2e}"))
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }
}

/// Reads the first [`MOST_TOKENS`] tokens of a text in every form. In fp32 logits may differ by 5e-4, times the greatest logit where
/// that is above 1. In bf16 forms round differently: they may be 1.5 times as far apart as each is
/// from fp32 on the same weights, of which a copy is made for it.
///
/// # Errors
///
/// The text has tokens that the model does not, or logits are not numbers.
pub fn compare(engine: &mut Engine, tokens: &[u32]) -> Result<Comparison, EngineError> {
    let read = &tokens[..tokens.len().min(MOST_TOKENS)];
    let recurrent_tv = token_by_token(engine, read)?;
    let chunkwise_tv = wide(&engine.logits_of(read)?);
    let model = engine.model();
    tch::no_grad(|| {
        let ids: Vec<i64> = read.iter().map(|&token| token.into()).collect();
        let ids_t = Tensor::from_slice(&ids).to_device(model.params.device());
        let forms = [
            wide(&parallel(model, &model.params, &ids_t)),
            chunkwise_tv,
            recurrent_tv,
        ];
        let to_fp32 = (model.params.kind() == Kind::BFloat16).then(|| {
            let params = model.params.to(model.params.device(), Kind::Float);
            let exact_tv = wide(&parallel(model, &params, &ids_t));
            forms
                .each_ref()
                .map(|form_tv| relative_rmse(form_tv, &exact_tv))
        });
        Ok(Comparison {
            tokens: read.len(),
            of_tokens: tokens.len(),
            max_logit: number(&forms[0].abs().max()),
            apart: [(0, 1), (0, 2), (1, 2)]
                .map(|(a, b)| apart((a, b), &forms, to_fp32))
                .into(),
            to_fp32,
        })
    })
}

/// Logits [T, V] on the host, of each token by itself.
fn token_by_token(engine: &mut Engine, tokens: &[u32]) -> Result<Tensor, EngineError> {
    let slots = engine.slots();
    let slot = engine.open().ok_or(EngineError::Full { slots })?;
    let rows = tokens.iter().map(|token| {
        let piece = Piece {
            slot: &slot,
            tokens: std::slice::from_ref(token),
            want: Want::Logits,
        };
        match engine.advance(&[piece])?.pop() {
            Some(Output::Logits(logits_v)) => Ok(Tensor::from_slice(&logits_v)),
            other => unreachable!("invariant: logits were wanted, not {other:?}"),
        }
    });
    let rows: Result<Vec<Tensor>, EngineError> = rows.collect();
    engine.close(slot);
    Ok(Tensor::stack(&rows?, 0))
}

fn parallel(model: &LoadedModel, params: &Params, ids_t: &Tensor) -> Tensor {
    let form = model.transformer.clone().with_form(Form::Parallel);
    form.logits(params, &ids_t.unsqueeze(0), None)
        .squeeze_dim(0)
}

fn apart((a, b): (usize, usize), forms: &[Tensor; 3], to_fp32: Option<[f64; 3]>) -> Apart {
    let (a_tv, b_tv) = (&forms[a], &forms[b]);
    let max_abs = number(&(b_tv - a_tv).abs().max());
    let relative_rmse = relative_rmse(b_tv, a_tv);
    let (found, bound) = match to_fp32 {
        Some(own) => (relative_rmse, OF_OWN_DISTANCE * own[a].min(own[b])),
        None => (max_abs, IN_FP32 * number(&a_tv.abs().max()).max(1.0)),
    };
    let same_t = a_tv.argmax(-1, false).eq_tensor(&b_tv.argmax(-1, false));
    Apart {
        forms: [ComparedForm::ALL[a], ComparedForm::ALL[b]],
        max_abs,
        relative_rmse,
        greedy_agree: same_t.sum(Kind::Int64).int64_value(&[]),
        bound,
        agree: found <= bound,
    }
}

fn relative_rmse(found_tv: &Tensor, expected_tv: &Tensor) -> f64 {
    number(&(found_tv - expected_tv).norm()) / number(&expected_tv.norm())
}

fn wide(logits_tv: &Tensor) -> Tensor {
    logits_tv.to_kind(Kind::Float).to_device(Device::Cpu)
}

fn number(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forms(difference: f64) -> [Tensor; 3] {
        let logits_tv = Tensor::from_slice2(&[[1f32, 4.0, -2.0], [3.0, -3.0, 0.0]]);
        [&logits_tv + 0.0, &logits_tv + 0.0, &logits_tv + difference]
    }

    #[test]
    fn what_the_number_format_does_not_explain_is_too_far_apart() {
        for (difference, agree) in [
            (0.0, true),
            (1.9e-3, true),
            (2.1e-3, false),
            (f64::NAN, false),
        ] {
            let found = apart((0, 2), &forms(difference), None);
            assert_eq!(found.agree, agree, "{difference}: {found:?}");
        }
        // The RMS of the logits is 2.55.
        let far = forms(0.1);
        assert!(apart((0, 2), &far, Some([0.03, 0.0, 0.03])).agree);
        assert!(!apart((0, 2), &far, Some([0.03, 0.0, 0.02])).agree);
        assert_eq!(apart((0, 1), &far, None).greedy_agree, 2);
    }
}
