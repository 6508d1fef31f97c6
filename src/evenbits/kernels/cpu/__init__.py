"""The CPU backend in C: sources (csrc/), how they are built (build.py), loaded (loader.py) and called (calls.py)."""
