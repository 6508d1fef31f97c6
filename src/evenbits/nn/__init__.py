"""Modules that carry integer buffers and nothing else: what a quantized layer is at run time."""
