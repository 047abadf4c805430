"""Opening a model folder for evaluation: weights as safetensors only, its code only on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.hf_identity import resolve_hf_folder

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(
    folder: str | Path,
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A causal model in eval mode.

    Args:
        folder: a local Hugging Face model folder, or a Hub name (downloaded if need be).
        revision: of a Hub name: branch, tag or commit.
        trust_remote_code: run the modelling code that the folder carries.
        dtype: ``auto`` (as stored), ``fp32``, ``bf16`` or ``fp16``.
        device: ``auto`` (the GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, …
        changes: keys of the folder's ``config.json`` with other values, as ``rope_parameters`` of YaRN.

    Raises:
        HydraError: no such folder, no safetensors in it, its own code and no permission to run it, a
            changed key that the model's config does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checked_folder(folder, trust_remote_code, revision)
    if dtype not in DTYPES:
        raise HydraError(f"--dtype {dtype} is unknown: use one of {', '.join(DTYPES)}")
    if device == "auto":
        from megatron_hydra.parallel import platform

        device = str(platform.device())
    try:
        words = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        known = AutoConfig.from_pretrained(path, **words)
        if unknown := [key for key in changes or {} if not hasattr(known, key)]:
            raise HydraError(
                f"--model-config: the config of {path} has no key {', '.join(unknown)}"
            )
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.from_pretrained(path, **words, **(changes or {})),
            trust_remote_code=trust_remote_code,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
        )
    except HydraError:
        raise
    except Exception as error:  # of a damaged config, transformers raises what it likes
        raise HydraError(f"model {path} cannot be loaded: {error}") from error
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device; torch without CUDA
        problem = str(error).splitlines()[0]
        raise HydraError(f"--device {device}: the model cannot be put there: {problem}") from error


def load_tokenizer(
    folder: str | Path, *, trust_remote_code: bool = False, revision: str = ""
) -> Any:
    """The tokenizer of a model folder (or in a folder of its own), or ``None`` if there is none.

    Raises:
        HydraError: the tokenizer files are there and cannot be read.
    """
    from transformers import AutoTokenizer

    path = _resolved(folder, trust_remote_code, revision)
    if (path / "config.json").is_file():  # of a model; a checkpoint's tokenizer stands alone
        checked_folder(path, trust_remote_code)
    if not any((path / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        tokenizer("a")  # some settings of a wrong type are noticed only now
        return tokenizer
    except Exception as error:  # of a damaged file, its library raises a bare Exception
        raise HydraError(f"the tokenizer in {path} cannot be loaded: {error}") from error


def checked_folder(folder: str | Path, trust_remote_code: bool, revision: str = "") -> Path:
    """The folder (of a Hub name: its snapshot), if it is a model whose code may be run."""
    path = _resolved(folder, trust_remote_code, revision)
    if not (path / "config.json").is_file():
        raise HydraError(
            f"model {path} is not a Hugging Face model folder (it has no config.json); "
            "tools/megatron_to_hf.py makes one from a checkpoint"
        )
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise HydraError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise HydraError(f"{path / 'config.json'} must hold a JSON object")
    if config.get("auto_map") and not trust_remote_code:
        files = ", ".join(sorted(p.name for p in path.glob("*.py"))) or "named in auto_map"
        raise HydraError(
            f"model {path} carries its own modelling code ({files}), which is run only with "
            "--trust-remote-code; look at the files first if you did not make them"
        )
    return path


def _resolved(folder: str | Path, trust_remote_code: bool, revision: str) -> Path:
    try:
        return resolve_hf_folder(folder, revision, with_code=trust_remote_code)
    except HydraError as error:
        raise HydraError(f"model {folder} is not a Hugging Face model folder: {error}") from None
