"""Configuration of a SUPRA model (arXiv 2405.06640), in the field names of the published checkpoints."""

from transformers import PretrainedConfig


class SupraConfig(PretrainedConfig):
    """Shape and choices of a model; the defaults are those of Mistral-7B-SUPRA."""

    model_type = "supra"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The library asks for these by its own names.
    attribute_map = {
        "hidden_size": "dim",
        "intermediate_size": "intermediate_dim_ffn",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_heads_kv",
        "max_position_embeddings": "seq_len",
    }

    def __init__(
        self,
        dim: int = 4096,
        intermediate_dim_ffn: int = 14336,
        n_layers: int = 32,
        n_heads: int = 32,
        n_heads_kv: int = 8,
        vocab_size: int = 32000,
        norm_eps: float = 1e-5,
        seq_len: int = 2048,  # positions that it was made for: information, not a limit
        weight_tying: bool = False,
        apply_qk_norm: bool = False,
        use_decay: bool = True,
        use_retnet_slopes: bool = False,
        rotary_base_frequency: float = 10000.0,
        rope_frequencies: str = "exact",  # or "bf16": rounded, as in the released models
        chunk: int = 64,  # tokens of a chunk: speed and memory, not the result
        use_cache: bool = True,
        **kwargs,
    ):
        self.dim = dim
        self.intermediate_dim_ffn = intermediate_dim_ffn
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_heads_kv = n_heads_kv
        self.vocab_size = vocab_size
        self.norm_eps = norm_eps
        self.seq_len = seq_len
        self.weight_tying = weight_tying
        self.apply_qk_norm = apply_qk_norm
        self.use_decay = use_decay
        self.use_retnet_slopes = use_retnet_slopes
        self.rotary_base_frequency = rotary_base_frequency
        self.rope_frequencies = rope_frequencies
        self.chunk = chunk
        self.use_cache = use_cache
        if dim % n_heads or n_heads % n_heads_kv or dim // n_heads % 2:
            raise ValueError(f"{n_heads} heads on {n_heads_kv} key/value heads do not fit a width of {dim}")
        if rope_frequencies not in ("exact", "bf16"):
            raise ValueError(f"rope_frequencies is {rope_frequencies!r}; it must be 'exact' or 'bf16'")
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(**kwargs)
