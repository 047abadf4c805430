"""What one preparation does: the options of ``data_prep/tokenize.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_hydra.data.corpus import CorpusConfig


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """One preparation.

    Attributes:
        corpus: the inputs.
        output: prefix of the files to write; a shard adds ``-00003-of-00016``.
        tokenizer: path or Hub name.
        tokenizer_revision: git revision on the Hub.
        workers: processes; 0: do the work in this process.
        append_eod: end every document with the end token.
        eod_token: which; ``None``: the tokenizer's ``eos_token``.
        add_special_tokens: as in HF's ``tokenizer(text)`` (Llama's BOS, for instance).
        keep_empty: keep documents without text as empty ones (as Megatron-LM does).
        max_tokens: stop before the document that would exceed it; 0: no limit.
        max_bad_rows: unreadable rows to skip before giving up.
        shard: (i, n): only the i-th of n contiguous parts of the corpus.
        exact: never take the fast path of the word encoder.
        trust_remote_code: run a tokenizer's own Python code.
        force: replace an existing output.
    """

    corpus: CorpusConfig
    output: str
    tokenizer: str
    tokenizer_revision: str | None = None
    workers: int = 1
    append_eod: bool = True
    eod_token: str | None = None
    add_special_tokens: bool = True
    keep_empty: bool = False
    max_tokens: int = 0
    max_bad_rows: int = 0
    shard: tuple[int, int] = (0, 1)
    exact: bool = False
    trust_remote_code: bool = False
    force: bool = False

    @property
    def prefix(self) -> str:
        """Where this run's files go."""
        index, count = self.shard
        return self.output if count == 1 else shard_prefix(self.output, index, count)

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return Path(self.prefix + ".work")


def shard_prefix(output: str, index: int, count: int) -> str:
    """Name of one shard's files."""
    return f"{output}-{index:05d}-of-{count:05d}"
