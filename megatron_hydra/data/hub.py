"""Data sets of the Hugging Face Hub as inputs: look up their commit and load them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.errors import HydraError


def pin_revisions(corpus: CorpusConfig, report: Callable[[str], None]) -> CorpusConfig:
    """Look up the current commit of every data set's revision.

    This commit is then read, recorded and resumed, even if the data set changes during a preparation or
    between the tasks of a job array. Folders have no commit. If the Hub cannot be reached (offline), the
    given revision is kept, and a message reports this.
    """
    if not corpus.hub:
        return corpus
    commits = tuple(_commit(name, corpus.revision, report) for name in corpus.inputs)
    return dataclasses.replace(corpus, commits=commits)


def _commit(name: str, revision: str | None, report: Callable[[str], None]) -> str | None:
    if os.path.exists(name):
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=30).sha
    # Offline, a mirror without this call, or a wrong name: loading raises the error.
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        report(f"{name}: its commit is not known ({reason}); recorded as revision {revision}")
        return revision


@functools.lru_cache(maxsize=16)
def load_hub(corpus: CorpusConfig, name: str, streaming: bool) -> Any:
    """One data set, by ``datasets.load_dataset``; once per process.

    Raises:
        HydraError: the data set cannot be loaded.
    """
    import datasets

    commits = dict(zip(corpus.inputs, corpus.commits, strict=False))
    try:
        return datasets.load_dataset(
            name,
            corpus.config_name,
            split=corpus.split,
            revision=commits.get(name, corpus.revision),
            streaming=streaming,
        )
    except Exception as error:  # datasets raises many types; the user needs the name
        raise HydraError(f"--dataset {name}: cannot load it: {error}") from error
