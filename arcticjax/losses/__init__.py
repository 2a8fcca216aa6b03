"""The contrastive loss, and losses that follow a teacher."""

from arcticjax.losses.candidates import candidate_infonce
from arcticjax.losses.distillation import kl_divergence, margin_mse
from arcticjax.losses.infonce import tiled_infonce
from arcticjax.losses.labels import Contrast, DistillationSums, Guide, Labels, LossSums
from arcticjax.losses.reference import dense_infonce

__all__ = [
    "Contrast",
    "DistillationSums",
    "Guide",
    "Labels",
    "LossSums",
    "candidate_infonce",
    "dense_infonce",
    "kl_divergence",
    "margin_mse",
    "tiled_infonce",
]
