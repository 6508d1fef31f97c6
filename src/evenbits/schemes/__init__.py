"""What to quantize to: `Scheme`, its presets, and reading one from a file."""
