"""Makes more models than are committed: random shapes of Llama, Mistral and SUPRA, saved in random ways.

    random_models.py ROOT       writes ROOT/.parity/random/parity/*, seeds counted from RANDOM_MODELS_SEED (default: 0)

Files and keys are those of softmax_models.py. `scripts/test-parity` has the worker's tests compute them, and transformers_exports.py
export them.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import supra_models
import torch
from safetensors.torch import save_file
from softmax_models import ROWS, TOKENS, answers, randomize
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.utils import logging

SOFTMAX, SUPRA = 10, 6


def shape(rng: random.Random) -> dict:
    """Heads on key/value heads, all widths but the head's odd multiples."""
    heads = rng.choice([2, 3, 4, 6])
    kv_heads = rng.choice([count for count in range(1, heads + 1) if heads % count == 0])
    return dict(heads=heads, kv_heads=kv_heads, width=8, layers=rng.choice([1, 2, 3]), ffn=rng.choice([24, 56, 88]), vocab=rng.randint(61, 131))


def softmax(rng: random.Random) -> tuple[str, torch.nn.Module]:
    size = shape(rng)
    common = dict(
        hidden_size=size["heads"] * size["width"],
        intermediate_size=size["ffn"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        vocab_size=size["vocab"],
        rope_theta=rng.choice([1e4, 5e5, 1e6]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        tie_word_embeddings=rng.random() < 0.4,
    )
    if rng.random() < 0.5:
        return "llama", AutoModelForCausalLM.from_config(LlamaConfig(**common), attn_implementation="eager")
    config = MistralConfig(**common, head_dim=size["width"], sliding_window=rng.choice([None, 64, 4096]))
    return "mistral", AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def supra(rng: random.Random) -> tuple[str, torch.nn.Module]:
    from huggingface.configuration_supra import SupraConfig
    from huggingface.modeling_supra import SupraForCausalLM

    size = shape(rng)
    # Slopes of ALiBi are there for powers of two.
    heads = rng.choice([2, 4])
    config = SupraConfig(
        dim=heads * size["width"],
        intermediate_dim_ffn=size["ffn"],
        n_layers=size["layers"],
        n_heads=heads,
        n_heads_kv=rng.choice([1, heads // 2, heads]),
        vocab_size=size["vocab"],
        seq_len=256,
        chunk=rng.choice([8, 16, 64]),
        norm_eps=rng.choice([1e-5, 1e-6]),
        apply_qk_norm=rng.random() < 0.5,
        use_decay=rng.random() < 0.7,
        use_retnet_slopes=rng.random() < 0.5,
        weight_tying=rng.random() < 0.4,
        rotary_base_frequency=rng.choice([1e4, 5e5]),
        rope_frequencies=rng.choice(["exact", "bf16"]),
        **supra_models.PUBLISHED,
    )
    return "supra", SupraForCausalLM(config)


def main(root: Path):
    sys.path.insert(0, str(root / "worker/src/model/files"))
    place = root / ".parity/random/parity"
    shutil.rmtree(place, ignore_errors=True)
    first = int(os.environ.get("RANDOM_MODELS_SEED", "0"))
    for number in range(first, first + SOFTMAX + SUPRA):
        rng = random.Random(number)
        kind, model = softmax(rng) if number < first + SOFTMAX else supra(rng)
        # What is saved in half precision comes back rounded; the code of an export saves fp32.
        dtype = torch.float32 if kind == "supra" else rng.choice([torch.float32, torch.float16, torch.bfloat16])
        model.eval()
        vocabulary = model.config.vocab_size
        for seed in range(1000 * number, 1000 * number + 200):
            randomize(model, seed, dtype)
            ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
            if found := answers(model, ids):
                break
        else:
            raise SystemExit(f"{kind} {number}: no seed gives clear answers")
        out = place / f"{kind}-{number}"
        shard = rng.choice(["1GB", "20KB"])
        model.to(dtype).save_pretrained(out, max_shard_size=shard)
        (out / "generation_config.json").unlink(missing_ok=True)
        save_file(found, out / "parity.safetensors")
        print(f"{out.name}: {dtype}, {len(list(out.glob('model*.safetensors')))} files")


if __name__ == "__main__":
    logging.disable_progress_bar()
    main(Path(sys.argv[1]))
