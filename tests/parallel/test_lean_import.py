"""megatron-core comes without inductor, wandb and TensorBoard, and leaves torch and later imports as they were."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys, torch, warnings
compile = torch.compile
warnings.simplefilter("error", UserWarning)
from parallel.engines.megatron import MegatronEngine
from parallel.lean_import import import_megatron_core
left_out = [name for name in ("torch._inductor", "torch._dynamo", "wandb", "tensorboard") if name in sys.modules]
assert not left_out, left_out
assert torch.compile is compile
modules = len(sys.modules)
import_megatron_core()
assert len(sys.modules) == modules
import tensorboard, wandb
print(wandb.__name__, tensorboard.__name__)
"""


def test_what_is_left_out_can_be_imported_later() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "wandb tensorboard\n", done.stderr
