"""Files that would run code if opened without checks. The code would make a sentinel file."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_hydra.checkpoint import integrity, store
from megatron_hydra.config import apply_overrides
from megatron_hydra.conversion.convert import megatron_to_hf
from megatron_hydra.errors import HydraError
from megatron_hydra.hf_loading import find_tokenizer, load_hf_model
from megatron_hydra.training.loop import run_training
from tests.checkpoint.models import make_head_map, make_hf
from tests.faults.runs import start_run

ROOT = Path(__file__).resolve().parents[2]


class _RunsCode:
    """An object whose unpickling creates the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """The sentinel must not exist after the test. A control shows that the payload would create it."""
    control = tmp_path / "control"
    pickle.loads(pickle.dumps(_RunsCode(control)))  # noqa: S301
    assert control.exists()
    return tmp_path / "sentinel"


@pytest.fixture
def student(inputs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(inputs / "student", tmp_path / "student")


def _forge_index(folder: Path, sentinel: Path) -> None:
    (folder / "weights/.metadata").write_bytes(pickle.dumps(_RunsCode(sentinel)))


def _forge_part_of_index(folder: Path, sentinel: Path) -> None:
    """An index with one value replaced by a payload, which would run while the rest is read."""
    index = integrity.read_index(folder / "weights")
    index.planner_data = _RunsCode(sentinel)
    (folder / "weights/.metadata").write_bytes(pickle.dumps(index))


def _forge_common(folder: Path, sentinel: Path) -> None:
    torch.save({"content_metadata": _RunsCode(sentinel)}, folder / "weights/common.pt")


def _append(folder: Path, sentinel: Path) -> tuple[str, int, int]:
    """Append a payload to a file of weights; returns file, offset and length."""
    buffer = io.BytesIO()
    torch.save(_RunsCode(sentinel), buffer)
    path = next(iter((folder / "weights").glob("*.distcp")))
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(buffer.getvalue())
    return path.name, offset, len(buffer.getvalue())


def _forge_tensor(folder: Path, sentinel: Path) -> None:
    """A pickle at the place that the index gives for a tensor."""
    index = integrity.read_index(folder / "weights")
    info = next(iter(index.storage_data.values()))
    info.relative_path, info.offset, info.length = _append(folder, sentinel)
    (folder / "weights/.metadata").write_bytes(pickle.dumps(index))


def _forge_object(folder: Path, sentinel: Path) -> None:
    """A pickle at the place that the index gives for a plain object, which torch reads without a check."""
    index = integrity.read_index(folder / "weights")
    place = MetadataIndex("optimizer.step")
    index.state_dict_metadata[place.fqn] = BytesStorageMetadata()
    index.storage_data[place] = _StorageInfo(*_append(folder, sentinel))
    (folder / "weights/.metadata").write_bytes(pickle.dumps(index))


def _forge_object_like_a_tensor(folder: Path, sentinel: Path) -> None:
    """A pickle in place of a weight; its entry has a tensor's fields, but not its class."""
    index = integrity.read_index(folder / "weights")
    key = "embedding.word_embeddings.weight"
    entry = BytesStorageMetadata()
    vars(entry).update(vars(index.state_dict_metadata[key]))
    index.state_dict_metadata[key] = entry  # type: ignore[assignment]
    index.storage_data[MetadataIndex(key)] = _StorageInfo(*_append(folder, sentinel))
    (folder / "weights/.metadata").write_bytes(pickle.dumps(index))


FORGERIES = {
    ".metadata": _forge_index,
    "a value in .metadata": _forge_part_of_index,
    "common.pt": _forge_common,
    "a tensor in .distcp": _forge_tensor,
    "an object in .distcp": _forge_object,
    "an object that claims to be a tensor": _forge_object_like_a_tensor,
}
REFUSED = r"not opened|Weights only load failed"


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_student_runs_nothing(
    forge: Callable, student: Path, inputs: Path, tmp_path: Path, sentinel: Path, table, request
) -> None:
    """It is refused even if the manifest matches: anybody who can write the folder can write a manifest."""
    forge(student, sentinel)
    store.write_manifest(student)
    config = apply_overrides(
        start_run(inputs, tmp_path / "run", 1, verb="finetune").config,
        [f"student.checkpoint={student}"],
    )
    with pytest.raises(HydraError, match=REFUSED):
        run_training(config)
    with pytest.raises(HydraError, match=REFUSED):
        store.load_canonical(student)
    with pytest.raises(HydraError, match=REFUSED):
        megatron_to_hf(student, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert not sentinel.exists()
    name = request.node.callspec.id
    where = "a checkpoint to start from or to export"
    table(f"payload in {name} of {where}", 1, 1, "refused, sentinel absent")


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_checkpoint_of_the_run_itself_runs_nothing(
    forge: Callable, inputs: Path, tmp_path: Path, sentinel: Path, table, request
) -> None:
    config = start_run(inputs, tmp_path / "run", 1, verb="finetune").config
    assert run_training(config) == 0
    folder = store.resolve_checkpoint(Path(config.output) / "checkpoints")
    provenance = store.read_manifest(folder)["provenance"]
    forge(folder, sentinel)
    store.write_manifest(folder, provenance)
    with pytest.raises(HydraError, match=REFUSED):
        run_training(apply_overrides(config, ["schedule.steps=2"]))
    assert not sentinel.exists()
    name = request.node.callspec.id
    table(f"payload in {name} of a checkpoint to resume", 1, 1, "refused, sentinel absent")


def _add_attribute(index: Metadata) -> None:
    index.mcore_data = {}  # type: ignore[attr-defined]


def _take_other_class(index: Metadata) -> None:
    key = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[key] = ChunkStorageMetadata(torch.Size(), torch.Size())  # type: ignore[assignment]


def _transform(index: Metadata) -> None:
    next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add_attribute, "the index has an attribute 'mcore_data'"),
        (_take_other_class, "is a ChunkStorageMetadata, not a TensorStorageMetadata"),
        (_transform, "is stored transformed"),
    ],
)
def test_an_index_with_unknown_classes_is_refused(
    change: Callable, message: str, student: Path
) -> None:
    index = integrity.read_index(student / "weights")
    change(index)
    (student / "weights/.metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(HydraError, match=message):
        integrity.read_index(student / "weights")


def test_an_index_changes_no_class(student: Path) -> None:
    """A pickle can set attributes of a class that it names; all instances then have them."""
    path = student / "weights/.metadata"
    build = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
        b"N}X\x06\x00\x00\x00forgedNs\x86b0"
    )
    path.write_bytes(build + path.read_bytes()[2:])
    pickle.loads(build + b"N.")  # noqa: S301
    del TensorStorageMetadata.forged  # type: ignore[attr-defined]  # so it does change the class
    with pytest.raises(HydraError, match="changes the class TensorStorageMetadata"):
        integrity.read_index(student / "weights")
    assert not hasattr(TensorStorageMetadata, "forged")


# -- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "weights/../../outside", ""])
def test_names_in_a_manifest_stay_inside(name: str, student: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    path = student / store.MANIFEST_FILE
    body = json.loads(path.read_text())
    body["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    _reseal(path, body)
    with pytest.raises(HydraError, match="not a file inside the checkpoint"):
        store.verify_manifest(student)


def _reseal(path: Path, body: dict) -> None:
    """Write a manifest with a matching digest, as a forger would."""
    import hashlib

    body = {"digest": "0" * 64} | {k: v for k, v in body.items() if k != "digest"}
    text = json.dumps(body, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(text.replace("0" * 64, digest, 1))


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/hostname", "sub/file", ".."])
def test_names_in_an_index_stay_inside(name: str, student: Path) -> None:
    index = integrity.read_index(student / "weights")
    next(iter(index.storage_data.values())).relative_path = name
    (student / "weights/.metadata").write_bytes(pickle.dumps(index))
    store.write_manifest(student)
    with pytest.raises(HydraError, match="is not a file in"):
        store.load_canonical(student)


@pytest.mark.parametrize("what", ["weights/__0_0.distcp", "weights", "model.json"])
def test_links_that_may_lead_outside_are_refused(what: str, student: Path, tmp_path: Path) -> None:
    path = student / what
    shutil.move(path, tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(HydraError, match="symbolic link"):
        store.verify_manifest(student)


def test_a_safetensors_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    from megatron_hydra.conversion.hf_io import HfWeights

    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HydraError, match="is not the name of a file in this folder"):
        HfWeights(tmp_path)


# -- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["starts", "offsets", "lengths"])
def test_a_forged_packing_cache_runs_nothing(
    name: str, inputs: Path, tmp_path: Path, sentinel: Path, table
) -> None:
    config = start_run(inputs, tmp_path / "run", 1, verb="finetune").config
    config = apply_overrides(config, [f"data.cache_dir={tmp_path / 'cache'}"])
    assert run_training(config) == 0
    (cache,) = (tmp_path / "cache").rglob(f"{name}.npy")
    np.save(cache, np.array([_RunsCode(sentinel)], dtype=object), allow_pickle=True)
    with pytest.raises(HydraError, match="damaged packing index"):
        run_training(apply_overrides(config, [f"output={tmp_path / 'other'}"]))
    assert not sentinel.exists()
    table(f"payload in {name}.npy of the packing cache", 1, 1, "refused, sentinel absent")


# -- Hugging Face folders -------------------------------------------------------------------------

_CODE = (
    "import os\nos.mkdir({sentinel!r})\nclass Model: pass\nclass Config: pass\nclass Tok: pass\n"
)
_LACKS_TRUST = "trust_remote_code=True|--trust-remote-code"


@pytest.fixture
def hf_folder(tmp_path: Path, sentinel: Path) -> Path:
    """A complete model folder whose own code, pickled weights and tokenizer would all run code.

    Its family has no tokenizer class in transformers, so transformers would ask on stdin.
    """
    folder = make_hf(tmp_path / "hf", "llama")
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["Model"],
        "auto_map": {
            name: f"evil.{name[4:10]}"
            for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(_CODE.format(sentinel=str(sentinel)))
    torch.save(_RunsCode(sentinel), folder / "pytorch_model.bin")
    return folder


def test_evaluation_asks_before_it_runs_a_folders_code(hf_folder: Path, sentinel: Path) -> None:
    with pytest.raises(HydraError, match=_LACKS_TRUST):
        load_hf_model(hf_folder)
    with pytest.raises(HydraError, match=_LACKS_TRUST):
        find_tokenizer(hf_folder)
    assert not sentinel.exists()


_COMMANDS = {
    "conversion": ("hf_to_megatron.py --hf-path {hf} --output {out}", 0, ""),
    "conversion with calibration": (
        "hf_to_megatron.py --hf-path {hf} --output {out} --head-map {map}", 2, _LACKS_TRUST,
    ),
    "calibration on given tokens": (
        "hf_to_megatron.py --hf-path {hf} --output {out} --head-map {map} --calibration-file {ids}",
        2, _LACKS_TRUST,
    ),
    "selection": ("select_heads.py --hf-path {hf} --output {out}", 2, _LACKS_TRUST),
    "evaluation": (
        "evaluate.py --model {hf} --tasks niah_single_1 --lengths 1K --output {out}", 2,
        _LACKS_TRUST,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _COMMANDS)
def test_code_and_pickles_of_a_model_folder_do_not_run(
    name: str, hf_folder: Path, sentinel: Path, tmp_path: Path, table, monkeypatch, capsys
) -> None:
    """It does not run even if a user answers yes: transformers asks on stdin if it gets no setting."""
    words, status, reason = _COMMANDS[name]
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"tokens": [1, 2, 3]}\n')
    places = {
        "hf": hf_folder, "out": tmp_path / "out", "ids": ids,
        "map": make_head_map(tmp_path / "map.json", hf_folder),
    }  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    arguments = words.format(**places).split()
    monkeypatch.setattr(sys, "argv", arguments)
    assert runpy.run_path(str(ROOT / "tools" / arguments[0]))["main"]() == status
    said = capsys.readouterr().err
    assert re.search(reason, said), said[-2000:]
    assert not sentinel.exists()
    outcome = "refused" if status else "converted from its safetensors"
    table(
        f"{name}: auto_map code, tokenizer code and pytorch_model.bin of a Hugging Face folder",
        1, 1, f"{outcome}, sentinel absent",
    )  # fmt: skip


def test_the_tokenizer_of_a_config_runs_nothing(
    hf_folder: Path, inputs: Path, tmp_path: Path, sentinel: Path
) -> None:
    config = start_run(inputs, tmp_path / "run", 1, verb="finetune").config
    with pytest.raises(HydraError):
        run_training(apply_overrides(config, [f"data.tokenizer={hf_folder}"]))
    assert not sentinel.exists()


# -- secrets --------------------------------------------------------------------------------------


def test_tokens_are_written_nowhere(inputs: Path, tmp_path: Path) -> None:
    """Secrets appear neither in the run's folder nor in its output, in success and in failure."""
    secret = "hf_SENTINEL0123456789"
    run = start_run(inputs, tmp_path / "run", 1, verb="finetune")
    environment = os.environ | {
        "HF_TOKEN": secret, "WANDB_API_KEY": secret, "OMP_NUM_THREADS": "1",
        "MEGATRON_HYDRA_TRACEBACK": "1",
    }  # fmt: skip
    for extra in ([], ["student.checkpoint=nowhere"]):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_hydra.train", "--config",
             str(run.folder / "config.yaml"), *extra],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == (not extra), done.stderr[-3000:]
        assert secret not in done.stdout + done.stderr
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]
