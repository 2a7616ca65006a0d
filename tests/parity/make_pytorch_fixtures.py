"""Writes tests/golden/pytorch: the golden models once more, as PyTorch and its users save them.

    python tests/parity/make_pytorch_fixtures.py REPOSITORY

Every file holds the values of a folder of tests/golden, so that reading it right means reading the same bits.
"""

import json
import pathlib
import sys

import numpy
import torch
from safetensors.torch import load_file


def golden(root, name):
    """All weights of a golden model, from one file or from shards."""
    weights = {}
    for file in sorted((root / "tests/golden" / name).glob("model*.safetensors")):
        weights.update(load_file(file))
    return weights


def as_epoch(root, out):
    """A training checkpoint of linear_open_lm: names behind `module.`, rotary tables, and what is no weight."""
    state = torch.nn.Module().state_dict()  # An OrderedDict with `_metadata`, as every module gives it.
    weights = golden(root, "supra-heads6")
    for name, tensor in weights.items():
        state["module." + name] = torch.nn.Parameter(tensor)
    for layer in range(2):
        state[f"module.layers.{layer}.attention.pos_embed.inv_freq"] = torch.ones(4)
    checkpoint = {
        "epoch": 1,
        "name": "heads6",
        "state_dict": state,
        "evaluation_metrics": [{"loss": 2.5, "seen": None, "upper": numpy.float64(2.75), "exact": True}],
        "step": 12,
        "next_shard_per_source": [3, 70000],
        "samples_seen": 2**40,
        "shard_shuffle_seed": -1,
    }
    torch.save(checkpoint, out / "supra-heads6/epoch_1.pt")
    config = json.loads((root / "tests/golden/supra-heads6/config.json").read_text())
    model = {
        "hidden_dim": config["dim"],
        "intermediate_dim_ffn": config["intermediate_dim_ffn"],
        "n_layers": config["n_layers"],
        "n_heads": config["n_heads"],
        "n_heads_kv": config["n_heads_kv"],
        "seq_len": config["seq_len"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["norm_eps"],
        "post_embed_norm": False,
        "weight_tying": config["weight_tying"],
        "model_norm": "rms_norm",
        "attn_name": "linear_attn",
        "use_decay": True,
        "use_retnet_slopes": False,
    }
    (out / "supra-heads6/linear_heads6.json").write_text(json.dumps(model, indent=2) + "\n")
    arguments = {
        "attn_name": "auto",
        "beta1": 0.9,
        "ffn_type": "swiglu",
        "model": "linear_heads6",
        "model_norm": "default_layer_norm",
        "name": "heads6",
        "positional_embedding_type": "rotary",
        "qk_norm": False,
        "resume": None,
    }
    lines = "".join(f"{key}: {value}\n" for key, value in sorted(arguments.items()))
    (out / "supra-heads6/params.txt").write_text(lines)


def as_released(root, out):
    """The released pickle: names behind `model.`; here with shared storages and with strides of all kinds."""
    weights = golden(root, "supra-heads6")
    norms = [name for name in weights if name.endswith("norm.weight")]
    shared = torch.cat([weights[name] for name in norms])
    width = weights["norm.weight"].numel()
    state = {}
    for name, tensor in weights.items():
        if name in norms:
            start = norms.index(name) * width
            tensor = shared[start : start + width]
        elif name.endswith("w3.weight"):
            tensor = tensor.t().contiguous().t()
        elif name.endswith("out_proj.weight"):
            tensor = torch.stack([tensor, -tensor], dim=2)[:, :, 0]
        state["model." + name] = tensor
    torch.save(state, out / "supra-heads6-released/pytorch_model.bin")


def as_hugging_face(root, out):
    """Half precision: one file with tied embeddings, and shards with an index."""
    tied = {name: tensor.bfloat16() for name, tensor in golden(root, "hf-llama-tied").items()}
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    torch.save(tied, out / "hf-llama-tied/pytorch_model.bin")

    half = {name: tensor.half() for name, tensor in golden(root, "hf-mistral-gqa").items()}
    names, weight_map = list(half), {}
    for number, part in enumerate([names[::2], names[1::2]], 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        weight_map.update({name: file for name in part})
        torch.save({name: half[name] for name in part}, out / "hf-mistral-gqa" / file, pickle_protocol=number * 2 + 1)
    size = sum(tensor.numel() * 2 for tensor in half.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "hf-mistral-gqa/pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


def interleaved(matrix, heads):
    """Rows in the order of Meta's rotary embedding: channels i and i + d/2 of a head become neighbours."""
    rows, columns = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def meta(weights, config):
    """Names and row order of Meta's and Mistral's own files."""
    state = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        for name in "qkvo":
            matrix = weights[f"{theirs}self_attn.{name}_proj.weight"]
            matrix = interleaved(matrix, heads[name]) if name in heads else matrix
            state[f"{ours}attention.w{name}.weight"] = matrix
        for name, number in [("gate", 1), ("down", 2), ("up", 3)]:
            state[f"{ours}feed_forward.w{number}.weight"] = weights[f"{theirs}mlp.{name}_proj.weight"]
        state[ours + "attention_norm.weight"] = weights[theirs + "input_layernorm.weight"]
        state[ours + "ffn_norm.weight"] = weights[theirs + "post_attention_layernorm.weight"]
    return state


def as_meta(root, out):
    """Mistral's form, one file, and Llama's, two model-parallel files."""
    config = json.loads((root / "tests/golden/hf-mistral-gqa/config.json").read_text())
    torch.save(meta(golden(root, "hf-mistral-gqa"), config), out / "meta-mistral-gqa/consolidated.00.pth")
    params = {
        "dim": 64,
        "n_layers": 2,
        "head_dim": 16,
        "hidden_dim": 112,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-06,
        "sliding_window": 4096,
        "vocab_size": 103,
    }
    (out / "meta-mistral-gqa/params.json").write_text(json.dumps(params))

    config = json.loads((root / "tests/golden/hf-llama-mha/config.json").read_text())
    state = meta(golden(root, "hf-llama-mha"), config)
    across = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    shards = [{}, {}]
    for name, tensor in state.items():
        if tensor.dim() == 1:
            parts = [tensor, tensor]
        else:
            parts = [part.clone() for part in tensor.chunk(2, dim=1 if name.endswith(across) else 0)]
        for shard, part in zip(shards, parts):
            shard[name] = part
    for number, shard in enumerate(shards):
        shard["rope.freqs"] = torch.ones(8, dtype=torch.bfloat16)
        torch.save(shard, out / f"meta-llama-mha/consolidated.{number:02}.pth")
    params = {
        "dim": 64,
        "ffn_dim_multiplier": 0.6,
        "multiple_of": 16,
        "n_heads": 4,
        "n_layers": 2,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": -1,
    }
    (out / "meta-llama-mha/params.json").write_text(json.dumps(params))


def main():
    root = pathlib.Path(sys.argv[1])
    out = root / "tests/golden/pytorch"
    for name in [
        "supra-heads6",
        "supra-heads6-released",
        "hf-llama-tied",
        "hf-mistral-gqa",
        "meta-mistral-gqa",
        "meta-llama-mha",
    ]:
        (out / name).mkdir(parents=True, exist_ok=True)
    as_epoch(root, out)
    as_released(root, out)
    as_hugging_face(root, out)
    as_meta(root, out)
    weights = {"double": torch.tensor([[1.5, -2.0]], dtype=torch.float64), "count": torch.tensor([3, -4])}
    torch.save(weights, out / "kinds.pt")


main()
