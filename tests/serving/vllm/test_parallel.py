"""Several ranks on this machine's CPU or GPUs: tensor parallel and pipeline parallel.

The engine runs in processes of its own, so a separate program starts it and prints the answers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.serving.vllm import engines

engines.need_vllm()

PROGRAM = """
import json, sys
from tests.serving.vllm import engines

if __name__ == "__main__":
    folder, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    with engines.engine(folder, **options) as llm:
        answers = engines.generate(llm, prompts)
    print("ANSWERS", json.dumps([
        [list(a.token_ids), [a.logprobs[i][t].logprob for i, t in enumerate(a.token_ids)]]
        for a in answers
    ]))
"""
SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
# On a CPU vLLM makes the tensors between stages when it compiles, so eager mode fails an assertion.
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}
KINDS = {
    "tensor 2, shared qkv, biases": (
        {"tensor_parallel_size": 2},
        {"hydra": {"qkv": "shared"}, "attention_bias": True, "out_bias": True},
    ),
    "tensor 2, gqa, gated, one KV head": (
        {"tensor_parallel_size": 2},
        {"hydra": {"gdn_kv": "gqa", "fusion": "gated"}, "num_key_value_heads": 1},
    ),
    "pipeline 2, tied": (PIPELINE, {"tie_word_embeddings": True}),
    "tensor 4": (
        {"tensor_parallel_size": 4},
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "heads": [[1, 2, 3], [], [0, 1, 2, 3, 4, 5, 6, 7], [4]],
        },
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_answers(name, tmp_path):
    options, changes = KINDS[name]
    ranks, cards = math.prod(options.get(key, 1) for key in SIZES), torch.cuda.device_count()
    if cards and cards < ranks:
        pytest.skip(f"{ranks} GPUs are needed, there are {cards}")
    model = engines.save_export(tmp_path / "export", **changes)
    prompts = engines.random_prompts([1, 3, 40, 150])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, tmp_path / "export", json.dumps(options), json.dumps(prompts)],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "PYTHONPATH": os.pathsep.join(
                filter(None, (os.getcwd(), os.environ.get("PYTHONPATH")))
            ),
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("ANSWERS ")]
    answers = [
        SimpleNamespace(
            token_ids=tokens,
            logprobs=[
                {t: SimpleNamespace(logprob=p)} for t, p in zip(tokens, logprobs, strict=True)
            ],
        )
        for tokens, logprobs in json.loads(line.removeprefix("ANSWERS "))
    ]
    for prompt, answer in zip(prompts, answers, strict=True):
        engines.check(model, prompt, answer, 5e-5)
