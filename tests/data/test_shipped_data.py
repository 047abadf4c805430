"""configs/data and docs/data.md agree; the configs open, and the commands are valid."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_hydra.config.run import DataConfig
from megatron_hydra.data import PackedStream
from megatron_hydra.data.data_options import load_data_sections
from megatron_hydra.data.indexed import write_index

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
STAGES = sorted((ROOT / "configs/data").glob("stage*.yaml"))
COLUMNS = ("data/fineweb_edu", "data/finemath", "data/stack_edu", "data/finepdfs", "data/pg19")
COLUMNS += ("data/smoltalk", "")  # "": generated


def stage_data(path: Path) -> DataConfig:
    return load_data_sections(str(path)).data


def commands(text: str) -> list[list[str]]:
    """The words of every data_prep command in a text."""
    joined = re.sub(r"\\+\n", " ", text)
    options = re.search(r'^T="(.*)"$', joined, flags=re.MULTILINE)
    found = re.findall(r"^ *python (data_prep/\S+\.py.*?)(?:  +#.*)?$", joined, flags=re.MULTILINE)
    words = [shlex.split(command) for command in found]
    extra = options[1].split() if options else []
    return [[w for word in line for w in (extra if word == "$T" else [word])] for line in words]


def script(name: str):
    spec = importlib.util.spec_from_file_location("script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_budgets_are_15_billion_tokens():
    assert len(STAGES) == 4
    assert sum(stage_data(path).token_budget for path in STAGES) == 15_000_000_000


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_the_table_of_the_page_equals_the_config(path):
    data = stage_data(path)
    line = re.search(rf"^\| \[{path.stem}\].*$", PAGE, flags=re.MULTILINE)[0]
    _, _, length, budget, *cells = (cell.strip() for cell in line.split("|")[:-1])
    assert int(length.replace(",", "")) == data.sequence_length
    assert budget == f"{data.token_budget / 1e9:.1f} B"
    total = sum(part.weight for part in data.blend)
    assert total == pytest.approx(1)
    for column, cell in zip(COLUMNS, cells, strict=True):
        share = sum(part.weight for part in data.blend if part.path == column)
        tokens = share / total * data.token_budget / 1e9
        assert cell == (f"{tokens:.3f} B" if tokens else "")


def test_every_source_has_a_licence_and_a_command():
    wanted = {part.path for path in STAGES for part in stage_data(path).blend if part.path}
    licensed = set(re.findall(r"^\| `(data/\w+)` \| \[.*\]\(https://.*\) ?.* \| \S.* \|$", PAGE,
                              flags=re.MULTILINE))  # fmt: skip
    assert licensed == wanted == set(COLUMNS[:-1])
    prepared = {line[line.index("--output") + 1] for line in commands(PAGE) if "--dataset" in line}
    assert prepared == wanted


def test_prepared_data_cover_all_data_that_the_stages_read():
    read = dict.fromkeys(COLUMNS[:-1], 0.0)
    for path in STAGES:
        data = stage_data(path)
        for part in data.blend:
            if part.path:
                read[part.path] += part.weight * data.token_budget
    for line in commands(PAGE):
        if "--dataset" in line and "--max-tokens" in line:
            limit = float(line[line.index("--max-tokens") + 1])
            assert limit > 1.05 * read[line[line.index("--output") + 1]]


@pytest.mark.parametrize("name", ["docs/data.md", *sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "data_prep").glob("*.py"))])  # fmt: skip
def test_commands_shown_are_commands(name):
    found = commands((ROOT / name).read_text(encoding="utf-8"))
    assert found
    for program, *words in found:
        words = [word.replace("$SLURM_ARRAY_TASK_ID", "3") for word in words]
        module = script(program)
        if hasattr(module, "parse"):
            module.parse(words)
        for flag, value in zip(words, words[1:], strict=False):
            if flag == "--config" and value.endswith(".yaml"):
                assert (ROOT / value).exists(), value


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_opens_and_gives_samples(path, tmp_path, qwen):
    """Its sources are replaced by small ones; everything else is as shipped."""
    data, rng = stage_data(path), np.random.default_rng(0)
    lengths = np.array([300, 5_000, 40_000, 90_000, 200_000, 300_000])
    lengths = np.concatenate([lengths, rng.integers(100, 3_000, 300)])
    (tmp_path / "data").mkdir()
    for name in {part.path for part in data.blend if part.path}:
        prefix = str(tmp_path / name)
        rng.integers(1, 400, lengths.sum(), dtype=np.uint16).tofile(prefix + ".bin")
        write_index(prefix + ".idx", np.uint16, lengths, np.arange(len(lengths) + 1))
    blend = tuple(
        dataclasses.replace(part, path=os.path.join(tmp_path, part.path) if part.path else "")
        for part in data.blend
    )
    data = dataclasses.replace(data, blend=blend, tokenizer=qwen)
    batch = load_data_sections(str(path)).batch
    stream = PackedStream(data, batch, dp_rank=0, dp_size=1, vocab_size=500)
    seen: set[int] = set()
    sample = 0
    while len(seen) < len(blend):
        draw = stream.draw(sample)
        if draw.source not in seen:
            used = sum(map(len, stream.documents(sample)))
            least = 0 if blend[draw.source].path else 0.5 * data.sequence_length
            assert least < used <= data.sequence_length
        seen.add(draw.source)
        sample += 1
        assert sample < 200
