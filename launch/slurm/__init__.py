"""Slurm: the script that is submitted, the commands that are asked, and one step of ranks inside of an allocation."""
