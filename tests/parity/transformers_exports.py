"""Loads what `supra-worker export` writes with the transformers library and with torch, and compares.

    transformers_exports.py ROOT        needs ROOT/target/debug/supra-worker

Every model of tests/golden is exported, and every one that random_models.py left in .parity/random. The library has to find every tensor and nothing else, and to compute the answers that the
fixtures hold and that the worker's own tests demand of it: the logits of whole rows and token by token, the same greedy tokens with
and without the state and as `supra-worker generate` prints them, rows with padding on the left like rows without. Weights that were
read and are written again have the same bits; those written as bf16 are the fp32 ones, rounded to the nearest.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

# fp32 with any order of sums. Computing in bf16 moves the logits of such wide random weights by 1 to 4 %; that no bit of what is
# stored is wrong is demanded beside it.
FP32_BOUND, BF16_BOUND = 1e-4, 6e-2


class Comparison:
    """Prints every number beside its bound, and counts those beyond."""

    def __init__(self):
        self.failures = 0
        # What was compared without the name of the model: how often, how often it failed, largest error and bound.
        self.rows = {}

    def bound(self, what: str, error: float, bound: float):
        self.tell(what, f": {error:.1e} of {bound:.0e}", error <= bound, error, bound)

    def expect(self, what: str, holds: bool, more: object = ""):
        """`more` is for whoever looks into a failure."""
        self.tell(what, "" if holds or not more else f" {more}", holds, None, None)

    def tell(self, what: str, more: str, holds: bool, error: float | None, bound: float | None):
        print(("ok      " if holds else "FAILED  ") + what + more, flush=True)
        self.failures += not holds
        kind = what.partition(": ")[2]
        times, failed, largest, _ = self.rows.get(kind, (0, 0, 0.0, None))
        self.rows[kind] = (times + 1, failed + (not holds), max(largest, error or 0.0), bound)

    def table(self) -> str:
        """Everything that was compared, a kind a line, as Markdown."""
        lines = ["| compared | times | failed | largest difference | allowed |", "|---|---|---|---|---|"]
        for kind, (times, failed, largest, bound) in self.rows.items():
            numbers = "none | none" if bound is None else f"{largest:.1e} | {bound:.0e}"
            lines.append(f"| {kind} | {times} | {failed} | {numbers} |")
        return "\n".join(lines)


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
    check.expect(f"{name}: every tensor is found, and no other", not differences, differences)
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


def compare_generate(check: Comparison, exports: "Exports", name: str, folder: Path):
    """The program and the library continue the same prompts, from the folder that the program has written."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    words = [f"w{number}" for number in range(model.config.vocab_size)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: id for id, word in enumerate(words)}, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    # Ids 0 to 2 may begin or end a text by the configuration.
    for prompt in ([5, 9, 11, 60], [7]):
        text = exports.generate(folder, " ".join(words[id] for id in prompt), 12)
        ids = torch.tensor([prompt])
        found = greedy(model, ids, torch.ones_like(ids), 12)[0].tolist()
        ours = [words.index(word) for word in text.split()]
        # The program ends with the end of the text.
        ended = len(ours) < len(found) and found[len(ours)] < 3
        holds = len(ours) > 0 and ours == found[: len(ours)] and (ours == found or ended)
        check.expect(f"{name}: `supra-worker generate` prints the library's tokens", holds, (ours, found))


def compare_bf16(check: Comparison, name: str, original: Path, folder: Path, answers: dict[str, torch.Tensor], full: Path):
    rounded = {key: tensor.to(torch.bfloat16) for key, tensor in weights(full).items()}
    check.expect(f"{name}: bf16 weights are those in fp32, rounded", same_bits(weights(folder), rounded))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    check.expect(f"{name}: stored and loaded as bf16", model.dtype == torch.bfloat16)
    ids, golden = answers["input_ids"], answers["logits"]
    for form, logits in (("whole rows", model(ids).logits), ("token by token", step_by_step(model, ids))):
        error = float((logits.float() - golden).norm() / golden.norm())
        check.bound(f"{name}: bf16 logits, {form}, relative", error, BF16_BOUND)
    if model.config.model_type in ("llama", "mistral"):
        theirs = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
        same = torch.equal(model(ids).logits, theirs(ids).logits)
        check.expect(f"{name}: bf16 logits are those of the original in bf16", same)


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

    def refuse(self, model: Path, label: str) -> tuple[int, str]:
        """Exit code and words of an export that has to fail."""
        command = [self.program, "export", "--model", model, "--out", self.work / label]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ended.returncode, ended.stdout

    def generate(self, model: Path, prompt: str, tokens: int) -> str:
        """The likeliest continuation."""
        options = ["--temperature", "0", "--max-tokens", str(tokens), "--json"]
        command = [self.program, "generate", "--model", model, "--prompt", prompt, *options]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return json.loads(answer.stdout)["text"]


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


def compare_pickles(check: Comparison, exports: Exports, name: str, folder: Path):
    """The same model as `torch.save` writes it: in one file, in two, and as PyTorch before 1.6 did."""
    state = weights(folder)
    if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        # Tied weights are one storage under two names.
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    whole, parts, old = (exports.work / f"{name}_{kind}".replace("-", "_") for kind in ("pickle", "pickles", "old"))
    for place in (whole, parts, old):
        place.mkdir()
        shutil.copy(folder / "config.json", place)
    torch.save(state, whole / "pytorch_model.bin")
    torch.save(state, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    names, index = list(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: state[key] for key in part}, parts / file, pickle_protocol=2 + number)
        index |= dict.fromkeys(part, file)
    (parts / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    expected = weights(exports.make(folder, f"{name}_safe"))
    for place, kind in ((whole, "one pickle"), (parts, "two pickles")):
        found = weights(exports.make(place, f"{place.name}_out"))
        check.expect(f"{name}: {kind} of torch.save hold the same bits", same_bits(found, expected))
    code, said = exports.refuse(old, f"{old.name}_out")
    words = ("pytorch_model.bin", "before 1.6", "torch.load")
    holds = code != 0 and all(word in said for word in words)
    check.expect(f"{name}: a pickle of PyTorch before 1.6 is refused with its remedy", holds, said)


@torch.no_grad()
def main(root: Path) -> int:
    check, exports = Comparison(), Exports(root)
    configs = [file for place in ("tests/golden", ".parity/random") for file in (root / place).rglob("config.json")]
    for folder in sorted(file.parent for file in configs):
        files = [folder / file for file in ("golden.safetensors", "parity.safetensors")]
        files = [file for file in files if file.exists()]
        # Documents do not see each other in this one, which the library cannot be told.
        if not files or folder.name == "supra-docreset":
            continue
        name, answers = folder.name, load_file(files[0])
        full = exports.make(folder, name)
        compare_model(check, name, full, answers)
        half = exports.make(folder, f"{name}_bf16", "--dtype", "bf16")
        compare_bf16(check, name, folder, half, answers, full)
        compare_generate(check, exports, name, full)
        compare_round_trips(check, exports, name, folder)
        compare_pickles(check, exports, name, folder)
    named = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    print("\n" + ", ".join(f"{name} {version(name)}" for name in named) + "\n\n" + check.table())
    print(f"\n{check.failures} failed")
    return 1 if check.failures else 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(Path(sys.argv[1])))
