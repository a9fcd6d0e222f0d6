"""firth: raw text to a language model that is pretrained, adapted, aligned, evaluated and served."""

__version__ = "0.1.0"
