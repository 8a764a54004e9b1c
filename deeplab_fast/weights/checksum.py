"""Whether the tensors of a file are those that were written.

It finds damage (flipped bits, lost or exchanged blocks), not intent: whoever changes a tensor can
change the checksum too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ._common import CheckpointError

# Bytes that are summed up as 64-bit words; 160 MB take 40 ms, hashing all of them 1 s.
_ROW = 1024
_DIGEST = 16


def checksum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of tensors: "layout" of names, dtypes and shapes, "data" of their values.

    ``data = blake2b(for each name in order: the sums of its rows, the bytes behind the last row)``,
    rows being 1024 bytes of a tensor in C order, summed as 128 little-endian integers modulo 2^64.
    The same on every machine.

    Args:
        tensors: dense ones on the CPU.
    """
    layout, data = (hashlib.blake2b(digest_size=_DIGEST) for _ in range(2))
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        layout.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.contiguous().reshape(-1).view(torch.uint8)
        if values.storage_offset() % 8:
            values = values.clone()
        whole = len(values) // _ROW * _ROW
        if whole:
            sums = values[:whole].view(torch.int64).view(-1, _ROW // 8).sum(1)
            data.update(sums.numpy().data)
        data.update(values[whole:].numpy().data)
    return {"layout": layout.hexdigest(), "data": data.hexdigest()}


def check(written: object, tensors: Mapping[str, Tensor], label: str) -> None:
    """Hold tensors against what `checksum` gave when they were written.

    Where names, dtypes or shapes are others, another program wrote the file again, in half
    precision for instance, and kept what it said: nothing is held then.

    Args:
        written: the checksum in the file; None or something else where it has none.
        tensors: of the file.
        label: of the file.

    Raises:
        CheckpointError: the same names, dtypes and shapes, and other values.
    """
    if not isinstance(written, Mapping) or not tensors:
        return
    found = checksum(tensors)
    if written.get("layout") == found["layout"] and written.get("data") != found["data"]:
        raise CheckpointError(
            f"{label}: its tensors are not those that were written (their checksum is "
            f"{found['data']}, the file says {str(written.get('data'))[:64]!r}): it is damaged, "
            "download or copy it again. If you changed them on purpose, save the model with "
            "deeplab_fast.save_weights, or read them with safetensors.torch.load_file or "
            "torch.load and give that to load_weights"
        )
