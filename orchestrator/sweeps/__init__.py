"""Sweeps: many runs of one job with some of its words changed, planned together, run, compared, and gone on with."""
