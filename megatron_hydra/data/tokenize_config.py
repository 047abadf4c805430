"""The options of a preparation (``data_prep/tokenize.py``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_hydra.arguments import whole
from megatron_hydra.data.corpus import CorpusConfig
from megatron_hydra.options import option


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """One preparation.

    Attributes:
        corpus: the inputs.
        output: prefix of the output files; a shard adds ``-00003-of-00016``.
        tokenizer: path or Hub name.
        tokenizer_revision: git revision on the Hub.
        workers: number of processes; 0: do the work in this process.
        append_eod: append the end token to every document.
        eod_token: the end token; ``None``: the tokenizer's ``eos_token``.
        add_special_tokens: add special tokens as HF's ``tokenizer(text)`` (for example Llama's BOS).
        keep_empty: keep rows without text as empty documents (as Megatron-LM does).
        max_tokens: stop before the document that would exceed it; 0: no limit.
        max_bad_rows: number of unreadable rows to skip; one more is an error.
        shard: (i, n): only the i-th of n contiguous parts of the corpus.
        exact: never use the fast path of the word encoder.
        trust_remote_code: run a tokenizer's own Python code.
        force: replace an existing output.
    """

    corpus: CorpusConfig
    output: str
    tokenizer: str
    tokenizer_revision: str | None = option(
        None, "branch, tag or commit of a Hub tokenizer", metavar="COMMIT", group="tokens"
    )
    workers: int = option(
        1, "number of processes (default: 1)", parse=whole(0), metavar="N", group="run"
    )
    append_eod: bool = option(
        True, "do not append an end token to documents", flag="--no-eod", group="tokens"
    )
    eod_token: str | None = option(
        None, "end token (default: the tokenizer's eos_token)", metavar="TOKEN", group="tokens"
    )
    add_special_tokens: bool = option(
        True, "do not add special tokens such as BOS", flag="--no-special-tokens", group="tokens"
    )
    keep_empty: bool = option(False, "keep rows without text as empty documents", group="rows")
    max_tokens: int = option(
        0,
        "stop each shard after this many tokens, e.g. 5e9",
        parse=whole(0),
        metavar="N",
        group="tokens",
    )
    max_bad_rows: int = option(
        0, "skip up to this many unreadable rows", parse=whole(0), metavar="N", group="rows"
    )
    shard: tuple[int, int] = (0, 1)
    exact: bool = option(False, "never use the fast path (slower)", group="tokens")
    trust_remote_code: bool = option(False, "run the tokenizer's own Python code", group="tokens")
    force: bool = option(False, "replace an existing output", group="run")

    @property
    def prefix(self) -> str:
        """Prefix of this run's output files."""
        index, count = self.shard
        return self.output if count == 1 else shard_prefix(self.output, index, count)

    @property
    def work(self) -> Path:
        """The folder of unfinished work."""
        return Path(self.prefix + ".work")


def shard_prefix(output: str, index: int, count: int) -> str:
    """Name of one shard's files."""
    return f"{output}-{index:05d}-of-{count:05d}"
