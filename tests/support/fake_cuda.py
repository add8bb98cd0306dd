"""A GPU that computes nothing: FakeTensors of device cuda, in any build of torch.

Every op checks shapes, dtypes and devices, and what mixes devices raises. So does whatever would make the host wait for
the device (`.item()`, `nonzero`): a step that passes has no host sync. Kernels of ours are not launched.
"""

import ctypes
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmargin.ops import backends

CUDA = torch.device("cuda", 0)


def no_launch(*_, **__):
    return None


def install(monkeypatch, guard):
    """Within a test: what kernels of ours ask of a GPU is answered as by an H100, and no kernel runs."""
    ctypes.CDLL(str(guard))
    monkeypatch.setattr(backends, "NATIVE_DEVICES", ["cpu", "cuda"])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # which traces with such tensors
    monkeypatch.setattr(torch.Tensor, "is_set_to", lambda one, other: one.shape == other.shape)  # knows no such tensors
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    if find_spec("triton"):
        from triton.runtime.jit import JITFunction

        monkeypatch.setattr(JITFunction, "run", no_launch)
    return FakeTensorMode(allow_non_fake_inputs=False)


def moved(module):
    """The module with every parameter and buffer on the fake GPU; `.cuda()` would ask for a driver."""
    for part in module.modules():
        for name, held in part._parameters.items():
            if held is not None:
                part._parameters[name] = torch.nn.Parameter(like(held), requires_grad=held.requires_grad)
        for name, held in part._buffers.items():
            if held is not None:
                part._buffers[name] = like(held)
    return module


def like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def backward(loss):
    """What autograd's engine does, which does not start without a driver: each node once, after all that feed it."""
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in in_order(loss.grad_fn):
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            leaf, gradient = node.variable, given.get(0)  # none where the step was made in the backward pass
            both = sorted((t for t in (leaf.grad, gradient) if t is not None), key=lambda t: t.is_sparse)
            leaf.grad = both[0] + both[1] if len(both) == 2 else both[0] if both else None
            continue
        for gradient, (other, place) in zip(*outputs(node, given), strict=True):
            if other is None or gradient is None:
                continue
            shape, there = other._input_metadata[place].shape, gradients.setdefault(other, {})
            gradient = gradient if gradient.is_sparse else gradient.sum_to_size(shape)
            there[place] = there[place] + gradient if place in there else gradient


def in_order(root):
    """The nodes of a graph, each after every node that leads to it."""
    done, seen, waiting = [], set(), [(root, False)]
    while waiting:
        node, finished = waiting.pop()
        if finished:
            done.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(other, False) for other, _ in node.next_functions if other is not None]
    return reversed(done)


def outputs(node, given):
    """The gradients of a node's inputs, and where each goes. A Function of ours has some for what is no tensor, too."""
    ours = isinstance(node, torch.autograd.function.BackwardCFunction)
    with torch.no_grad():
        found = (node.apply if ours else node)(*[given.get(i) for i in range(len(node._input_metadata))])
    found = found if isinstance(found, tuple) else (found,)
    if not ours:
        return found, node.next_functions
    needed = [gradient for gradient, need in zip(found, node.needs_input_grad, strict=True) if need]
    return needed, [edge for edge in node.next_functions if edge[0] is not None]
