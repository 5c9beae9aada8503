"""EVOLVE: iterative self-refinement preference training, as a sweepable graph of stages."""

__version__ = "0.1.0"
