"""Batch normalization over the processes of a CPU, which torch has for GPUs only: with it, N
processes equal one. Tests put `parallel` in the place of common.parallel."""

import torch
from torch import nn

import common


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training or self.momentum is None:  # calibrated on images that all have
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * common.world_size()  # of all processes
        mean = common.all_sum(x.sum(dims, keepdim=True)) / count
        x = x - mean
        var = common.all_sum(x.square().sum(dims, keepdim=True)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        x = x * (var + self.eps).rsqrt()
        if not self.affine:
            return x
        return x * self.weight.view_as(mean) + self.bias.view_as(mean)


def convert(model):
    """Like torch's convert_sync_batchnorm, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and common.world_size() > 1:
            module.__class__ = SyncBatchNorm


def parallel(model, compile=False, sync_bn=True, wrap=common.parallel):
    if sync_bn:
        convert(model)
    return wrap(model, compile, sync_bn)
