"""The example scripts run unchanged."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_hydra as mh

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "add_capability",
        "choose_heads",
        "use_export",
    }


@pytest.mark.slow
def test_heads_are_chosen(tmp_path: Path) -> None:
    head_map = example("choose_heads").main(["--output", str(tmp_path / "map.json")])
    assert head_map.num_full_attention == 8  # a quarter of 32
    assert mh.HeadMap.load(tmp_path / "map.json") == head_map


@pytest.mark.slow
def test_an_export_is_used(capsys: pytest.CaptureFixture) -> None:
    text = example("use_export").main(["--prompt", "the key", "--new-tokens", "4"])
    assert text.startswith("the key")
    assert "8 of 32 heads keep full attention" in capsys.readouterr().out


@pytest.mark.slow
def test_an_own_capability_scores_like_the_built_in_one_that_it_copies() -> None:
    """Both find the teacher's induction head: layer 2, head 0."""
    head_map = example("add_capability").main([])
    for scores in head_map.scores.values():
        assert max((x, i, j) for i, row in enumerate(scores) for j, x in enumerate(row))[1:] == (
            2,
            0,
        )


def test_the_names_at_the_package_root_exist_and_cost_nothing() -> None:
    assert all(getattr(mh, name) is not None for name in mh.__all__)
    with pytest.raises(AttributeError, match="no attribute 'selectheads'"):
        mh.selectheads  # noqa: B018
    program = (
        "import sys, megatron_hydra; print(len(set(sys.modules) & {'torch', 'yaml', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=EXAMPLES.parent,
    )
    assert done.stdout == "0\n"
