"""Doing it: plan → calibrate → balance → solve → swap."""
