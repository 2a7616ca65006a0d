"""SUPRA (arXiv 2405.06640): a transformer whose attention is linear, and so a recurrent network when it generates.

Attention is o_t = sum over j <= t of gamma^(t-j) (q_t . k_j) v_j with a learned feature map on q and k, a fixed decay
gamma per head and a norm per head of the output. Whole sequences are read in chunks; a chunk of one token is the recurrent
form, whose state S [B, H, d, e] is all that generation remembers: its size does not grow with the text.

Names of tensors end in their shape: B rows, T tokens, D width, H heads, K key/value heads, d and e channels of a head,
C tokens of a chunk.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_supra import SupraConfig

HEAD_NORM_EPS = 1e-5

# What the library calls that which generation remembers: "past_key_values" in its older versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What attention, decay, state and norm statistics are computed in: never in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slopes(config: SupraConfig) -> list[float]:
    """-ln gamma of each head."""
    heads = config.n_heads
    if not config.use_decay:
        return [0.0] * heads
    if config.use_retnet_slopes:
        return [-math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]

    def regular(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    # Where the number of heads is no power of two: those of the next lower one, then every second of twice as many.
    lower = 1 << (heads.bit_length() - 1)
    return (regular(lower) + regular(2 * lower)[::2])[:heads]


class SupraState:
    """What generation remembers of the tokens so far."""

    # The library asks its caches: this one cannot go back to an earlier token, and is no buffer of fixed addresses.
    is_croppable = False
    is_compileable = False
    is_linear = (True,)

    def __init__(self, layers: int):
        # S [B, H, d, e] of each block, already decayed; its keys are rotated and scaled.
        self.layers_bhde: list[Tensor | None] = [None] * layers
        # Position of the next token of each row, and columns read: these count padding, positions do not.
        self.positions_b: Tensor | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> "SupraState":
        """The rows in another order: beam search asks for it."""
        self.layers_bhde = [state.index_select(0, beam_idx.to(state.device)) for state in self.layers_bhde]
        self.positions_b = self.positions_b.index_select(0, beam_idx.to(self.positions_b.device))
        return self


class Tables:
    """What the blocks share: rotary angles of the tokens and powers of the decay."""

    def __init__(self, config: SupraConfig, positions_bt: Tensor, dtype: torch.dtype):
        device, d = positions_bt.device, config.dim // config.n_heads
        pairs = torch.arange(d // 2, dtype=torch.float64)
        frequencies = config.rotary_base_frequency ** (-2.0 * pairs / d)
        if config.rope_frequencies == "bf16":
            frequencies = frequencies.float().bfloat16().double()
        # In fp64 modulo 2 pi, so that far positions are as exact as near ones.
        angles = torch.remainder(positions_bt.double().unsqueeze(-1) * frequencies.to(device), 2 * math.pi)
        self.cos_b1tp = angles.cos().unsqueeze(1).to(dtype)
        self.sin_b1tp = angles.sin().unsqueeze(1).to(dtype)

        self.chunk = min(config.chunk, positions_bt.shape[1])
        slopes_h1 = torch.tensor(slopes(config), dtype=torch.float64, device=device).unsqueeze(1)
        index_c = torch.arange(self.chunk, dtype=torch.float64, device=device)
        # Exponents are never negative, so nothing overflows.
        ages_cc = (index_c.unsqueeze(1) - index_c).clamp_min(0)
        self.within_hcc = torch.exp(-slopes_h1.unsqueeze(2) * ages_cc).tril().to(dtype)
        self.entry_hc1 = torch.exp(-slopes_h1 * index_c).unsqueeze(2).to(dtype)
        self.exit_hc1 = torch.exp(-slopes_h1 * (self.chunk - index_c)).unsqueeze(2).to(dtype)

    def to(self, device: torch.device, **options) -> "Tables":
        """A copy elsewhere: where blocks lie on several devices, what they are given is moved to theirs."""
        moved = copy.copy(self)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        vars(moved).update((name, value.to(device, **options)) for name, value in tensors.items())
        return moved

    def rotate(self, x_bhtd: Tensor, scale: float = 1.0) -> Tensor:
        """Turns channel pairs (i, i + d/2) and multiplies by `scale`, rounding once."""
        first, second = x_bhtd.to(self.cos_b1tp.dtype).chunk(2, -1)
        turned = torch.cat(
            (first * self.cos_b1tp - second * self.sin_b1tp, second * self.cos_b1tp + first * self.sin_b1tp), -1
        )
        return (turned * scale).to(x_bhtd.dtype)

    def mix(self, q_bhtd: Tensor, k_bhtd: Tensor, v_bhte: Tensor, state_bhde: Tensor) -> tuple[Tensor, Tensor]:
        """o [B, H, T, e], and the state behind the tokens: quadratic inside a chunk, recurrent between chunks."""
        mixed = []
        for q, k, v in zip(*(x.split(self.chunk, 2) for x in (q_bhtd, k_bhtd, v_bhte))):
            n = q.shape[2]
            exit_hc1 = self.exit_hc1[:, self.chunk - n :]
            inside = (q @ k.transpose(-2, -1) * self.within_hcc[:, :n, :n]) @ v
            mixed.append(inside + (q * self.entry_hc1[:, :n]) @ state_bhde)
            state_bhde = state_bhde * exit_hc1[:, :1] + (k * exit_hc1).transpose(-2, -1) @ v
        return torch.cat(mixed, 2), state_bhde


class SupraNorm(nn.Module):
    """RMS norm; rounded to the input's precision before the gain is applied, as in the base models."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(wide(x.dtype))
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SupraAttention(nn.Module):
    def __init__(self, config: SupraConfig):
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_heads_kv
        self.d = config.dim // config.n_heads
        queries, keys = self.heads * self.d, self.kv_heads * self.d
        self.in_proj = nn.Linear(config.dim, queries + 2 * keys, bias=False)
        self.out_proj = nn.Linear(queries, config.dim, bias=False)
        # The feature maps: over all heads at once, and shared by q and k where each query head has its own key head.
        self._totrain_embed = nn.Linear(queries, queries)
        self._totrain_embed_kv = nn.Linear(keys, keys) if keys != queries else None
        self._totrain_q_norm = SupraNorm(queries, config.norm_eps) if config.apply_qk_norm else None
        self._totrain_k_norm = SupraNorm(queries, config.norm_eps) if config.apply_qk_norm else None

    def heads_first(self, x_btx: Tensor) -> Tensor:
        return x_btx.unflatten(-1, (-1, self.d)).transpose(1, 2)

    def repeat(self, x_btx: Tensor) -> Tensor:
        """[B, T, K d] to [B, H, T, d]: each key/value head once for every query head that reads it."""
        return self.heads_first(x_btx).repeat_interleave(self.heads // self.kv_heads, 1)

    def forward(
        self, x_btd: Tensor, tables: Tables, real_bt: Tensor | None, state_bhde: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        queries, keys = self.heads * self.d, self.kv_heads * self.d
        q, k, v = self.in_proj(x_btd).split((queries, keys, keys), -1)
        q = F.relu(self._totrain_embed(q))
        k = F.relu((self._totrain_embed_kv or self._totrain_embed)(k))
        q_bhtd, k_bhtd, v_bhte = self.heads_first(q), self.repeat(k), self.repeat(v)
        if self._totrain_q_norm is not None:
            # One norm over the channels of all heads, keys already repeated.
            q_bhtd = self.heads_first(self._totrain_q_norm(q))
            k_bhtd = self.heads_first(self._totrain_k_norm(k_bhtd.transpose(1, 2).flatten(2)))
        q_bhtd, k_bhtd = tables.rotate(q_bhtd), tables.rotate(k_bhtd, self.d**-0.5)
        if real_bt is not None:
            k_bhtd = k_bhtd * real_bt[:, None, :, None]
        dtype = wide(x_btd.dtype)
        # Decay, state and the norm's statistics are fp32, whatever autocast says about the rest.
        with torch.autocast(x_btd.device.type, enabled=False):
            if state_bhde is None:
                state_bhde = q_bhtd.new_zeros((x_btd.shape[0], self.heads, self.d, self.d), dtype=dtype)
            o_bhte, state_bhde = tables.mix(q_bhtd.to(dtype), k_bhtd.to(dtype), v_bhte.to(dtype), state_bhde)
            o_bhte = F.layer_norm(o_bhte, (self.d,), eps=HEAD_NORM_EPS)
        return self.out_proj(o_bhte.to(x_btd.dtype).transpose(1, 2).flatten(2)), state_bhde


class SupraFeedForward(nn.Module):
    def __init__(self, config: SupraConfig):
        super().__init__()
        self.w12 = nn.Linear(config.dim, 2 * config.intermediate_dim_ffn, bias=False)
        self.w3 = nn.Linear(config.intermediate_dim_ffn, config.dim, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        gate, up = self.w12(x_btd).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class SupraBlock(nn.Module):
    def __init__(self, config: SupraConfig):
        super().__init__()
        self.attention_norm = SupraNorm(config.dim, config.norm_eps)
        self.attention = SupraAttention(config)
        self.ffn_norm = SupraNorm(config.dim, config.norm_eps)
        self.feed_forward = SupraFeedForward(config)

    def forward(
        self, x_btd: Tensor, tables: Tables, real_bt: Tensor | None, state_bhde: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mixed_btd, state_bhde = self.attention(self.attention_norm(x_btd), tables, real_bt, state_bhde)
        x_btd = x_btd + mixed_btd
        return x_btd + self.feed_forward(self.ffn_norm(x_btd)), state_bhde


class SupraNetwork(nn.Module):
    """The weights under their published names. A tied model has no output matrix of its own."""

    def __init__(self, config: SupraConfig):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(SupraBlock(config) for _ in range(config.n_layers))
        self.norm = SupraNorm(config.dim, config.norm_eps)
        self.output = None if config.weight_tying else nn.Linear(config.dim, config.vocab_size, bias=False)


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the `tokens` newest columns are no padding; None if all are.

    Padding before a row changes nothing: its keys are left out, and an empty state stays empty. Padding behind a row is
    harmless as long as nobody goes on from the state. In between it would make tokens older than they are.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("attention_mask must be [batch, tokens] of 0 and 1: a recurrent model takes no other mask")
    real_bt = attention_mask[:, -tokens:].bool()
    if bool(real_bt.all()):
        return None
    if bool(((real_bt[:, 1:] != real_bt[:, :-1]).sum(1) > 1).any()):
        raise ValueError("attention_mask has padding between tokens, which a recurrent model cannot skip")
    return real_bt


class SupraForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SupraConfig
    base_model_prefix = "model"
    _no_split_modules = ["SupraBlock"]
    # The state cannot be cut back to an earlier token, as speculative decoding would have to.
    _is_stateful = True

    def __init__(self, config: SupraConfig):
        super().__init__(config)
        self.model = SupraNetwork(config)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Whether the library may make a cache of keys and values."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module):
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.output

    def set_output_embeddings(self, value: nn.Module):
        self.model.output = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: SupraState | None = None,
        past_key_values: SupraState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        position_ids: None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        if position_ids is not None:
            raise ValueError("positions are counted from attention_mask; position_ids cannot be given")
        x_btd = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        b, t = x_btd.shape[:2]
        real_bt = real_tokens(attention_mask, t)
        ends_real = real_bt is None or bool(real_bt[:, -1].all())
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and ends_real
        state = cache if cache is not None else past_key_values
        if state is None and use_cache:
            state = SupraState(self.config.n_layers)
        if state is not None and real_bt is not None and (state.seen or not ends_real):
            raise ValueError(
                "padding would change the state: pad on the left, before everything (tokenizer.padding_side = 'left')"
            )
        steps_bt = torch.arange(1, t + 1, device=x_btd.device).expand(b, t) if real_bt is None else real_bt.cumsum(1)
        begun = state is not None and state.positions_b is not None
        # How many real tokens there are up to each one, itself included; the first real one stands at position 0.
        read_bt = steps_bt + state.positions_b.unsqueeze(1) if begun else steps_bt
        tables = Tables(self.config, (read_bt - 1).clamp_min(0), wide(x_btd.dtype))
        for index, block in enumerate(self.model.layers):
            before = state.layers_bhde[index] if state is not None else None
            x_btd, after = block(x_btd, tables, real_bt, before)
            if state is not None:
                state.layers_bhde[index] = after
        if state is not None:
            state.positions_b, state.seen = read_bt[:, -1], state.seen + t

        x_btd = self.model.norm(x_btd[:, -logits_to_keep:])
        head = self.model.tok_embeddings if self.model.output is None else self.model.output
        logits_btv = F.linear(x_btd, head.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_btv, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_btv, **{CACHE: state})
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        **kwargs,
    ) -> dict:
        """What the network has not read yet, and the state that it goes on from."""
        inputs = {"attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": 1}
        if not use_cache:
            if inputs_embeds is not None:
                raise ValueError("generation from inputs_embeds needs use_cache=True")
            return inputs | {"input_ids": input_ids}
        state = kwargs.get(CACHE)
        seen = state.seen if state is not None else 0
        if seen == 0 and inputs_embeds is not None:
            return inputs | {"inputs_embeds": inputs_embeds}
        # The mask counts what was read as embeddings; input_ids does not.
        columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        return inputs | {"input_ids": input_ids[:, seen - columns :], CACHE: state}
