"""Makes small random Llama and Mistral models with the transformers library, and what it computes with them.

    softmax_models.py ROOT      writes ROOT/tests/golden/parity/{llama,mistral}-*

Each folder has configuration and weights as the library saves them, and `parity.safetensors`: `input_ids` i64 [B,T], `logits`
f32 [B,T,V] of the library's own forward pass in fp32, and `generate` i64 [B,8], its greedy continuation. The worker's tests
demand the same logits within 1e-4 and the same tokens.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

ROWS, TOKENS, NEW_TOKENS = 2, 33, 8
SIZES = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, vocab_size=71)

# Folder: configuration, type of the stored weights, largest file.
MODELS = {
    "llama-mha-bf16": (LlamaConfig(**SIZES, num_key_value_heads=4, rope_theta=1e4), torch.bfloat16, "1GB"),
    "llama-gqa-theta": (LlamaConfig(**SIZES, num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-5), torch.float32, "1GB"),
    "llama-tied-sharded": (
        LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=512),
        torch.float32,
        "20KB",
    ),
    "mistral-gqa-window": (
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=64, head_dim=8, rms_norm_eps=1e-5),
        torch.float16,
        "1GB",
    ),
}


def randomize(model: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32):
    """fp32 weights, rounded to `dtype`, with which every part of the network matters: standard deviation 2/sqrt(fan-in), gains
    around 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = 1 + 0.1 * noise if parameter.dim() == 1 else noise * (2.0 / parameter.shape[-1] ** 0.5)
        # Only the weights: a whole module in half precision would round its rotary frequencies, too.
        parameter.data = value.to(dtype).float()


def answers(model: torch.nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """What the model says; none if it is nearly undecided somewhere, so that rounding might choose another token."""
    with torch.no_grad():
        logits = model(input_ids).logits
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        best = model(tokens).logits[:, TOKENS - 1 :].topk(2, -1).values
    if float((best[..., 0] - best[..., 1]).min()) < 0.01:
        return None
    return {"input_ids": input_ids, "logits": logits.float(), "generate": tokens[:, TOKENS:].contiguous()}


def main(root: Path):
    for number, (name, (config, dtype, shard)) in enumerate(MODELS.items()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for seed in range(100 * number, 100 * number + 100):
            randomize(model, seed, dtype)
            ids = torch.randint(SIZES["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
            if found := answers(model, ids):
                break
        else:
            raise SystemExit(f"{name}: no seed gives clear answers")
        out = root / "tests/golden/parity" / name
        shutil.rmtree(out, ignore_errors=True)
        model.to(dtype).save_pretrained(out, max_shard_size=shard)
        (out / "generation_config.json").unlink(missing_ok=True)
        save_file(found, out / "parity.safetensors")
        print(f"{name}: seed {seed}, {sum(file.stat().st_size for file in out.iterdir())} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
