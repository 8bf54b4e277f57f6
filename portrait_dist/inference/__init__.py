"""Masks and cut-outs of photos, and the network in other programs' formats."""

from portrait_dist.inference.segmenter import PortraitSegmenter

__all__ = ["PortraitSegmenter"]
