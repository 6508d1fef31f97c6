"""The GPU backend, in Triton: compiled when a kernel is first called, never at install. Imported by nobody on a CPU.

loader.py says whether it can run, ptx.py and tables.py how four bits become numbers, rows.py, gemm.py, pair.py are the
kernels, epilogue.py what they share, calls.py launches them.
"""
