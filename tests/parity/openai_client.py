"""Uses `supra-worker serve` through the official `openai` package, unchanged, as its users do.

    openai_client.py ROOT
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

LIMIT = 120
KEY = "a-key-of-some-length"


class Check:
    def __init__(self):
        self.failures = 0

    def expect(self, what: str, holds: bool, more: object = ""):
        """`more` is for whoever looks into a failure."""
        print(("ok      " if holds else "FAILED  ") + what + ("" if holds or not more else f" {more}"), flush=True)
        self.failures += not holds

    def raises(self, what: str, error: type, call, **expected):
        """`call` raises an error with these attributes."""
        try:
            found = call()
        except error as raised:
            wrong = {name: getattr(raised, name) for name, value in expected.items() if getattr(raised, name) != value}
            self.expect(what, not wrong, (wrong, raised))
        except Exception as other:
            self.expect(what, False, repr(other))
        else:
            self.expect(what, False, found)


class Server:
    def __init__(self, root: Path, model: Path, *options: str):
        command = [root / "target/debug/supra-worker", "serve", "--model", model, "--listen", "127.0.0.1:0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said = ""
        while not said.startswith("ready: "):
            said = self.process.stdout.readline()
            if not said:
                raise SystemExit(f"the server ended with {self.process.wait()}")
            if found := re.match("listening on (http://.*)", said):
                self.url = found[1]

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=LIMIT)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)


def completions(check: Check, client: openai.OpenAI):
    models = [model.id for model in client.models.list()]
    check.expect("models.list names the model", models == ["m"], models)
    check.expect("models.retrieve finds it", client.models.retrieve("m").object == "model")

    asked = dict(model="m", prompt="The old man", max_tokens=16, temperature=0)
    whole = client.completions.create(**asked)
    text = whole.choices[0].text
    check.expect("a completion has text and an end", bool(text) and whole.choices[0].finish_reason in ("stop", "length"), whole)
    usage = whole.usage
    check.expect("tokens are counted", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0, usage)
    check.expect("greedy completions repeat", client.completions.create(**asked).choices[0].text == text)

    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    check.expect("the pieces of a stream are the text", "".join(p.choices[0].text for p in pieces if p.choices) == text, pieces)
    check.expect("the last piece of a stream counts tokens", pieces[-1].usage == usage and not pieces[-1].choices, pieces[-1])
    ends = [p.choices[0].finish_reason for p in pieces if p.choices]
    check.expect("a stream says once how it ended", [end for end in ends if end] == [whole.choices[0].finish_reason], ends)

    draws = dict(model="m", prompt="Once", max_tokens=12, n=3, seed=11, temperature=1.0)
    drawn = [choice.text for choice in client.completions.create(**draws).choices]
    again = [choice.text for choice in client.completions.create(**draws).choices]
    check.expect("n completions differ from each other and not from themselves", len(set(drawn)) == 3 and drawn == again, (drawn, again))

    told = client.completions.create(**asked | dict(max_tokens=4), logprobs=2, echo=True).choices[0]
    logprobs = told.logprobs
    check.expect("echo begins with the prompt", told.text.startswith("The old man") and told.text[11:] == text[: len(told.text) - 11], told)
    lists = [logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset]
    check.expect("all lists of logprobs have a place for every token", len({len(some) for some in lists}) == 1, logprobs)
    check.expect("the first token has no logprob, the others have", logprobs.token_logprobs[0] is None and all(x <= 0 for x in logprobs.token_logprobs[1:]))
    new = zip(logprobs.tokens[-4:], logprobs.top_logprobs[-4:])
    check.expect("greedy tokens are the likeliest", all(max(top, key=top.get) == token for token, top in new), logprobs)

    many = client.completions.create(model="m", prompt=["One", "Two", "Three"], max_tokens=3, temperature=0)
    check.expect("prompts come back in their order", [choice.index for choice in many.choices] == [0, 1, 2])
    ids = client.completions.create(model="m", prompt=[[5, 6, 7], [8, 9]], max_tokens=3)
    check.expect("prompts may be token ids", len(ids.choices) == 2 and ids.usage.prompt_tokens == 5, ids)
    stop = next(word for word in text.split() if len(word) > 1)
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    check.expect("a stop string ends the text before it", cut.finish_reason == "stop" and cut.text == text[: text.index(stop)], (cut, text))


def errors(check: Check, server: Server):
    client = server.client()
    create = client.completions.create
    check.raises("a wrong value", openai.BadRequestError, lambda: create(model="m", prompt="a", temperature=-1), param="temperature", status_code=400)
    check.raises("another model", openai.NotFoundError, lambda: create(model="gpt", prompt="a"), code="model_not_found")
    check.raises("a model that is not there", openai.NotFoundError, lambda: client.models.retrieve("gpt"))
    wrong = server.client("another-key-of-some-length")
    check.raises("a wrong key", openai.AuthenticationError, lambda: wrong.models.list(), code="invalid_api_key")
    chat = lambda: client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
    check.raises("an address that is not there", openai.NotFoundError, chat, code="not_found")

    # One slot and one place in the queue: of many at once, some are sent away, and a client that tries again gets through.
    refused = []

    def ask(retries: int):
        try:
            patient = client.with_options(max_retries=retries)
            return patient.completions.create(model="m", prompt="The", max_tokens=48, n=1, temperature=1)
        except openai.RateLimitError as error:
            refused.append(error)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, [0] * 12))
    check.expect("too many at once are told so", bool(refused) and refused[0].code == "queue_full", len(refused))
    refused.clear()
    with ThreadPoolExecutor(3) as pool:
        answered = list(pool.map(ask, [20] * 3))
    check.expect("and get through when they come again", not refused and all(answered), refused)

    stream = create(model="m", prompt="The", max_tokens=200, temperature=1, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + LIMIT
    answered = None
    while answered is None and time.monotonic() < deadline:
        answered = ask(0)
    check.expect("a stream that is closed gives its place back", answered is not None)


def main(root: Path) -> int:
    check = Check()
    with tempfile.TemporaryDirectory(prefix="supra-openai-") as work:
        key = Path(work) / "key"
        key.write_text(KEY)
        base = root / "recipes/quickstart/base"
        server = Server(root, base, "--name", "m", "--api-key-file", str(key))
        completions(check, server.client())
        check.expect("SIGTERM ends the server well", server.stop() == 0)
        server = Server(root, base, "--name", "m", "--api-key-file", str(key), "--slots", "1", "--queue", "1")
        errors(check, server)
        check.expect("SIGTERM ends the server well, also after errors", server.stop() == 0)
    print(f"{check.failures} failed")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
