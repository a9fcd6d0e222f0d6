"""firth: pretrain, adapt, align and evaluate language models."""

from firth import openmp as openmp  # first import: sets the variables that OpenMP reads when torch is loaded

__version__ = "0.1.0"
