//! Rows of logits on a device, of which the host gets what it asks for, once.

use std::cell::OnceCell;

use tch::{Kind, Tensor};

/// Logits [r, V] of several tokens.
pub struct Rows {
    logits_rv: Tensor,
    likeliest: OnceCell<Vec<i64>>,
    host: OnceCell<Tensor>,
}

impl Rows {
    /// Of logits of any kind.
    pub fn new(logits_rv: Tensor) -> Rows {
        Rows {
            logits_rv,
            likeliest: OnceCell::new(),
            host: OnceCell::new(),
        }
    }

    /// The same where the likeliest tokens are known, -1 for a row that is not numbers.
    pub fn with_likeliest(self, tokens: impl IntoIterator<Item = i32>) -> Rows {
        let likeliest = tokens.into_iter().map(i64::from).collect::<Vec<_>>();
        Rows {
            likeliest: OnceCell::from(likeliest),
            ..self
        }
    }

    /// Only those that `rows` names, in ascending order.
    pub fn of(self, rows: &[i64]) -> Option<Rows> {
        if rows.is_empty() {
            return None;
        }
        if rows.len() as i64 == self.logits_rv.size()[0] {
            return Some(self);
        }
        let rows_r = Tensor::from_slice(rows).to_device(self.logits_rv.device());
        let some = Rows::new(self.logits_rv.index_select(0, &rows_r));
        let likeliest = self.likeliest.into_inner();
        Some(Rows {
            likeliest: likeliest.map_or_else(OnceCell::new, |all| {
                OnceCell::from(
                    rows.iter()
                        .map(|&row| all[row as usize])
                        .collect::<Vec<_>>(),
                )
            }),
            ..some
        })
    }

    /// All of them.
    pub fn all(self) -> Tensor {
        self.logits_rv
    }

    /// Some of them, one behind the other.
    pub fn some(&self, first: i64, count: i64) -> Tensor {
        self.logits_rv.narrow(0, first, count)
    }

    /// The likeliest token of a row; none if its logits are not numbers.
    pub fn likeliest(&self, row: usize) -> Option<u32> {
        let all = self.likeliest.get_or_init(|| {
            let (best_r, token_r) = self.logits_rv.max_dim(-1, false);
            let token_r = token_r.masked_fill(&best_r.isnan(), -1);
            let mut tokens = vec![0i64; token_r.numel()];
            token_r.copy_data(&mut tokens, token_r.numel());
            tokens
        });
        u32::try_from(all[row]).ok()
    }

    /// The logits of a row; none if they are not numbers.
    pub fn logits(&self, row: usize) -> Option<Vec<f32>> {
        let all = self.host.get_or_init(|| {
            let host_rv = self.logits_rv.to_device(tch::Device::Cpu);
            host_rv.to_kind(Kind::Float).contiguous()
        });
        let row_v = all.get(row as i64);
        let mut logits = vec![0f32; row_v.numel()];
        row_v.copy_data(&mut logits, row_v.numel());
        (!logits.iter().any(|logit| logit.is_nan())).then_some(logits)
    }
}
