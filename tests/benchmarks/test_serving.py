"""Without vLLM, the serving benchmark shows its help and names what is missing.

tests/serving/vllm/test_benchmark.py runs it with vLLM.
"""

from __future__ import annotations

import sys

import pytest

from benchmarks import serving


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        serving.main(["--help"])
    assert stopped.value.code == 0
    assert "python -m benchmarks.serving" in capsys.readouterr().out


def test_without_vllm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    flags = ["--tiny", "--model", "hydra", "--output", str(tmp_path / "rows.json")]
    assert serving.main(flags) == 2
    assert "vLLM cannot be imported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["8K,", "none", "0"])
def test_lengths(text, capsys):
    assert serving.main(["--lengths", text]) == 2
    assert f"--lengths '{text}'" in capsys.readouterr().err


def test_the_hybrid_has_one_head_in_eight(tmp_path):
    args = serving.parser().parse_args([])
    said = serving.write_config("hydra", args, tmp_path)
    assert said["fa_heads"] == 56
