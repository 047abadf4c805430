"""Data sets of the Hugging Face Hub as inputs: which commit, which units."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.errors import HydraError


def pin_revisions(corpus: CorpusConfig, report: Callable[[str], None]) -> CorpusConfig:
    """Look up which commit the revision of every data set stands for now.

    What is read, recorded and resumed is then that commit, even if the data set moves on while a
    preparation runs or between the tasks of a job array. Folders have no commit; where the Hub
    cannot be asked (offline), the revision stays as it was given, and that is reported.
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
    except Exception as error:  # offline, a mirror without this call, a wrong name: loading decides
        reason = str(error).split("\n", 1)[0]
        report(f"{name}: its commit is not known ({reason}); recorded as revision {revision}")
        return revision


@functools.lru_cache(maxsize=16)
def load_hub(corpus: CorpusConfig, name: str, streaming: bool) -> Any:
    """One data set, by ``datasets.load_dataset``; once per process.

    Raises:
        HydraError: it cannot be loaded.
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
    except Exception as error:  # datasets raises many types; the reader needs the name
        raise HydraError(f"--dataset {name}: cannot load it: {error}") from error
