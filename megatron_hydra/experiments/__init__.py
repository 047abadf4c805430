"""Declarative experiments: a grid of variants and seeds, as steps that are computed once.

``spec`` reads the YAML. ``plan`` expands cells into steps whose keys are hashes of their inputs. ``store``
keeps finished steps. ``actions`` computes one step. ``executor`` runs missing steps. ``results``, ``table`` and
``plots`` show the results. ``tiny`` has the data of the shipped scale.
"""
