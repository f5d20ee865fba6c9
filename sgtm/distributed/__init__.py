"""The only package that depends on DeepSpeed: engine, segments of its partitions, its files, its launchers."""

import torch

from sgtm.distributed.env import set_defaults

set_defaults(cuda=torch.cuda.is_available())  # DeepSpeed reads the environment when a module of this folder imports it
