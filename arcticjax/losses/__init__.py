"""The contrastive loss."""

from arcticjax.losses.infonce import tiled_infonce
from arcticjax.losses.labels import Labels, LossSums
from arcticjax.losses.reference import dense_infonce

__all__ = ["Labels", "LossSums", "dense_infonce", "tiled_infonce"]
