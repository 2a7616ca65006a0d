"""Loads what `supra-worker export` writes with the transformers library and with torch, and compares.

    transformers_exports.py ROOT        needs ROOT/target/debug/supra-worker

Every model of tests/golden is exported. The library has to find every tensor and nothing else, and to compute the answers that the
fixtures hold and that the worker's own tests demand of it: the logits of whole rows and token by token, the same greedy tokens with
and without the state, rows with padding on the left like rows without. Weights that were read and are written again have the
same bits.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

# fp32 with any order of sums; bf16 weights alone move the logits by 1 %.
FP32_BOUND, BF16_BOUND = 1e-4, 2e-2


class Comparison:
    """Prints every number beside its bound, and counts those beyond."""

    def __init__(self):
        self.failures = 0

    def bound(self, what: str, error: float, bound: float):
        self.expect(f"{what}: {error:.1e} of {bound:.0e}", error <= bound)

    def expect(self, what: str, holds: bool):
        print(("ok      " if holds else "FAILED  ") + what)
        self.failures += not holds


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, from one file or from shards."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(bits(left[name]), bits(right[name])) for name in left
    )


def step_by_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits from one token at a time: the recurrent form, or a cache of keys and values."""
    parts, cache = [], None
    for t in range(ids.shape[1]):
        output = model(ids[:, t : t + 1], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    return torch.cat(parts, 1)


def greedy(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, count: int, **more) -> torch.Tensor:
    settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :]


def compare_model(check: Comparison, name: str, folder: Path, answers: dict[str, torch.Tensor]):
    """fp32: the logits in both forms, and greedy tokens."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    differences = {key: value for key, value in report.items() if value}
    check.expect(f"{name}: every tensor is found, and no other {differences or ''}", not differences)
    model.eval()
    ids, golden = answers["input_ids"], answers["logits"]
    whole = model(ids, use_cache=False).logits
    check.bound(f"{name}: logits", float((whole - golden).abs().max()), FP32_BOUND)
    steps = step_by_step(model, ids)
    check.bound(f"{name}: logits, token by token", float((steps - golden).abs().max()), FP32_BOUND)
    if "generate" not in answers:
        return
    tokens, mask = answers["generate"], torch.ones_like(ids)
    count = tokens.shape[1]
    for use_cache in (True, False):
        found = greedy(model, ids, mask, count, use_cache=use_cache)
        check.expect(f"{name}: greedy tokens, use_cache={use_cache}", torch.equal(found, tokens))
    if not name.startswith(("supra", "convert")):
        return
    # The second row is shorter and padded on the left.
    short = ids[1:, 5:]
    alone = greedy(model, short, torch.ones_like(short), count)
    padded, mask = ids.clone(), mask.clone()
    padded[1, :5], mask[1, :5] = 0, 0
    for use_cache in (True, False):
        both = greedy(model, padded, mask, count, use_cache=use_cache)
        holds = torch.equal(both, torch.cat((tokens[:1], alone)))
        check.expect(f"{name}: greedy tokens of padded rows, use_cache={use_cache}", holds)
    beams = [greedy(model, ids, torch.ones_like(ids), count, num_beams=3, use_cache=use) for use in (True, False)]
    check.expect(f"{name}: beams", torch.equal(*beams))
    try:
        model(padded.flip(1), attention_mask=mask.flip(1), use_cache=True)
        check.expect(f"{name}: padding behind a state is refused", False)
    except ValueError as error:
        check.expect(f"{name}: padding behind a state is refused", "pad on the left" in str(error))


def compare_bf16(check: Comparison, name: str, folder: Path, answers: dict[str, torch.Tensor]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    check.expect(f"{name}: stored and loaded as bf16", model.dtype == torch.bfloat16)
    ids, golden = answers["input_ids"], answers["logits"]
    for form, logits in (("whole rows", model(ids).logits), ("token by token", step_by_step(model, ids))):
        error = float((logits.float() - golden).norm() / golden.norm())
        check.bound(f"{name}: bf16 logits, {form}, relative", error, BF16_BOUND)


class Exports:
    """Runs the program, each time into a new folder."""

    def __init__(self, root: Path):
        self.program = root / "target/debug/supra-worker"
        self.work = Path(tempfile.mkdtemp(prefix="supra-parity-"))

    def make(self, model: Path, label: str, *options: str) -> Path:
        # The library makes Python modules of the folders' names.
        out = self.work / label.replace("-", "_")
        command = [self.program, "export", "--model", model, "--out", out, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return out


def compare_round_trips(check: Comparison, exports: Exports, name: str, folder: Path):
    """HF to ours to HF, linear_open_lm to ours to linear_open_lm, and the checkpoint of its training code."""

    def without_prefix(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.removeprefix("model."): tensor for key, tensor in named.items()}

    original = weights(folder)
    kind = next(iter(original.values())).dtype
    # Half precision can be read but not asked for; bf16 would be other numbers.
    dtype = "bf16" if kind == torch.bfloat16 else "fp32"
    original = {key: tensor.float() if dtype == "fp32" else tensor for key, tensor in original.items()}
    back = weights(exports.make(folder, f"{name}_back", "--dtype", dtype))
    if "tok_embeddings.weight" in original:
        back = without_prefix(back)
    check.expect(f"{name}: its own names come back with the same bits", same_bits(back, original))
    if "heads6" in name:
        # linear_open_lm cannot compute it, so it is refused.
        return
    openlm = exports.make(folder, f"{name}_openlm", "--format", "openlm", "--dtype", dtype)
    again = exports.make(openlm, f"{name}_again", "--format", "openlm", "--dtype", dtype)
    there = weights(openlm)
    check.expect(f"{name}: linear_open_lm's names come back with the same bits", same_bits(weights(again), there))
    if json.loads((openlm / "config.json").read_text())["norm_eps"] == 1e-5:
        training = exports.make(folder, f"{name}_pt", "--format", "openlm-pt", "--dtype", dtype)
        state = torch.load(training / "epoch_0.pt", weights_only=True)["state_dict"]
        check.expect(f"{name}: torch loads epoch_0.pt", same_bits(state, without_prefix(there)))


@torch.no_grad()
def main(root: Path) -> int:
    check, exports = Comparison(), Exports(root)
    for folder in sorted(file.parent for file in (root / "tests/golden").rglob("config.json")):
        files = [folder / file for file in ("golden.safetensors", "parity.safetensors")]
        files = [file for file in files if file.exists()]
        # Documents do not see each other in this one, which the library cannot be told.
        if not files or folder.name == "supra-docreset":
            continue
        name, answers = folder.name, load_file(files[0])
        compare_model(check, name, exports.make(folder, name), answers)
        compare_bf16(check, name, exports.make(folder, f"{name}_bf16", "--dtype", "bf16"), answers)
        compare_round_trips(check, exports, name, folder)
    print(f"{check.failures} failed")
    return 1 if check.failures else 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(Path(sys.argv[1])))
