"""Head selection (design §4): from a dense Hugging Face model to a head map.

from megatron_hydra.selection import select_heads
select_heads("path/to/hf_model", ratio="3:1", tasks=["induction"]).save("map.json")
"""

from megatron_hydra.config.selection import Constraints, SelectionOptions
from megatron_hydra.selection.capabilities import (
    DEFAULT_TASKS,
    Capability,
    JsonlCapability,
    register_capability,
)
from megatron_hydra.selection.curve import knockout_curve
from megatron_hydra.selection.opening import Placement
from megatron_hydra.selection.prompts import PromptPair
from megatron_hydra.selection.select import recut, select_heads
from megatron_hydra.selection.strategies import STRATEGIES

__all__ = [
    "DEFAULT_TASKS",
    "STRATEGIES",
    "Capability",
    "Constraints",
    "JsonlCapability",
    "Placement",
    "PromptPair",
    "SelectionOptions",
    "knockout_curve",
    "recut",
    "register_capability",
    "select_heads",
]
