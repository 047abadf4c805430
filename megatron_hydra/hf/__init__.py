"""HydraHead in Hugging Face format. Nothing here imports the rest of the package or Megatron.

Every export holds copies of the ``*_hydrahead.py`` files (see :mod:`megatron_hydra.hf.export_files`).
Import these modules directly to use the model without an export.
"""
