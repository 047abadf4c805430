"""The options of an evaluation: of ``tools/evaluate.py``, and of ``evaluation`` in an experiment."""

from __future__ import annotations

import dataclasses

from megatron_hydra.arguments import path_text
from megatron_hydra.errors import HydraError
from megatron_hydra.options import option


def listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def depths_argument(text: str) -> tuple[float, ...]:
    """Parse depths: ``5`` means five depths from start to end; ``0,0.5,1`` lists them."""
    try:
        if "," not in text and text.isdecimal() and int(text) >= 2:
            return tuple(i / (int(text) - 1) for i in range(int(text)))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise HydraError(f"--depths: {text!r} is neither a number nor a list of 0 … 1") from None


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation, apart from model, tasks, lengths and seed.

    Attributes:
        depths: where facts are placed, 0 … 1; rows of the heatmap.
        samples: samples of each (task, length, depth), or of each (task, length) without depths.
        batch_tokens: tokens of a batch, at most (one sample at least).
        prefill_chunk: prompt tokens per forward pass; 0: all; ``None``: 8192 for models for which this
            is known to be exact, else all.
        haystack: distractor text for tasks that hide facts in text, or ``""``. In commands and experiments
            it is the path of a file with one paragraph per line.
        cache_length: length of the prompt for measuring the cache's bytes, in tokens; 0: do not measure.
            A back end without a cache measures nothing.
        lm_eval: tasks of lm-evaluation-harness, for a Hugging Face model (needs the extra ``eval``).
        lm_eval_include: a folder with the user's own lm-eval tasks (YAML), or ``""``.
        lm_eval_limit: number of questions of each lm-eval task, from the first; 0: all.
    """

    depths: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "number of depths from start to end, or a list such as 0,0.5,1 (default: 5)",
        in_one=depths_argument,
    )
    samples: int = option(10, "samples per task, length and depth (%(default)s)")
    batch_tokens: int = option(32768, "largest number of tokens in a batch (%(default)s)")
    prefill_chunk: int | None = option(
        None,
        "prompt tokens per forward pass; 0: all (default: 8192 for models where this is exact)",
    )
    haystack: str = option(
        "",
        "file with your own distractor text, one paragraph per line",
        parse=path_text,
        metavar="FILE",
    )
    cache_length: int = option(512, "prompt length for measuring the cache; 0: skip (%(default)s)")
    lm_eval: tuple[str, ...] = option(
        (), "tasks of lm-evaluation-harness, for example arc_easy", in_one=listed, metavar="TASKS"
    )
    lm_eval_include: str = option(
        "", "folder with your own lm-eval tasks", parse=path_text, metavar="DIR"
    )
    lm_eval_limit: int = option(
        0, "use only the first N questions of each lm-eval task (%(default)s: all)", metavar="N"
    )

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_tokens < 1:
            raise HydraError("--samples and --batch-tokens must be 1 or more")
        if self.lm_eval_limit < 0:
            raise HydraError("--lm-eval-limit must be 0 (all questions) or more")
        if not self.depths or any(not 0 <= d <= 1 for d in self.depths):
            raise HydraError(f"--depths {list(self.depths)} must be numbers in 0..1, at least one")
