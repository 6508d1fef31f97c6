"""What calibration sees: running statistics in O(channels) memory, never stored activations."""
