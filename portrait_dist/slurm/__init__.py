"""Jobs on SLURM.

``submit`` queues ``launch/slurm.sbatch``. That ends in ``python -m portrait_dist.slurm job
ARGUMENTS…`` on the first node (job), which starts ``… node …`` once per node with srun (node). That
is torchrun and starts the ranks with ``portrait-dist train ARGUMENTS…``, which reject launches that
do not match the allocation (launch_checks).

Other steps are planned by steps; their jobs run the command as it is (step_job).
"""
