"""The benchmark against the dense model runs from end to end at a toy size."""

from __future__ import annotations

import json

from tests.serving.vllm import engines

engines.need_vllm()


def test_toy_run(tmp_path):
    from benchmarks import serving

    flags = ["--tiny", "--eager", "--requests", "3", "--new-tokens", "4", "--repeats", "1"]
    flags += ["--memory", "0.1"]
    assert serving.main([*flags, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(r["model"], r["prompt_tokens"]) for r in rows] == [
        (model, length) for model in serving.MODELS for length in (64, 300)
    ]
    for row in rows:
        assert row["together"] == row["requests"] == 3
        assert row["preemptions"] == 0
        assert min(row["first_token_s"], row["requests_per_s"], row["largest_batch"]) > 0
