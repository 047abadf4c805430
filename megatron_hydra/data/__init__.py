"""Data: from text to packed and blended batches of tokens that resume exactly."""

from megatron_hydra.data.batch import PackedBatch
from megatron_hydra.data.document import Document
from megatron_hydra.data.stream import PackedStream
from megatron_hydra.data.synthetic_registry import synthetic_task

__all__ = ["Document", "PackedBatch", "PackedStream", "synthetic_task"]
