"""HydraHead in Hugging Face format. Nothing here imports the rest of the package or Megatron.

Its ``*_hydrahead.py`` are copied into every export (see :mod:`megatron_hydra.hf.export_files`); import
them by module to use the model without an export.
"""
