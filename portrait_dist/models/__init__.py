"""Networks."""

from portrait_dist.models.unet import UNet

__all__ = ["UNet"]
