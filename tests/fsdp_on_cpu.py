"""
Run a script with FSDP2 on CPU processes, which PyTorch supports and Accelerate does not.

    torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py scripts/run_image_classification.py ... --use_cpu true --fsdp true
"""

import runpy
import sys

import torch.distributed.fsdp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tnt_hf.training import TntTrainer


def pretend_to_have_gpus(self, *arguments, initialize=PartialState.__init__, **kwargs):
    initialize(self, *arguments, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def shard_on_cpu(module, mesh=None, **kwargs):
    return fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)), **kwargs)


def check_that_all_is_sharded(self, run_epoch=TntTrainer._run_epoch, **kwargs):
    assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
    run_epoch(self, **kwargs)


fully_shard = torch.distributed.fsdp.fully_shard
torch.distributed.fsdp.fully_shard = shard_on_cpu
PartialState.__init__ = pretend_to_have_gpus
TntTrainer._run_epoch = check_that_all_is_sharded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
