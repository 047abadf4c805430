"""Open Hugging Face models and tokenizers: weights as safetensors only, foreign code only on request."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.errors import HydraError
from megatron_hydra.files import read_json
from megatron_hydra.hf_identity import read_config_json, resolve_hf_folder

COMPUTED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes in which this package converts and selects."""

DTYPES: dict[str, str | torch.dtype] = {"auto": "auto", **COMPUTED_DTYPES, "fp16": torch.float16}

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with one of these has a tokenizer."""


# -- models --------------------------------------------------------------------------------------


def load_hf_model(
    folder: str | os.PathLike[str],
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = "auto",
    model_class: Any = None,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A model in eval mode, by default a causal language model.

    Args:
        folder: a local Hugging Face model folder, or a Hub name (downloaded if necessary).
        revision: of a Hub name: branch, tag or commit.
        trust_remote_code: whether to run the folder's modelling code.
        dtype: a key of :data:`DTYPES` (``auto``: as stored) or a dtype of torch.
        device: ``auto`` (the GPU if there is one), a device of torch, or ``None`` for the CPU.
        model_class: class whose ``from_pretrained`` reads the folder; default: ``AutoModelForCausalLM``. With a
            class of this package, the folder's own code does not run.
        changes: other values for keys of the folder's ``config.json``, such as ``rope_parameters`` of YaRN.

    Raises:
        HydraError: no such folder, no safetensors in it, own code without permission to run it, or a changed
            key that the model's config does not have.
    """
    from transformers import AutoModelForCausalLM

    of_ours = model_class is not None and model_class.__module__.startswith("megatron_hydra.")
    path = checked_folder(folder, trust_remote_code or of_ours, revision)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise HydraError(f"dtype {dtype} is unknown: use one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if device == "auto":
        from megatron_hydra.parallel import platform

        device = platform.device()
    loader: Any = model_class or AutoModelForCausalLM
    try:
        changed = {"config": _changed_config(path, trust_remote_code, changes)} if changes else {}
        model = loader.from_pretrained(
            path,
            **changed,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    except HydraError:
        raise
    except Exception as error:  # for a damaged config, transformers may raise any error
        raise HydraError(f"model {path} cannot be loaded: {error}") from error
    if device is None:
        return model.eval()
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or torch without CUDA
        problem = str(error).splitlines()[0]
        raise HydraError(f"device {device}: the model cannot be put there: {problem}") from error


def _changed_config(path: Path, trust_remote_code: bool, changes: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    config, unused = AutoConfig.from_pretrained(
        path,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        return_unused_kwargs=True,
        **changes,
    )
    if unknown := [key for key in changes if key in unused]:
        raise HydraError(f"--model-config: the config of {path} has no key {', '.join(unknown)}")
    return config


def checked_folder(
    folder: str | os.PathLike[str], trust_remote_code: bool, revision: str = ""
) -> Path:
    """The folder (for a Hub name, its snapshot), if it is a model whose code may run."""
    try:
        path = resolve_hf_folder(folder, revision, with_code=trust_remote_code)
    except HydraError as error:
        raise HydraError(f"model {folder} is not a Hugging Face model folder: {error}") from None
    if read_config_json(path).get("auto_map") and not trust_remote_code:
        raise _needs_trust("model", path)
    return path


def _needs_trust(kind: str, path: Path) -> HydraError:
    files = ", ".join(sorted(p.name for p in path.glob("*.py"))) or "named in auto_map"
    return HydraError(
        f"{kind} {path} carries its own code ({files}), which is run only with "
        "--trust-remote-code; look at the files first if you did not make them"
    )


# -- tokenizers ----------------------------------------------------------------------------------


def find_tokenizer(
    source: str | os.PathLike[str], *, revision: str = "", trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer of a folder, a ``tokenizer.json`` or a Hub name; ``None`` if a folder has none.

    It is tested on a character. Truncation and padding of its files are turned off.

    Args:
        source: a folder with one of :data:`VOCABULARY_FILES`, with or without a model; a file; or a Hub name,
            whose weights are not fetched.
        revision: of a Hub name: branch, tag or commit.
        trust_remote_code: whether to run the code of the folder's tokenizer.

    Raises:
        HydraError: no such source, or its files cannot be read or need code that may not run.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            path = resolve_hf_folder(
                source, revision, with_code=trust_remote_code, with_weights=False
            )
            if not any((path / name).is_file() for name in VOCABULARY_FILES):
                return None
            if not trust_remote_code and _has_tokenizer_code(path):
                raise _needs_trust("folder", path)
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        tokenizer("a")  # some settings of a wrong type fail only here
    except HydraError as error:
        raise HydraError(f"tokenizer {source}: {error}") from None
    except Exception as error:  # for a damaged file, its library raises a bare Exception
        raise HydraError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _has_tokenizer_code(folder: Path) -> bool:
    """Whether a config names a class in a Python file as the tokenizer's class."""
    for name in ("tokenizer_config.json", "config.json"):
        if (folder / name).is_file():
            classes = read_json(folder / name).get("auto_map")
            if isinstance(classes, dict) and "AutoTokenizer" in classes:
                return True
    return False


@functools.lru_cache(maxsize=8)
def load_tokenizer(
    source: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """:func:`find_tokenizer`, once for each process; a missing tokenizer is an error.

    Raises:
        HydraError: as there, and if there is no tokenizer.
    """
    if not source:
        raise HydraError("data.tokenizer is empty: give the folder or Hub name of an HF tokenizer")
    tokenizer = find_tokenizer(source, revision=revision or "", trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise HydraError(f"{source} has no tokenizer (none of {', '.join(VOCABULARY_FILES)})")
    return tokenizer
