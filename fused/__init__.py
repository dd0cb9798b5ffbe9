"""Fused training kernels with hand-derived backward passes.

Triton on the GPU, closed forms in plain PyTorch on the CPU; drop-ins for PyTorch's own operations.
"""

from fused import backend
from fused.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm
from fused.convert import convert
from fused.cross_entropy import (
    CrossEntropyLoss,
    CrossEntropyOutput,
    cross_entropy,
    cross_entropy_with_stats,
)
from fused.linear_cross_entropy import (
    LinearCrossEntropyLoss,
    linear_cross_entropy,
    linear_cross_entropy_with_stats,
)
from fused.mlp_train import MLPParameters, train_mlp
from fused.sync_batch_norm import SyncBatchNorm
from fused.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "LinearCrossEntropyLoss",
    "MLPParameters",
    "SyncBatchNorm",
    "backend",
    "batch_norm",
    "convert",
    "cross_entropy",
    "cross_entropy_with_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_with_stats",
    "train_mlp",
    "vocab_parallel_cross_entropy",
]
__version__ = "0.1.0"
