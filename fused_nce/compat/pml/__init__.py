"""pytorch-metric-learning's pair losses and wrappers (pytorch_metric_learning.losses, 2.9).

Rows of one label are each other's positives, and no list of pairs is made. What the kernels cannot honour (another
distance or reducer, a regularizer, a miner, `indices_tuple`) goes to the package itself where it is installed, with a
line in the log; where it is not, it raises.
"""

from fused_nce.compat.pml.base import OPTIONS
from fused_nce.compat.pml.losses import NTXentLoss, SupConLoss
from fused_nce.compat.pml.margins import ContrastiveLoss, TripletMarginLoss
from fused_nce.compat.pml.wrappers import CrossBatchMemory, DistributedLossWrapper, SelfSupervisedLoss

__all__ = [
    "OPTIONS",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "DistributedLossWrapper",
    "NTXentLoss",
    "SelfSupervisedLoss",
    "SupConLoss",
    "TripletMarginLoss",
]
