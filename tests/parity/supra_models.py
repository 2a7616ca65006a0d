"""Makes small random SUPRA models, and what the exported code computes with them under the transformers library.

    supra_models.py ROOT        writes ROOT/tests/golden/parity/supra-*

The choices that the fixtures of linear_open_lm's formulas leave out: norms of queries and keys, other decays, rotary frequencies
rounded to bf16, tied embeddings. Files and keys are those of softmax_models.py; the weights have the names of an export.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from softmax_models import ROWS, TOKENS, answers, randomize

SIZES = dict(dim=32, intermediate_dim_ffn=56, n_layers=2, n_heads=4, vocab_size=71, seq_len=256)

MODELS = {
    "supra-mha-norms": dict(n_heads_kv=4, chunk=16, apply_qk_norm=True, use_retnet_slopes=True, norm_eps=1e-6),
    "supra-gqa-bf16-rope": dict(n_heads_kv=2, rope_frequencies="bf16", rotary_base_frequency=5e5),
    "supra-tied-no-decay": dict(n_heads_kv=1, use_decay=False, weight_tying=True, apply_qk_norm=True),
}

# What the worker reads besides: the modelling file has it fixed.
PUBLISHED = dict(attn_name="linear_attn", norm_type="rms_norm", ffn_type="swiglu", positional_embedding_type="rotary")


def main(root: Path):
    sys.path.insert(0, str(root / "worker/src/model/files"))
    from huggingface.configuration_supra import SupraConfig
    from huggingface.modeling_supra import SupraForCausalLM

    for number, (name, choices) in enumerate(MODELS.items()):
        config = SupraConfig(**SIZES, **choices, **PUBLISHED)
        model = SupraForCausalLM(config).eval()
        for seed in range(100 * number, 100 * number + 100):
            randomize(model, seed)
            ids = torch.randint(SIZES["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
            if found := answers(model, ids):
                break
        else:
            raise SystemExit(f"{name}: no seed gives clear answers")
        out = root / "tests/golden/parity" / name
        shutil.rmtree(out, ignore_errors=True)
        model.save_pretrained(out)
        (out / "generation_config.json").unlink(missing_ok=True)
        save_file(found, out / "parity.safetensors")
        print(f"{name}: seed {seed}, {sum(file.stat().st_size for file in out.iterdir())} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
