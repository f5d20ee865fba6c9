"""What the tests of tuning share: every tunable, and small cases."""

import pytest
import torch

from sgtm_kernels.attention import kernel as attention_kernel
from sgtm_kernels.cross_entropy import kernel as cross_entropy_kernel
from sgtm_kernels.linear import kernel as linear_kernel
from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.mlp import kernel as mlp_kernel
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.tools.shapes import NONE, Shape

TUNABLES = {
    t.name: t
    for t in (
        *attention_kernel.TILES.values(), *mlp_kernel.TILES.values(), cross_entropy_kernel.TILE, scaling.TILE,
        linear_kernel.DW_ALGORITHM, rectangles.TILE,
    )
}  # fmt: skip
SHAPE, LONG = Shape(2, 40, 16, 2, 2, 40, 97, 1, 8), Shape(2, 384, 16, 2, 2, 40, 97, 1, 8)
PLAN = MaskPlan.uniform(NONE, 0, 2, 5)
BOUNDS = (0, 24, 40)
SMALL = mlp_kernel.Tile(4, 8, 2)

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU")
