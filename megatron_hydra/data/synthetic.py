"""Long-context tasks generated during training: a registry of generators, and the built-in tasks.

A generator is a function ``(rng, length, tokenizer, **options) -> list[Document]``, registered with
``@synthetic_task("name")``. It returns documents of at most ``length`` tokens in total and takes all random
numbers from ``rng``. It marks the tokens that the task asks for as trainable. ``tokenizer`` is an HF tokenizer,
or ``None`` if the config names none (tasks that make token ids directly need none). A config names a task of
another installed package as ``package.module:function``, without registration.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import numpy as np

from megatron_hydra.data import synthetic_tasks  # noqa: F401  # registers the built-in tasks
from megatron_hydra.data.document import Document
from megatron_hydra.data.synthetic_registry import TASKS, Generator
from megatron_hydra.errors import HydraError


def find_task(name: str) -> Generator:
    """Find the generator ``name``, or ``package.module:function`` of an installed package.

    It imports only this package and packages installed by a package manager, so that a config file cannot run
    an arbitrary file of the working directory.

    Raises:
        HydraError: the task does not exist.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise HydraError(
            f"data.blend: unknown synthetic task {name!r}; known: {', '.join(sorted(TASKS))}; or "
            "name a function of an installed package as package.module:function"
        )
    module_name, function = name.split(":", 1)
    package = module_name.split(".")[0]
    if package != "megatron_hydra" and package not in importlib.metadata.packages_distributions():
        raise HydraError(
            f"data.blend: task {name!r}: {package} is not an installed package; pip install it"
        )
    try:
        generator = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise HydraError(f"data.blend: task {name!r} cannot be imported: {error}") from error
    return generator


def generate(
    generator: Generator, key: int, index: int, length: int, tokenizer: Any, options: dict[str, Any]
) -> list[Document]:
    """Sample number ``index`` of a task: a pure function of its arguments.

    Args:
        generator: from :func:`find_task`.
        key: the source's seed, 64 bits.
        index: the sample's number.
        length: maximum number of tokens of all documents together.
        tokenizer: HF tokenizer or ``None``.
        options: the generator's keyword arguments, and ``document_length: [low, high]`` for every task. With
            it, the sample has several documents with lengths drawn uniformly from low … high. Without it,
            one call of the generator fills the sample.

    Raises:
        HydraError: an option is unknown, or the generator returns invalid documents.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))
    options = dict(options)
    bounds = options.pop("document_length", None)
    if bounds is None:
        return _checked(generator, rng, length, tokenizer, options)
    low, high = (int(b) for b in bounds)
    if not 1 <= low <= high:
        raise HydraError(f"document_length {bounds} must be [low, high] with 1 <= low <= high")
    documents: list[Document] = []
    room = length
    while room >= low:
        wanted = min(int(rng.integers(low, high + 1)), room)
        made = _checked(generator, rng, wanted, tokenizer, options)
        documents += made
        room -= sum(len(document) for document in made)
    return documents


def _checked(
    generator: Generator,
    rng: np.random.Generator,
    length: int,
    tokenizer: Any,
    options: dict[str, Any],
) -> list[Document]:
    name = getattr(generator, "__name__", str(generator))
    try:
        documents = generator(rng, length, tokenizer, **options)
    except TypeError as error:
        raise HydraError(f"synthetic task {name}, options {options}: {error}") from error
    total = sum(len(document) for document in documents)
    if not 0 < total <= length or any(len(document) == 0 for document in documents):
        raise HydraError(
            f"synthetic task {name} made {total} tokens where 1..{length} were asked for"
        )
    return documents
