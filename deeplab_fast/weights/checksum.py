"""Whether the tensors of a file are those that were written.

It finds damage (flipped bits, lost or exchanged blocks), not intent: whoever changes a tensor can
change the checksum too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ._common import CheckpointError, one_line

# Bytes that are summed up as 64-bit words: 160 MB take 15 ms, hashing them 1 s. What is
# shorter than _HASHED is hashed as it is.
_ROW, _HASHED = 1 << 16, 1 << 12
_DIGEST = 16


def checksum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of tensors: "layout" of names, dtypes and shapes, "data" of their values.

    ``data = blake2b(for each name in order: the sums of its rows, the bytes behind them)``, rows
    being 65536 bytes of a tensor in C order (a last one what is left, in whole words, where that is
    4096 bytes or more), summed as little-endian 64-bit integers modulo 2^64.
    The same on every machine.

    Args:
        tensors: dense ones on the CPU.
    """
    layout, data = (hashlib.blake2b(digest_size=_DIGEST) for _ in range(2))
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        layout.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        whole = len(values) // _ROW * _ROW
        last = (len(values) - whole) // 8 * 8 if len(values) - whole >= _HASHED else 0
        for begin, end, length in ((0, whole, _ROW), (whole, whole + last, last)):
            if begin < end:
                words = values[begin:end].view("<i8").reshape(-1, length // 8)
                data.update(words.sum(1, dtype="<i8").data)
        data.update(values[whole + last :].data)
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
            f"{label}: its tensors are not those that its checksum is of (they have "
            f"{found['data']}, the file says {one_line(repr(written.get('data')))}). Either the "
            "file is damaged: download or copy it again. Or a program changed the values, in "
            "training or by averaging, and kept the header: if you trust it, read them with "
            "safetensors.torch.load_file or torch.load, give that to load_weights, and save the "
            "model with deeplab_fast.save_weights"
        )
