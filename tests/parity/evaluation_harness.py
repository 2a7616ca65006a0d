"""Runs EleutherAI's lm-evaluation-harness against `supra-worker serve`, and compares every item with `supra-worker eval`.

    evaluation_harness.py ROOT      needs ROOT/target/debug/supra-worker

The harness makes its own prompts: of its own task files where it has them (HellaSwag, PIQA, WinoGrande, ARC, MMLU with its examples, LAMBADA),
with the data taken from tests/evals, and of `query`, `choices`, `gold` and `context`, `continuation`. It reads the model through the server's
`/v1/completions`, as token ids with `echo` and `logprobs`. A softmax model and a SUPRA model are compared, in fp32 (every item alike) and
in bf16 (figures within a standard error, differing items listed). SUPRA_EVALS=FOLDER adds arc_easy.jsonl and lambada_openai.jsonl of that
folder, up to SUPRA_EVALS_LIMIT items of each (default 200).
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", DISABLE_MULTIPROC="1")

import lm_eval
from lm_eval.tasks import TaskManager
from transformers_exports import Comparison

# What one form of the model may round differently from another, in nats of a whole continuation.
FP32_BOUND = 2e-3
# Most tokens that a model reads. The base sees 256: one of them is the answer's last, one is generated, which the harness asks for.
BASE_CONTEXT, CONVERTED_CONTEXT = 254, 1024


def own_task(file: str, harness: str, split: str = "validation") -> dict:
    """The harness's task in the file `harness` of its folder of tasks, with our data."""
    folder = Path(find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    return {"include": str(folder / harness), "file": file, "split": split, "tag": []}


CHOICE = dict(output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
CHOICE["metric_list"] = [dict(metric=name, aggregation="mean", higher_is_better=True) for name in ("acc", "acc_norm", "acc_bytes")]
CLOZE = dict(output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' ' + continuation}}")
CLOZE["metric_list"] = [dict(metric="perplexity", aggregation="perplexity"), dict(metric="acc", aggregation="mean")]

# Our name of the task: its file, and what the harness is told.
TASKS = {
    "hellaswag": own_task("hellaswag.jsonl", "hellaswag/hellaswag.yaml"),
    "piqa": own_task("piqa.jsonl", "piqa/piqa.yaml"),
    "winogrande": own_task("winogrande.jsonl", "winogrande/default.yaml"),
    "arc": own_task("arc.jsonl", "arc/arc_easy.yaml", "test"),
    "lambada": own_task("lambada.jsonl", "lambada/lambada_openai.yaml", "test"),
    "arc_easy": CHOICE | dict(file="arc_easy.jsonl", split="test"),
    "cloze": CLOZE | dict(file="cloze.jsonl", split="test"),
}
SHOTS = 3


class Server:
    """`supra-worker serve` with one model."""

    def __init__(self, worker: Path, model: Path, dtype: str, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [worker, "serve", "--model", model, "--dtype", dtype, "--listen", f"127.0.0.1:{port}"]
        self.log = open(log, "w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def __enter__(self) -> "Server":
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise SystemExit(f"the server does not answer:\n{Path(self.log.name).read_text()}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


class Harness:
    """The harness, and where its tasks are."""

    def __init__(self, data: Path, work: Path):
        self.data, self.work = data, work

    def write(self, name: str, task: dict, limit: int | None = None):
        """A task file of the harness. JSON is YAML."""
        task = dict(task)
        file, split = Path(task.pop("file")), task.pop("split")
        data = file if file.is_absolute() else self.data / file
        if limit:
            lines = data.read_text().splitlines(keepends=True)[:limit]
            data = self.work / f"{name}.jsonl"
            data.write_text("".join(lines))
        files = {split: str(data)}
        if "fewshot_file" in task:
            files["dev"] = str(self.data / task.pop("fewshot_file"))
        config = task | {
            "task": f"supra_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{split}_split": split,
        }
        (self.work / f"{name}.yaml").write_text(json.dumps(config))
        return data

    def run(self, server: Server, model: Path, context: int, names: list[str], shots: int) -> tuple[dict, dict]:
        """Figures by task, and items by task, in the order of the file."""
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=dict(
                model=model.name,
                base_url=server.url + "/v1/completions",
                tokenizer=str(model),
                tokenizer_backend="huggingface",
                # As our `eval`: the tokens that the tokenizer adds by itself, and contexts cut at the same place.
                add_bos_token=True,
                max_length=context + 2,
                num_concurrent=4,
            ),
            tasks=[f"supra_{name}" for name in names],
            num_fewshot=shots,
            task_manager=TaskManager(include_path=str(self.work), include_defaults=False),
            log_samples=True,
            # None would leave all standard errors out. That of a perplexity is drawn, and not compared.
            bootstrap_iters=2,
            cache_requests=False,
        )
        samples = {name: sorted(found["samples"][f"supra_{name}"], key=lambda item: item["doc_id"]) for name in names}
        return {name: found["results"][f"supra_{name}"] for name in names}, samples


def evaluate(worker: Path, model: Path, context: int, dtype: str, files: dict[str, Path], work: Path, *more: str) -> tuple[dict, dict]:
    """The same by `supra-worker eval`."""
    items = work / "items.jsonl"
    tasks = [argument for name, file in files.items() for argument in ("--task", f"{name}={file}")]
    command = [worker, "eval", "--model", model, "--dtype", dtype, "--context", str(context), "--items", items, "--json", *tasks, *more]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    figures = {task["task"]: task["metrics"] for task in answer["tasks"]}
    return figures, {name: [line for line in lines if line["task"] == name] for name in files}


def compare(comparison: Comparison, what: str, exact: bool, theirs: tuple[dict, dict], ours: tuple[dict, dict]):
    """Figure by figure and item by item."""
    for name, items in theirs[1].items():
        own = ours[1][name]
        comparison.expect(f"{what}: {name}: as many items", len(items) == len(own), f"{len(items)} {len(own)}")
        metrics = [metric for metric in ours[0][name] if f"{metric},none" in theirs[0][name]]
        comparison.expect(f"{what}: {name}: figures of both", "acc" in metrics, metrics)
        differing, error = [], 0.0
        for place, (their, mine) in enumerate(zip(items, own)):
            scored = [answer[0] if isinstance(answer[0], (list, tuple)) else answer for answer in their["resps"]]
            error = max(error, *(abs(a[0] - b) for a, b in zip(scored, mine["logprobs"], strict=True)))
            if any(their[metric] != mine[metric] for metric in metrics if metric != "perplexity"):
                differing.append(place)
        for metric in metrics:
            their, mine = theirs[0][name][f"{metric},none"], ours[0][name][metric]
            if exact:
                comparison.bound(f"{what}: {metric}", abs(their - mine["value"]) / max(1, abs(their)), FP32_BOUND if metric == "perplexity" else 1e-12)
                if metric != "perplexity":
                    comparison.bound(f"{what}: standard error of {metric}", abs(theirs[0][name][f"{metric}_stderr,none"] - mine["stderr"]), 1e-12)
            elif metric != "perplexity":
                comparison.expect(f"{what}: {metric} within a standard error", abs(their - mine["value"]) <= (mine["stderr"] or 0) + 1e-12)
        if exact:
            comparison.bound(f"{what}: log-probabilities", error, FP32_BOUND)
            comparison.expect(f"{what}: every item alike", not differing, f"{name}: {differing}")
        elif differing:
            print(f"        {what}: {name}: differing items {differing}, log-probabilities up to {error:.1e} apart")


def main() -> int:
    root = Path(sys.argv[1])
    logging.getLogger().setLevel(logging.WARNING)
    worker = root / "target/debug/supra-worker"
    comparison = Comparison()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base, converted = root / "recipes/quickstart/base", work / "converted"
        subprocess.run([worker, "convert", "--base", base, "--out", converted], check=True, stdout=subprocess.DEVNULL)
        harness = Harness(root / "tests/evals", work)
        files = {name: harness.write(name, task) for name, task in TASKS.items()}
        limit = int(os.environ.get("SUPRA_EVALS_LIMIT", 200))
        if evals := os.environ.get("SUPRA_EVALS"):
            for name, task in (("all_arc_easy", CHOICE), ("all_lambada", CLOZE)):
                file = {"all_arc_easy": "arc_easy.jsonl", "all_lambada": "lambada_openai.jsonl"}[name]
                files[name] = harness.write(name, task | dict(file=str(Path(evals).resolve() / file), split="test"), limit)
        mmlu = {subject: mmlu_subject(harness, subject, work) for subject in subjects(root)}

        for model, context in ((base, BASE_CONTEXT), (converted, CONVERTED_CONTEXT)):
            for dtype in ("fp32", "bf16"):
                what = f"{model.name}: {dtype}"
                with Server(worker, model, dtype, work / "serve.log") as server:
                    theirs = harness.run(server, model, context, list(files), 0)
                    examples = harness.run(server, model, context, list(mmlu), SHOTS)
                compare(comparison, what, dtype == "fp32", theirs, evaluate(worker, model, context, dtype, files, work))
                more = ["--shots", str(SHOTS), "--shots-from", root / "tests/evals/mmlu_dev.jsonl"]
                compare(comparison, what, dtype == "fp32", examples, evaluate(worker, model, context, dtype, mmlu, work, *more))
    print(comparison.table())
    return int(comparison.failures > 0)


def subjects(root: Path) -> list[str]:
    """The subjects of our questions in MMLU's format."""
    lines = (root / "tests/evals/mmlu.jsonl").read_text().splitlines()
    return sorted({json.loads(line)["subject"] for line in lines})


def mmlu_subject(harness: Harness, subject: str, work: Path) -> Path:
    """A task of the harness for one subject of MMLU, as it has one for each."""
    for file in ("mmlu", "mmlu_dev"):
        lines = (harness.data / f"{file}.jsonl").read_text().splitlines(keepends=True)
        (work / f"{file}_{subject}.jsonl").write_text("".join(line for line in lines if json.loads(line)["subject"] == subject))
    task = own_task(str(work / f"mmlu_{subject}.jsonl"), "mmlu/default/_default_template_yaml", "test") | {
        "fewshot_file": str(work / f"mmlu_dev_{subject}.jsonl"),
        "fewshot_split": "dev",
        "description": f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n",
    }
    return harness.write(subject, task)


if __name__ == "__main__":
    sys.exit(main())
