"""Records, their index, and reading any boxes from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_hydra.checkpoint import records
from megatron_hydra.checkpoint.records import Box
from megatron_hydra.errors import HydraError


def _boxes(key: str, whole: torch.Tensor, cuts: list[tuple[slice, ...]]) -> list[Box]:
    return [
        Box(
            key,
            tuple(part.start for part in cut),
            tuple(part.stop - part.start for part in cut),
            tuple(whole.shape),
            whole.dtype,
        )
        for cut in cuts
    ]


def _grid(*edges: list[int]) -> list[tuple[slice, ...]]:
    """All cells between the edges of each axis."""
    cells: list[tuple[slice, ...]] = [()]
    for of_axis in edges:
        steps = [slice(a, b) for a, b in zip(of_axis, of_axis[1:], strict=False)]
        cells = [(*cell, step) for cell in cells for step in steps]
    return cells


def _write(folder: Path, boxes: list[Box], tensors: list[torch.Tensor]) -> str:
    places, digest = records.write_file(folder / "__0_0.distcp", tensors)
    by_box = dict(zip(boxes, places, strict=True))
    records.write_index(folder, records.check_cover(boxes), by_box)
    return digest


@pytest.mark.parametrize("wanted", [[[0, 7], [0, 5]], [[0, 2, 6, 7], [0, 1, 5]], [[3, 4], [2, 3]]])
def test_boxes_are_read_from_records_of_other_boxes(
    tmp_path: Path, wanted: list[list[int]]
) -> None:
    whole = torch.arange(7 * 5 * 3).reshape(7, 5, 3).to(torch.bfloat16)
    stored = _grid([0, 3, 4, 7], [0, 4, 5], [0, 3])
    boxes = _boxes("a", whole, stored)
    _write(tmp_path, boxes, [whole[cut] for cut in stored])
    cells = _grid(*wanted, [0, 3])
    asked = _boxes("a", whole, cells)
    targets = [torch.zeros(box.shape, dtype=torch.float32) for box in asked]
    records.read_boxes(tmp_path, list(zip(asked, targets, strict=True)))
    for cell, target in zip(cells, targets, strict=True):
        assert torch.equal(target, whole[cell].float())


def test_a_record_needed_by_several_boxes_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    _write(tmp_path, _boxes("a", whole, _grid([0, 6], [0, 2])), [whole])
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (reads.append(1), load(*a, **k))[1])
    cells = _grid(list(range(7)), [0, 2])
    targets = [torch.zeros(1, 2) for _ in cells]
    records.read_boxes(tmp_path, list(zip(_boxes("a", whole, cells), targets, strict=True)))
    assert torch.equal(torch.cat(targets), whole)
    assert len(reads) == 1


def test_a_record_holds_only_the_tensor_and_is_hashed(tmp_path: Path) -> None:
    """A view's record leaves out the rest of its storage; a transposed tensor's elements keep their order."""
    large = torch.arange(4096.0).reshape(64, 64)
    views = [large[3:5], large[:, 1], large.t()[2:4], large[:0], torch.tensor(2.5)]
    places, digest = records.write_file(tmp_path / "file", views)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    content = (tmp_path / "file").read_bytes()
    for view, place in zip(views, places, strict=True):
        record = tmp_path / "record"
        record.write_bytes(content[place.offset : place.offset + place.length])
        found = torch.load(record, weights_only=True)
        assert torch.equal(found, view)
        assert found.untyped_storage().nbytes() == view.nbytes
    assert sum(place.length for place in places) == len(content)


def test_a_large_box_becomes_several_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORD_BYTES", 100)
    box = Box("a", (10, 0), (7, 10), (20, 10), torch.float32)
    cut = records.records_of(box)
    assert [part.offset for part in cut] == [(10 + i, 0) for i in (0, 2, 4, 6)]
    assert [part.shape for part in cut] == [(2, 10)] * 3 + [(1, 10)]
    assert records.records_of(Box("b", (), (), (), torch.float32)) != []
    rows_too_large = Box("c", (0, 0), (2, 1000), (2, 1000), torch.float32)
    assert [part.shape for part in records.records_of(rows_too_large)] == [(1, 1000)] * 2


@pytest.mark.parametrize(
    "cuts",
    [
        [[0, 2], [3, 6]],  # a gap
        [[0, 4], [3, 6]],  # an overlap
        [[0, 3], [2, 4], [4, 5]],  # as many elements as the whole, but two boxes overlap
    ],
)
def test_parts_that_do_not_cover_a_tensor_are_refused(cuts: list[list[int]]) -> None:
    whole = torch.zeros(6)
    boxes = _boxes("some.key", whole, [(slice(a, b),) for a, b in cuts])
    with pytest.raises(HydraError, match=r"parts of 'some\.key'"):
        records.check_cover(boxes)


def test_ranks_that_disagree_on_a_tensor_are_refused() -> None:
    one = Box("some.key", (0,), (3,), (6,), torch.float32)
    with pytest.raises(HydraError, match="disagree"):
        records.check_cover([one, Box("some.key", (3,), (3,), (7,), torch.float32)])


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    whole = torch.zeros(6)
    boxes = _boxes("a", whole, [(slice(0, 6),)])
    _write(tmp_path, boxes, [whole])
    for box, message in (
        (Box("b", (0,), (6,), (6,), torch.float32), "no tensor 'b'"),
        (Box("a", (0,), (6,), (7,), torch.float32), r"'a' has shape \[6\], this run needs \[7\]"),
    ):
        with pytest.raises(HydraError, match=message):
            records.read_boxes(tmp_path, [(box, torch.zeros(6))])
    index = records.read_index(tmp_path)
    index.state_dict_metadata["a"].chunks.clear()
    with pytest.raises(HydraError, match="part of 'a' is not in the checkpoint"):
        records.read_boxes(tmp_path, [(boxes[0], torch.zeros(6))], index)
    index = records.read_index(tmp_path)
    index.storage_data.clear()
    with pytest.raises(HydraError, match="has no place for a part of 'a'"):
        records.read_boxes(tmp_path, [(boxes[0], torch.zeros(6))], index)
    records.write_file(tmp_path / "__0_0.distcp", [torch.zeros(5)])
    with pytest.raises(HydraError, match="not a tensor of the shape in the index"):
        records.read_boxes(tmp_path, [(boxes[0], torch.zeros(6))])


def test_plain_tensors_are_saved_from_the_host(tmp_path: Path) -> None:
    common = {"step": torch.tensor(3.0), "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    records.write_common(tmp_path, common)
    assert torch.load(tmp_path / "common.pt", weights_only=True) == common
