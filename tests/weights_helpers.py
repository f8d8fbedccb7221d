"""A network with weights of each kind, traced with its weights apart. Holds no tests."""

import torch

import neuron_ext


class Network(torch.nn.Module):
    """The network of the documentation, with buffers and tied weights beside."""

    def __init__(self, hidden_size=4, layers=3):
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Linear(hidden_size, hidden_size) for _ in range(layers))
        )
        self.norm = torch.nn.BatchNorm1d(hidden_size)
        self.norm.running_mean.uniform_()
        self.embed = torch.nn.Linear(hidden_size, hidden_size, bias=False)
        self.head = torch.nn.Linear(hidden_size, hidden_size, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.rand(hidden_size), persistent=False)

    def forward(self, tensor):
        return self.head(self.norm(self.layers(self.embed(tensor)))) + self.offset


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def network(like=None):
    """A fresh network; the buffer that is inlined is that of ``like``."""
    made = Network().eval()
    if like is not None:
        made.offset = like.offset
    return made


def separated(func, example, **options):
    options = {"compiler": "torchscript", **options}
    return neuron_ext.trace(func, example, inline_weights_to_neff=False, **options)


def assert_runs(module, net, x=X):
    torch.testing.assert_close(module(x), net(x))
