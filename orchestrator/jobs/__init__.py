"""Runs as jobs of Slurm's: submitting, following, and what happens inside of an allocation."""
