"""Processes of one torchrun share the cells of a Hugging Face model's evaluation."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_hydra.evaluation.sharing import deal
from tests.parallel.launch import forked, torchrun

pytestmark = pytest.mark.parallel

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model, and five tasks of token ids, each of which has samples at one of two lengths."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    draw = random.Random(0)
    tasks = []
    for name in NAMES:
        samples = [
            {"prompt": draw.choices(range(3, 64), k=40), "answer": draw.choices(range(3, 64), k=2)}
            for _ in range(6)
        ]
        tasks.append(folder / f"{name}.jsonl")
        tasks[-1].write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return [
        "--model", str(folder), "--tasks", ",".join(map(str, tasks)), "--lengths", "64,96",
        "--samples", "2", "--depths", "2", "--device", "cpu", "--cache-length", "32", "--quiet", "--output",
    ]  # fmt: skip


def _results(output: Path) -> dict:
    """Without times."""
    body = json.loads((output / "results.json").read_text())
    for cells in body["tasks"].values():
        for cell in cells.values():
            assert cell.pop("seconds") >= 0
    return body


def test_two_processes_write_what_one_writes(arguments: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    forked("tools.evaluate", 1, *arguments, str(one))
    said = torchrun("tools.evaluate", 2, *arguments, str(two))
    assert _results(two) == _results(one)
    assert said.count("results: ") == 1  # only the first process reports
    assert {p.name for p in two.rglob("*")} == {p.name for p in one.rglob("*")}
    assert {name: len(cells) for name, cells in _results(two)["tasks"].items()} == dict.fromkeys(
        NAMES, 1
    )
    assert len(list((two / "cells").iterdir())) == len(NAMES)

    # Finished cells are read, the others are computed.
    kept = next((two / "cells").iterdir())
    before = kept.read_text()
    for path in (two / "cells").iterdir():
        if path != kept:
            path.unlink()
    (two / "results.json").unlink()
    forked("tools.evaluate", 2, *arguments, str(two))
    assert _results(two) == _results(one)
    assert kept.read_text() == before


def test_an_error_of_one_process_ends_all(arguments: list[str], tmp_path: Path) -> None:
    """Both get the error, also the one that has finished its share."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(AssertionError, match="is not empty and not an evaluation") as caught:
        forked("tools.evaluate", 2, *arguments, str(output))
    assert str(caught.value).count("is not empty and not an evaluation") >= 2
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_one_device_for_all_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="torchrun gives each process its own GPU"):
        forked("tools.evaluate", 2, *arguments, str(tmp_path / "out"), "--device", "cuda:0")


def test_cells_are_dealt_by_their_cost() -> None:
    assert deal([1, 8, 2, 4, 1], 2) == [[1], [3, 2, 0, 4]]
    assert deal([], 2) == [[], []]
    for count, processes in itertools.product(range(9), range(1, 5)):
        costs = [float(2**i) for i in range(count)]
        dealt = deal(costs, processes)
        assert sorted(itertools.chain(*dealt)) == list(range(count))
        loads = [sum(costs[i] for i in part) for part in dealt]
        assert not costs or max(loads) < 2 * max(costs)
