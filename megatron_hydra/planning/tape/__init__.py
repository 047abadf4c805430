"""A rank's work without numbers: one micro-batch of a stage on a tape.

The tape records bytes, FLOPs, traffic and launches.

:mod:`tensors` is the tape; :mod:`operators` to :mod:`decoder` run a layer on it; :mod:`stage` runs a pipeline
stage.
"""
