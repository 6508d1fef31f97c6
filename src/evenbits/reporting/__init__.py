"""Telling: results as tables in a terminal and as pictures."""
