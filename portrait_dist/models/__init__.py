"""Networks: the U-Net, and any other by name."""

from portrait_dist.models.contract import Contract, MaskNetwork, check
from portrait_dist.models.registry import build
from portrait_dist.models.unet import UNet

__all__ = ["Contract", "MaskNetwork", "UNet", "build", "check"]
