"""Changes of files: of their bytes, and of the values in JSON texts."""

import copy
import json
from typing import Any

import numpy as np

_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES = (
    None, True, False, 0, 1, -1, 2, 255, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "x", "0", "None", "<image>", "../x", "/etc/passwd", "data:image/png;base64,AAAA", "\ud83d",
    "a\nb", "\0", "x" * 5000, [], {}, [None], [[]], [0, -1], {"": None}, {"a": {"b": []}}, [[[[[[1]]]]]],
)  # fmt: skip


def mutate(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """One to six changes: bytes, numbers, lengths, pieces lost, doubled, moved or of another file, an end cut off."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 7)):
        if not data:
            break
        # Headers are where a change tells most.
        end = len(data) if generator.random() < 0.5 else min(len(data), 600)
        place, length = int(generator.integers(end)), int(generator.integers(1, 64))
        match generator.integers(8):
            case 0 | 1:
                data[place] = generator.integers(256)
            case 2:
                data[place] ^= 1 << generator.integers(8)
            case 3:
                number = int(generator.choice(_INTERESTING))
                size = int(generator.choice([1, 2, 4]))
                order = "little" if generator.random() < 0.5 else "big"
                data[place : place + size] = (number & (1 << 8 * size) - 1).to_bytes(size, order)
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = data[place : place + length] * int(generator.integers(1, 20))
            case 6:
                start = int(generator.integers(len(other)))
                data[place:place] = other[start : start + length]
            case 7 if generator.random() < 0.3:
                del data[place:]
    return bytes(data)


def mutate_json(content: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """One to four values of a JSON text replaced, lost, doubled, renamed or exchanged; now and then bytes instead."""
    if generator.random() < 0.2:
        return mutate(content, other, generator)
    holder = [json.loads(content)]
    for _ in range(generator.integers(1, 5)):
        parent, key = _place(holder, generator)
        value = parent[key]
        match generator.integers(6):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(_VALUES[generator.integers(len(_VALUES))])
            case 3:
                parent[key] = _near(value, generator)
            case 4 if parent is not holder:
                del parent[key]
            case 5 if isinstance(parent, dict):
                parent[str(_VALUES[generator.integers(len(_VALUES))])] = parent.pop(key)
            case _:
                elsewhere, other_key = _place(holder, generator)
                parent[key] = json.loads(json.dumps(elsewhere[other_key]))
    return json.dumps(holder[0], ensure_ascii=bool(generator.random() < 0.9)).encode("utf-8", "surrogatepass")


def _place(holder: list, generator: np.random.Generator) -> tuple[Any, Any]:
    """(container, key or index) of a value anywhere in `holder[0]`, which may be that itself."""
    parent: Any = holder
    key: Any = 0
    while isinstance(parent[key], (dict, list)) and parent[key] and (generator.random() < 0.85 or parent is holder):
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = keys[generator.integers(len(keys))]
    return parent, key


def _near(value: Any, generator: np.random.Generator) -> Any:
    """Something of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, -value, value * 1000, value // 2, 0, str(value)][generator.integers(7)]
    if isinstance(value, str):
        return [value * 2, value[:-1], value + " ", value.upper(), [value], {value: value}, value[::-1]][
            generator.integers(7)
        ]
    return [value, value] if isinstance(value, list) else [value]
