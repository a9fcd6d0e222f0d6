"""firth: raw text to a language model that is pretrained, adapted, aligned and evaluated."""

__version__ = "0.1.0"
