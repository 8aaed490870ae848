"""Reading the transaction log that W&B writes: what it holds after a kill is what counts as written.

Records lie in blocks of 32 KiB, as in LevelDB's log, after a header of seven bytes; each is a protobuf message of the installed wandb.
https://github.com/wandb/wandb/blob/main/core/internal/transactionlog
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.tracking.files import Written

_MAGIC = b":W&B"
_FILE_HEADER = 7
_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")
"""Checksum, length of the fragment, kind of the fragment."""
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
FACTS = "facts"
"""Key of the summary under which the hash of the final facts stands."""


def read_payloads(data: bytes) -> Iterator[bytes]:
    """The complete records of a log; the last one may be torn and is left out."""
    if not data.startswith(_MAGIC):
        return
    position, parts = _FILE_HEADER, b""
    while True:
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:  # a block's end that is too short for a header is filled with zeros
            position += left
        if position + _HEADER.size > len(data):
            return
        _, length, kind = _HEADER.unpack_from(data, position)
        start, position = position + _HEADER.size, position + _HEADER.size + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or position > len(data):
            return
        parts = data[start:position] if kind in (_FULL, _FIRST) else parts + data[start:position]
        if kind in (_FULL, _LAST):
            yield parts


def read_records(path: Path) -> Iterator[Any]:
    """The records of a log as messages of ``wandb.proto``."""
    from wandb.proto import wandb_internal_pb2

    for payload in read_payloads(Path(path).read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # its module fills itself when it is loaded
        record.ParseFromString(payload)
        yield record


def written_in(logs: Sequence[Path]) -> Written:
    """How much of a run its logs hold. Final facts count once the run was closed after them."""
    last_step, facts, found = -1, "", ""
    for path in logs:
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                last_step = max(last_step, record.history.step.num)
            elif kind == "summary":
                values = [json.loads(item.value_json) for item in record.summary.update if _key(item) == FACTS]
                found = values[-1] if values else found
            elif kind == "exit":
                facts = found
    return Written(last_step=last_step, facts=facts)


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)
