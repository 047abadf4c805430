"""The check that a folder contains no code for transformers except this package's."""

from __future__ import annotations

import json

import pytest

from megatron_hydra.hf.export_files import auto_map, carries_our_code, hf_export_files


@pytest.fixture
def export(tmp_path):
    for name, source in hf_export_files().items():
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map()}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def test_our_own_code_is_recognised(export):
    assert carries_our_code(export)


def test_a_folder_without_code_carries_none(tmp_path):
    assert not carries_our_code(tmp_path)


def test_more_less_or_other_code_is_not_ours(export):
    for name in ("extra.py", "custom_generate/generate.py"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("")
        assert not carries_our_code(export)
        (export / name).unlink()
    path = export / next(iter(hf_export_files()))
    text = path.read_text()
    path.write_text(text + "\n")
    assert not carries_our_code(export)
    path.unlink()
    assert not carries_our_code(export)
    path.write_text(text)
    assert carries_our_code(export)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_an_auto_map_that_leads_elsewhere_is_not_ours(name, export):
    elsewhere = {"AutoModelForCausalLM": "somebody/else--modeling.Model"}
    (export / name).write_text(json.dumps({"auto_map": elsewhere}))
    assert not carries_our_code(export)
