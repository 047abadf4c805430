"""Declarative experiments: a grid of variants and seeds, as steps that are computed once.

``spec`` reads the YAML; ``plan`` turns cells into steps whose keys are hashes of their inputs;
``store`` keeps finished steps; ``actions`` does one step; ``executor`` runs what is missing;
``results``, ``table`` and ``plots`` show what came out. ``tiny`` holds the data of the shipped scale.
"""
