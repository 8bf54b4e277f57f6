"""``python -m portrait_dist.slurm job …`` and ``… node …``: the inside of a SLURM job."""

import sys

from portrait_dist.slurm.job import main

sys.exit(main(sys.argv[1:]))
