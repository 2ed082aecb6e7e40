"""What machines there are: this host, and Slurm's nodes; for ``cluster=auto``, the doctor and the interview."""
