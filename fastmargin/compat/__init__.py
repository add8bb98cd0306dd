"""Loads class weights that other libraries have trained into a MarginHead."""

from fastmargin.compat import insightface, pml

__all__ = ["insightface", "pml"]
