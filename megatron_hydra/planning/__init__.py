"""A planner for machines one does not have: memory, FLOPs, traffic, time and cost of a stage.

The layer is written down once more in :mod:`.tape`, operator by operator, on tensors that have a shape
and a lifetime but no numbers. One run of that description says what is alive when, what is multiplied,
and what is sent, for the torch twins (the CPU path, which the tests hold against real allocations) and
for the GPU kernels.
"""
