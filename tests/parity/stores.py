"""Runs the real programs against object stores that nobody here wrote: killed, resumed, verified, exported, refused.

    stores.py ROOT              needs ROOT/target/debug/supra, supra-coordinator and supra-worker

The S3 server is moto's. No server in the package registries speaks the XML API of Google Cloud Storage with the conditional put
that a checkpoint needs, so `gs://` goes through `Gateway`, which renames the few headers in which that API differs from S3's and
hands on to moto: our requests and their order are the real ones, the answers are moto's.

A run whose checkpoints are in a bucket is killed when the first is there, goes on, and ends with the bits of a run that was left
alone and wrote to a directory. Damage in the bucket is found, and what a store refuses is named with its remedy.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from logging import ERROR, getLogger
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from moto.server import ThreadedMotoServer
from softmax_models import randomize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from transformers_exports import Comparison, same_bits, weights

BUCKET, WORDS, LIMIT = "checkpoints", 128, 240
# Masters and moments of one rank are more than a part of an upload, so that multipart uploads are among the requests.
SIZES = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)


class Gateway(ThreadingHTTPServer):
    """The XML API of Google Cloud Storage as another server's S3."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int]):
        self.behind = behind
        self.conditions = 0
        super().__init__(("127.0.0.1", 0), Request)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        # Its clients are killed.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def hand_on(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers.pop("host", None)
        # As long as it is not told to look, moto takes any signature.
        credential = "Credential=supra/20260101/us-east-1/s3/aws4_request"
        headers["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0"
        # "There is no generation of it" is "there is none".
        if headers.pop("x-goog-if-generation-match", None) == "0":
            headers["if-none-match"] = "*"
            self.server.conditions += 1
        body = self.rfile.read(int(headers.get("content-length", 0)))
        connection = http.client.HTTPConnection(*self.server.behind)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        if answer.getheader("content-length") is None:
            self.send_header("content-length", str(len(content)))
        if self.command == "PUT":
            self.send_header("x-goog-generation", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = hand_on

    def log_message(self, *_):
        pass


class World:
    """A small model, its tokens, and the programs."""

    def __init__(self, root: Path, work: Path):
        self.programs, self.work = root / "target/debug", work
        base, text = work / "base", work / "text"
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=WORDS, rms_norm_eps=1e-5))
        randomize(model, 17)
        model.save_pretrained(base)
        words = [f"w{number}" for number in range(WORDS)]
        words[:3] = "<s>", "</s>", "<unk>"
        special = [
            dict(id=number, content=words[number], special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
            for number in range(3)
        ]
        tokenizer = {
            "version": "1.0",
            "added_tokens": special,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": {word: id for id, word in enumerate(words)}, "unk_token": "<unk>"},
        }
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        text.mkdir()
        drawn = torch.randint(3, WORDS, (200, 100), generator=torch.Generator().manual_seed(5))
        documents = [" ".join(words[id] for id in row) for row in drawn]
        pq.write_table(pa.table({"content": documents}), text / "part.parquet")
        options = ["--tokenizer", base / "tokenizer.json"]
        self.run("supra", "data", "tokenize", text, "--output", work / "tokens", *options, code=0)

    def recipe(self, name: str, to: str) -> Path:
        path = self.work / f"{name}.yaml"
        path.write_text(
            f"name: {name}\n"
            f"base: {{ path: {self.work}/base }}\n"
            "model: { precision: fp32, chunk: 16 }\n"
            f"data: {{ train: {self.work}/tokens }}\n"
            "budget: { tokens: 6400 }\n"
            "batch: { tokens: 256, micro_batch: 4, sequence_length: 32 }\n"
            "optimizer: { lr: 1e-3, final_lr: 1e-4, warmup: 5 steps }\n"
            f"checkpoint: {{ every_tokens: 2048, keep: 2, to: {to} }}\n"
            "workers: { min: 1, max: 1 }\n"
        )
        return path

    def command(self, program: str, *arguments) -> list[str]:
        return [str(self.programs / program), *map(str, arguments)]

    def start(self, program: str, *arguments, **variables: str) -> subprocess.Popen:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_"))}
        return subprocess.Popen(
            self.command(program, *arguments),
            env=plain | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, program: str, *arguments, code: int | None = None, **variables: str) -> tuple[int, str]:
        """Exit code and output; another code than `code` ends the script."""
        process = self.start(program, *arguments, **variables)
        try:
            output = process.communicate(timeout=LIMIT)[0]
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise SystemExit(f"{arguments} did not end within {LIMIT} s: {process.communicate()[0]}")
        if code is not None and process.returncode != code:
            raise SystemExit(f"{program} {arguments} ended with {process.returncode}, not {code}:\n{output}")
        return process.returncode, output


def kill_tree(process: subprocess.Popen):
    """SIGKILL for a program and all that it started, at one moment."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            # It ended meanwhile.
            continue
    doomed = [process.pid]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)


class Bucket:
    """What is in the bucket, seen by Amazon's own client."""

    def __init__(self, endpoint: str):
        keys = dict(aws_access_key_id="supra", aws_secret_access_key="not-very-secret", region_name="us-east-1")
        self.client = boto3.client("s3", endpoint_url=endpoint, **keys)
        self.client.create_bucket(Bucket=BUCKET)

    def objects(self, prefix: str) -> dict[str, dict]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {found["Key"]: found for page in pages for found in page.get("Contents", [])}

    def flip(self, key: str):
        content = bytearray(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
        content[-1] ^= 1
        self.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))


def export(world: World, checkpoint: str, out: Path, **variables: str) -> dict[str, torch.Tensor]:
    world.run("supra-worker", "export", "--checkpoint", checkpoint, "--out", out, "--dtype", "fp32", code=0, **variables)
    return weights(out)


def serve(world: World, state: Path, **variables: str) -> subprocess.Popen:
    """A coordinator and a worker that wait for runs."""
    (state / "address").unlink(missing_ok=True)
    process = world.start("supra", "up", "--state", state, **variables)
    deadline = time.monotonic() + LIMIT
    while not (state / "address").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def killed_and_resumed(check: Comparison, world: World, bucket: Bucket, scheme: str, alone: dict, **variables: str):
    recipe, state = world.recipe(scheme, f"{scheme}://{BUCKET}/{scheme}"), world.work / f"state-{scheme}"
    process = world.start("supra", "up", recipe, "--state", state, **variables)
    deadline = time.monotonic() + LIMIT
    published = lambda: [key for key in bucket.objects(f"{scheme}/") if key.endswith("/manifest.json")]
    while not published() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    early = process.poll() is not None
    if not early:
        kill_tree(process)
    output = process.communicate()[0]
    check.expect(f"{scheme}: killed with a checkpoint published", not early and bool(published()), output)
    if early:
        return

    code, output = world.run("supra", "up", recipe, "--state", state, **variables)
    check.expect(f"{scheme}: the run goes on to its end", code == 0, output)
    objects = bucket.objects(f"{scheme}/")
    check.expect(f"{scheme}: two checkpoints are kept", len(published()) == 2)
    check.expect(f"{scheme}: nothing pending is left", not any("manifest.pending" in key for key in objects))
    check.expect(f"{scheme}: the receipt lies beside them", any(key.endswith("receipt.json") for key in objects))
    check.expect(f"{scheme}: there was an upload in parts", any("-" in found["ETag"] for found in objects.values()))
    code, output = world.run("supra", "audit", "--state", state, "--files", **variables)
    check.expect(f"{scheme}: the audit of ledger and files is clean", code == 0, output)

    capsule = world.work / f"capsule-{scheme}"
    code, output = world.run("supra", "capsule", "--state", state, "--out", capsule, "--json", **variables)
    said = json.loads(output) if code == 0 else {}
    check.expect(f"{scheme}: a capsule lacks nothing", said.get("missing") == {}, output)
    manifests = len(list(capsule.glob("checkpoints/*/manifest.json")))
    check.expect(f"{scheme}: a capsule holds both manifests and the receipt", manifests == 2 and (capsule / "receipt.json").exists())

    served = serve(world, state, **variables)
    look = ("supra", "checkpoints", "--verify", "--state", state)
    code, output = world.run(*look, **variables)
    check.expect(f"{scheme}: every file is verified", code == 0, output)
    last = max(published())
    found = export(world, f"{scheme}://{BUCKET}/{last.removesuffix('/manifest.json')}", world.work / f"out-{scheme}", **variables)
    check.expect(f"{scheme}: the same bits as a run that was left alone", same_bits(found, alone))
    damaged = next(key for key in objects if key.startswith(last.rsplit("/", 1)[0]) and key.endswith(".safetensors"))
    bucket.flip(damaged)
    code, output = world.run(*look, **variables)
    check.expect(f"{scheme}: a flipped bit is found and named", code == 4 and damaged.rsplit("/", 1)[1] in output, output)
    served.send_signal(signal.SIGINT)
    served.communicate(timeout=LIMIT)


def refused(check: Comparison, world: World, what: str, to: str, words: tuple[str, ...], **variables: str):
    """The run fails, and its output has the words: the cause, the URL, the remedy."""
    name = re.sub(r"\W+", "-", what)
    begun = time.monotonic()
    code, output = world.run("supra", "up", world.recipe(name, to), "--state", world.work / name, **variables)
    lacking = [word for word in words if word not in output]
    took = time.monotonic() - begun
    check.expect(f"{what}: cause and remedy are told in {took:.0f} s", code == 1 and not lacking, (code, lacking, output))
    check.expect(f"{what}: no backtrace", "panicked" not in output and "RUST_BACKTRACE" not in output)


def main(root: Path) -> int:
    check = Comparison()
    getLogger("werkzeug").setLevel(ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint, gateway = f"http://{host}:{port}", Gateway((host, port))
    bucket = Bucket(endpoint)
    amazon = dict(
        AWS_ACCESS_KEY_ID="supra",
        AWS_SECRET_ACCESS_KEY="not-very-secret",
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ALLOW_HTTP="true",
    )
    with tempfile.TemporaryDirectory(prefix="supra-stores-") as work:
        world = World(root, Path(work))
        account = world.work / "account.json"
        endpoint = f"http://127.0.0.1:{gateway.server_port}"
        who = dict(private_key="none", private_key_id="none", client_email="supra@example.org")
        account.write_text(json.dumps(who | dict(disable_oauth=True, gcs_base_url=endpoint)))
        google = dict(GOOGLE_SERVICE_ACCOUNT=str(account))
        local = world.work / "local"
        world.run("supra", "up", world.recipe("alone", str(local)), "--state", world.work / "state", code=0)
        last = max(local.rglob("manifest.json")).parent
        alone = export(world, last, world.work / "out")
        killed_and_resumed(check, world, bucket, "s3", alone, **amazon)
        killed_and_resumed(check, world, bucket, "gs", alone, **google)
        check.expect("gs: manifests are put with a condition", gateway.conditions > 0)

        none = ("no-such-bucket", "Create the bucket")
        refused(check, world, "s3 without bucket", "s3://no-such-bucket/runs", none, **amazon)
        refused(check, world, "gs without bucket", "gs://no-such-bucket/runs", none, **google)
        encrypted = {name: value for name, value in amazon.items() if name != "AWS_ALLOW_HTTP"}
        refused(check, world, "s3 over plain http", f"s3://{BUCKET}/plain", ("AWS_ALLOW_HTTP=true",), **encrypted)
        # From here on moto asks who it is.
        request = http.client.HTTPConnection(host, port)
        request.request("POST", "/moto-api/reset-auth", "0")
        request.getresponse().read()
        wrong = ("s3://checkpoints/wrong", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        refused(check, world, "s3 with wrong credentials", f"s3://{BUCKET}/wrong", wrong, **amazon)
    server.stop()
    print(f"{check.failures} failed")
    return 1 if check.failures else 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.exit(main(Path(sys.argv[1])))
