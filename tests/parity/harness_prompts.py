"""Writes down what EleutherAI's lm-evaluation-harness asks a model, and what figures it makes of the answers.

    harness_prompts.py ROOT     writes ROOT/tests/golden/harness.json, which `cargo nextest run -E 'test(golden)'` holds `supra-worker eval` to

The tasks are those of evaluation_harness.py. The model is none: log-probabilities follow from the lengths of the texts, and are written down too.
"""

import json
import sys
import tempfile
from pathlib import Path

import evaluation_harness as harness
import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer


class Recorder(TemplateLM):
    """Keeps what it is asked."""

    def __init__(self, tokenizer: Path):
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.asked = {}

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    def tok_encode(self, string, add_special_tokens=True, **_):
        return self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids

    def _loglikelihood_tokens(self, requests, **_):
        answers = []
        for (context, continuation), before, behind in requests:
            logprob = -((7 * len(context) + 13 * len(continuation)) % 97 + 1) / 8
            asked = dict(context=context, continuation=continuation, tokens=[before, behind], logprob=logprob, greedy=logprob > -3)
            self.asked[context, continuation] = asked
            answers.append((logprob, asked["greedy"]))
        return answers

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


def main() -> int:
    root = Path(sys.argv[1])
    recorder = Recorder(root / "recipes/quickstart/base")
    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = harness.Harness(root / "tests/evals", Path(folder))
        for name, task in harness.TASKS.items():
            tasks.write(name, task)
        for subject in harness.subjects(root):
            harness.mmlu_subject(tasks, subject, Path(folder))
        for names, shots in ((list(harness.TASKS), 0), (harness.subjects(root), harness.SHOTS)):
            found = lm_eval.simple_evaluate(
                model=recorder,
                tasks=[f"supra_{name}" for name in names],
                num_fewshot=shots,
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                log_samples=True,
                bootstrap_iters=2,
            )
            for name in names:
                samples = sorted(found["samples"][f"supra_{name}"], key=lambda item: item["doc_id"])
                figures = found["results"][f"supra_{name}"]
                metrics = [key.removesuffix(",none") for key in figures if key.endswith(",none") and "stderr" not in key]
                golden[name] = {
                    "shots": shots,
                    "items": [[recorder.asked[tuple(pair)] for pair in item["arguments"]] for item in samples],
                    # The error of a perplexity is drawn by chance.
                    "metrics": {
                        metric: [figures[f"{metric},none"], None if metric == "perplexity" else figures[f"{metric}_stderr,none"]]
                        for metric in metrics
                    },
                }
    # A task a line.
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(task, ensure_ascii=False)}" for name, task in golden.items())
    (root / "tests/golden/harness.json").write_text(f"{{\n{lines}\n}}\n")
    print(f"{sum(len(task['items']) for task in golden.values())} items of {len(golden)} tasks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
