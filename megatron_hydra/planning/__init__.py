"""A planner for machines that are not at hand: memory, FLOPs, traffic, time and cost of a stage.

:mod:`.tape` describes the layer a second time, operator by operator, on tensors with a shape and a lifetime but
without numbers. One run of this description gives the live bytes at every moment, the products, and the bytes
sent. It covers the torch twins (the CPU path, which tests compare with real allocations) and the GPU kernels.
"""
