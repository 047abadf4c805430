"""tools/partition.py: the lines of a partition, and refused inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.training import tiny

TOOL = Path(__file__).resolve().parents[2] / "tools" / "partition.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("partition_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_all(folder, tiny.DEEP)
    return str(folder / "student")


def _printed(tool, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert tool.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_heads_and_work_of_every_rank_and_layer(tool, student, capsys) -> None:
    lines = _printed(
        tool, capsys, "--checkpoint", student, "--tensor", "2", "--sequence-length", "100000",
        "--fa-partition", "heads",
    )  # fmt: skip
    assert lines[0] == "FA partition heads, 2 tensor-parallel ranks, 100,000 tokens"
    # 3 FA heads over 2 ranks: imbalance 2 / 1.5; 4d·pairs = 2·8·100,000·100,001 FLOPs each
    third = lines.index(next(line for line in lines if line.startswith("  layer 2:")))
    assert lines[third].endswith("(FA 1.333)")
    ranks = lines[third + 1 : third + 3]
    assert [line.split(";")[0] for line in ranks] == ["    rank 0: FA 0,1", "    rank 1: FA 5"]
    assert "GFLOPs: FA 320.0, GDN " in ranks[0]
    assert "GFLOPs: FA 160.0, GDN " in ranks[1]
    # layer 3 has one FA head, so one rank has all of it
    assert lines[-1] == "  worst imbalance of FA alone: 2.000 (layer 3)"
    assert lines[-2].startswith("  worst imbalance: ")
    assert len(lines) == 1 + 4 * 3 + 2


def test_both_partitions_are_shown_and_sequence_is_even(tool, student, capsys) -> None:
    lines = _printed(tool, capsys, "--checkpoint", student, "--tensor", "4", "--summary")
    assert [line for line in lines if not line.startswith(" ")] == [
        "FA partition heads, 4 tensor-parallel ranks, 32,768 tokens",
        "FA partition sequence, 4 tensor-parallel ranks, 32,768 tokens",
    ]
    assert lines[2] == "  worst imbalance of FA alone: 4.000 (layer 3)"
    assert lines[-1].startswith("  worst imbalance of FA alone: 1.000 ")


def test_impossible_partitions_are_refused(tool, student, capsys) -> None:
    assert tool.main(["--checkpoint", student, "--tensor", "16"]) == 2
    assert "layer 0: 8 query heads cannot be distributed over" in capsys.readouterr().err
    assert tool.main(["--checkpoint", student, "--tensor", "0"]) == 2
    assert "--tensor and --sequence-length must be at least 1" in capsys.readouterr().err
