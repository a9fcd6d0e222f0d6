"""Interoperation: files of firth in other programs."""
