"""Knowing the model: who feeds whom (trace), what belongs together (regions), what may be folded (folding)."""
