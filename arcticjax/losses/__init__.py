"""The contrastive loss."""

from arcticjax.losses.infonce import tiled_infonce
from arcticjax.losses.labels import Contrast, Guide, Labels, LossSums
from arcticjax.losses.reference import dense_infonce

__all__ = ["Contrast", "Guide", "Labels", "LossSums", "dense_infonce", "tiled_infonce"]
