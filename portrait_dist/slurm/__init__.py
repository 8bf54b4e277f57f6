"""Training jobs on SLURM."""
