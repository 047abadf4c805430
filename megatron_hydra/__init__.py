"""megatron_hydra: head-level hybrids of full attention and Gated DeltaNet on Megatron-Core.

Importing this package needs no GPU library, and imports neither torch nor Megatron-Core.
"""

__version__ = "0.1.0"
