"""States that are compared to the last bit"""
import torch


def same_bits(a, b, name='state'):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for k in a:
            same_bits(a[k], b[k], f'{name}[{k!r}]')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (v, w) in enumerate(zip(a, b)):
            same_bits(v, w, f'{name}[{i}]')
    else:
        assert a == b, (name, a, b)
