"""firth: raw text to a language model that is pretrained, adapted, aligned and evaluated."""

from firth import openmp as openmp  # first of all: it sets what OpenMP reads when torch is loaded

__version__ = "0.1.0"
