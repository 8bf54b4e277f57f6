"""``python -m portrait_dist``, also as ``torchrun … -m portrait_dist train …``."""

from portrait_dist.cli import main

if __name__ == "__main__":
    main()
