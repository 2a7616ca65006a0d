//! The chunkwise form: quadratic inside chunks of C tokens, recurrent between them.
//!
//! With S the state on entry to a chunk and i its local index,
//!
//!     O  = ((Q K^T) * M_C) V + diag(gamma^i) Q S
//!     S' = gamma^C S + (diag(gamma^(C-i)) K)^T V
//!
//! The recurrence over chunks is itself linear with constant coefficients. So there is no loop: with the boundaries
//! b_0 = 0, b_1 = C, ..., b_N = T and U_m the contribution of chunk m to the state at its end, all states at once are
//!
//!     S_n = gamma^(b_n - b_0) S_0 + sum over m < n of gamma^(b_n - b_{m+1}) U_m,
//!
//! one product with a lower-triangular matrix per head. The last chunk may be short; its rows are padded with zero keys,
//! and b_N = T keeps the final state right. Every decay exponent is relative and not negative.
//!
//! Documents only put zeros into these tables: a token reads a chunk's entry state if its document is the one that was
//! running at the boundary, and likewise for what a token writes and what a boundary hands on.

use tch::{Device, Kind, Tensor};

use super::decay::{ages, powers};
use super::features::repeat_heads;
use super::ragged::Piece;

/// The decay tables of a batch, shared by all blocks. `x` stands for 1 without documents, for B with them.
#[derive(Debug)]
pub struct Chunkwise {
    tokens: i64,
    chunk: i64,
    chunks: i64,
    /// gamma^(i-j) inside a chunk: [x, H, 1 or N, C, C].
    within: Tensor,
    /// gamma^i, what a token reads of the entry state: [x, H, 1 or N, C, 1].
    entry: Tensor,
    /// gamma^(b_{n+1} - t), what a token leaves in the state at the end of its chunk: [x, H, N, C, 1].
    exit: Tensor,
    /// gamma^(b_n - b_m) for m <= n, what boundary n has of boundary m: [x, H, N+1, N+1].
    carry: Tensor,
}

impl Chunkwise {
    /// For rows of `tokens` tokens in chunks of `chunk`, with the segments [B, T] of documents if there are any; computes
    /// in `kind`.
    pub fn new(
        slopes_h: &[f64],
        chunk: i64,
        tokens: i64,
        segments_bt: Option<&Tensor>,
        (kind, device): (Kind, Device),
    ) -> Chunkwise {
        let chunk = chunk.min(tokens);
        let chunks = (tokens + chunk - 1) / chunk;
        let double = (Kind::Double, device);
        let local_c = Tensor::arange(chunk, double);
        let boundaries = (Tensor::arange(chunks + 1, double) * chunk).clamp_max(tokens as f64);
        let token_nc = boundaries.narrow(0, 0, chunks).unsqueeze(1) + &local_c;
        // Negative only for padding, where the key is 0 anyway.
        let to_exit_nc = (boundaries.narrow(0, 1, chunks).unsqueeze(1) - token_nc).clamp_min(0.0);
        let between = (boundaries.unsqueeze(1) - boundaries.unsqueeze(0)).clamp_min(0.0);

        let table = |exponents: &Tensor| powers(slopes_h, exponents).unsqueeze(0);
        let tables = Chunkwise {
            tokens,
            chunk,
            chunks,
            within: table(&ages(chunk, device))
                .tril(0)
                .unsqueeze(2)
                .to_kind(kind),
            entry: table(&local_c).view([1, -1, 1, chunk, 1]).to_kind(kind),
            exit: table(&to_exit_nc).unsqueeze(-1).to_kind(kind),
            carry: table(&between).tril(0).to_kind(kind),
        };
        match segments_bt {
            Some(segments_bt) => tables.cut_at(segments_bt),
            None => tables,
        }
    }

    /// Takes out everything that would cross the start of a document.
    fn cut_at(self, segments_bt: &Tensor) -> Chunkwise {
        let (n, c) = (self.chunks, self.chunk);
        let b = segments_bt.size()[0];
        let last = segments_bt
            .narrow(1, self.tokens - 1, 1)
            .expand([b, n * c - self.tokens], false);
        let segments_bnc = Tensor::cat(&[segments_bt, &last], 1).view([b, n, c]);
        // The document running at each boundary: segment 0 before the row, else that of the token before the boundary.
        let running_bn = Tensor::cat(
            &[
                segments_bnc.select(2, 0).narrow(1, 0, 1).zeros_like(),
                segments_bnc.select(2, c - 1),
            ],
            1,
        );
        let same = |left: &Tensor, right: &Tensor| left.eq_tensor(right).unsqueeze(1);
        let at_start = running_bn.narrow(1, 0, n).unsqueeze(2);
        let at_end = running_bn.narrow(1, 1, n).unsqueeze(2);
        Chunkwise {
            within: &self.within * same(&segments_bnc.unsqueeze(3), &segments_bnc.unsqueeze(2)),
            entry: &self.entry * same(&segments_bnc, &at_start).unsqueeze(-1),
            exit: &self.exit * same(&segments_bnc, &at_end).unsqueeze(-1),
            carry: &self.carry * same(&running_bn.unsqueeze(2), &running_bn.unsqueeze(1)),
            ..self
        }
    }

    /// o [B, H, T, e] of q, k [B, H, T, d] and v [B, H, T, e]; k already scaled.
    pub fn mix(&self, q_bhtd: &Tensor, k_bhtd: &Tensor, v_bhte: &Tensor) -> Tensor {
        let (q, k, v) = (self.cut(q_bhtd), self.cut(k_bhtd), self.cut(v_bhte));
        let mut o = self.inside(&q, &k, &v);
        if self.chunks > 1 {
            let _ = o.g_add_(&(q * &self.entry).matmul(&self.states(&k, &v)));
        }
        self.join(&o)
    }

    /// Gradients of q, k, v from that of [`mix`](Chunkwise::mix)'s result, of the same shapes. With P = (Q K^T) * M_C,
    /// dP = (dO V^T) * M_C, S the entry states, U what chunks leave, and their gradients dS and dU:
    ///
    ///     dQ = dP K   + diag(gamma^i) dO S^T
    ///     dK = dP^T Q + diag(gamma^(C-i)) V dU^T
    ///     dV = P^T dO + diag(gamma^(C-i)) K dU
    ///     dS = (diag(gamma^i) Q)^T dO, handed back to dU as U was handed on to S.
    pub fn mix_backward(
        &self,
        [q_bhtd, k_bhtd, v_bhte]: [&Tensor; 3],
        do_bhte: &Tensor,
    ) -> [Tensor; 3] {
        let (q, k, v) = (self.cut(q_bhtd), self.cut(k_bhtd), self.cut(v_bhte));
        let d_o = self.cut(do_bhte);
        let weights = self.weights(&q, &k);
        let dweights = self.weights(&d_o, &v);
        let mut dq = dweights.matmul(&k);
        let mut dk = dweights.transpose(-2, -1).matmul(&q);
        let mut dv = weights.transpose(-2, -1).matmul(&d_o);
        if self.chunks > 1 {
            let states = self.states(&k, &v);
            let dstates = (q * &self.entry).transpose(-2, -1).matmul(&d_o);
            let dleft = hand_on(&self.to_entries().transpose(-2, -1), &dstates);
            let _ = dq.addcmul_(&d_o.matmul(&states.transpose(-2, -1)), &self.entry);
            let _ = dk.addcmul_(&v.matmul(&dleft.transpose(-2, -1)), &self.exit);
            let _ = dv.g_add_(&(k * &self.exit).matmul(&dleft));
        }
        [dq, dk, dv].map(|x| self.join(&x))
    }

    /// [`mix`](Chunkwise::mix) going on from the state S_0 [B, H, d, e] before the row; also returns the state after it.
    pub fn mix_from(
        &self,
        q_bhtd: &Tensor,
        k_bhtd: &Tensor,
        v_bhte: &Tensor,
        state_bhde: &Tensor,
    ) -> (Tensor, Tensor) {
        let (q, k, v) = (self.cut(q_bhtd), self.cut(k_bhtd), self.cut(v_bhte));
        let left = Tensor::cat(&[state_bhde.unsqueeze(2), self.leave(&k, &v)], 2);
        let states = hand_on(&self.carry, &left);
        let read = (&q * &self.entry).matmul(&states.narrow(2, 0, self.chunks));
        (
            self.join(&(self.inside(&q, &k, &v) + read)),
            states.select(2, self.chunks),
        )
    }

    /// The same for a piece of a sequence.
    pub fn go_on(&self, piece: Piece<'_>) {
        let [q_1htd, k_1ktd, v_1kte] = piece.qkv;
        let heads = q_1htd.size()[1];
        let [k, v] = [k_1ktd, v_1kte].map(|x| repeat_heads(x, heads));
        let (o, after) = self.mix_from(q_1htd, &k, &v, piece.state);
        piece.o.copy_(&o);
        piece.state.copy_(&after);
    }

    /// [B, H, T, d] to [B, H, N, C, d], in the kind of the tables.
    fn cut(&self, x_bhtd: &Tensor) -> Tensor {
        let size = x_bhtd.size();
        let padding = self.chunks * self.chunk - self.tokens;
        let x = x_bhtd.to_kind(self.within.kind());
        let x = if padding == 0 {
            x
        } else {
            x.constant_pad_nd([0, 0, 0, padding].as_slice())
        };
        x.reshape([size[0], size[1], self.chunks, self.chunk, size[3]])
    }

    /// [B, H, N, C, e] back to [B, H, T, e].
    fn join(&self, o_bhnce: &Tensor) -> Tensor {
        o_bhnce.flatten(2, 3).narrow(2, 0, self.tokens)
    }

    /// What tokens have of those in their own chunk: ((Q K^T) * M_C) V.
    fn inside(&self, q_bhncd: &Tensor, k_bhncd: &Tensor, v_bhnce: &Tensor) -> Tensor {
        self.weights(q_bhncd, k_bhncd).matmul(v_bhnce)
    }

    /// (Q K^T) * M_C: [B, H, N, C, C].
    fn weights(&self, q_bhncd: &Tensor, k_bhncd: &Tensor) -> Tensor {
        q_bhncd
            .matmul(&k_bhncd.transpose(-2, -1))
            .g_mul_(&self.within)
    }

    /// S [B, H, N, d, e]: the state on entry to each chunk. The first enters with nothing.
    fn states(&self, k_bhncd: &Tensor, v_bhnce: &Tensor) -> Tensor {
        hand_on(&self.to_entries(), &self.leave(k_bhncd, v_bhnce))
    }

    /// The part of `carry` that leads from what chunks leave to entry states: [x, H, N, N], strictly lower triangular.
    fn to_entries(&self) -> Tensor {
        self.carry
            .narrow(2, 0, self.chunks)
            .narrow(3, 1, self.chunks)
    }

    /// U [B, H, N, d, e]: what each chunk alone leaves in the state at its end.
    fn leave(&self, k_bhncd: &Tensor, v_bhnce: &Tensor) -> Tensor {
        (k_bhncd * &self.exit).transpose(-2, -1).matmul(v_bhnce)
    }
}

/// The states [B, H, N, d, e] at boundaries from what was left at earlier ones.
fn hand_on(carry_xhnn: &Tensor, left_bhnde: &Tensor) -> Tensor {
    let size = left_bhnde.size();
    carry_xhnn
        .matmul(&left_bhnde.flatten(3, 4))
        .view([size[0], size[1], -1, size[3], size[4]])
}
