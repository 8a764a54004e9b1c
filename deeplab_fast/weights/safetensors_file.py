"""Writing .safetensors: the same bytes for the same tensors and facts, in every process.

The format is that of https://github.com/huggingface/safetensors: the length of a header (8 bytes,
little endian), the header (JSON), the tensors' bytes. The library's own writer gives the entries of
the header's metadata in another order in every process.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def write_safetensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: BinaryIO
) -> None:
    """Write tensors, wide ones first and then by name, as the library does.

    Args:
        tensors: dense ones on the CPU.
        metadata: of the header.
        file: open for writing bytes.

    Raises:
        ValueError: a dtype that the format does not have.
        OSError: the file cannot be written.
    """
    if strange := sorted({str(t.dtype) for t in tensors.values()} - {str(d) for d in _NAMES}):
        raise ValueError(
            f".safetensors has no tensors of {', '.join(strange)}; save as .pth, or convert them"
        )
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    begin = 0
    for name in names:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # So that the tensors lie at multiples of eight.
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        values = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        if sys.byteorder != "little":
            values = values.view(-1, tensors[name].dtype.itemsize).flip(1).reshape(-1)
        file.write(values.numpy().data)
