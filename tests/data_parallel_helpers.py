"""For the tests of `DataParallel`: a function with exact answers, and the cores of a module."""

from functools import cache

import torch

import neuron_ext


def affine(x):
    return 2 * x + 1


@cache
def traced_affine(*shape):
    return neuron_ext.trace(affine, torch.zeros(shape), compiler="torchscript")


def numbers(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def cores_of(module):
    return [status.cores for status in neuron_ext.status(module)]
