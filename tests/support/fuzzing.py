"""Malformed files: valid ones, changed at random in their bytes or in what they say; and the bounds within which they
must be taken or refused.

The changes are drawn from a seed, so that a failing input can be made again: `mutants(valid, seed)`.
"""

import copy
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ekgfx.errors import EkgfxError

SECONDS = 20
"""Longest that one input may take: a hang, not a slow machine."""
MEMORY = 3 * 2**30
"""Most address space that one input may add."""
LONGEST = 1000
"""Most characters of an error."""
ODD: list[Any] = [
    None,
    True,
    "",
    0,
    -1,
    1,
    2**31,
    -(2**63),
    10**30,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    -1e308,
    [],
    {},
    [[]],
    [None],
    {"": None},
    "../../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "a" * 5000,
    "%s%n{0}",
    "timm:",
    "os:getpid",
    [0] * 300,
    list(range(64)),
]


def of_bytes(valid: bytes, draw: random.Random) -> bytes:
    """One to four of: bits flipped, bytes overwritten, cut out, put in, repeated, the end cut off."""
    data = bytearray(valid)
    for _ in range(draw.randint(1, 4)):
        size = len(data)
        # the beginning of a file holds what describes the rest
        at = draw.randrange(max(size, 1)) if draw.random() < 0.5 else draw.randrange(min(max(size, 1), 256))
        length = draw.choice([1, 2, 4, 8, 64, 1024])
        kind = draw.randrange(6)
        if kind == 0 and size:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = (
                draw.randbytes(min(length, 8)) if length <= 8 else bytes([draw.choice([0, 255])]) * length
            )
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = draw.randbytes(length)
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw.randint(1, 3)
        else:
            del data[at:]
    return bytes(data)


def of_values(valid: Any, draw: random.Random) -> Any:
    """The same JSON value with one to three of its parts replaced, removed, doubled, renamed or nested."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw.randint(1, 3)):
        holders = list(_holders(value))
        if not holders:
            return copy.deepcopy(draw.choice(ODD))
        holder = draw.choice(holders)
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = draw.randrange(6)
        if kind <= 2:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[draw.choice([f"{key}x", "", "format", "version"])] = holder.pop(key)
        elif kind == 4:
            holder.append(holder[key])
        else:
            other = draw.choice(holders)
            part = draw.choice(list(other.values()) if isinstance(other, dict) else other) if other else None
            holder[key] = json.loads(json.dumps(part))
    return value


def _holders(value: Any) -> Iterator[Any]:
    """Every dictionary and list in a JSON value that holds anything."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


def of_json(valid: bytes, draw: random.Random) -> bytes:
    """JSON, or lines of it, changed in its values; one time in four in its bytes."""
    if draw.random() < 0.25:
        return of_bytes(valid, draw)
    lines = [json.loads(line) for line in valid.splitlines()] if valid.count(b"\n{") else [json.loads(valid)]
    if len(lines) > 1 and draw.random() < 0.2:
        draw.shuffle(lines)
    number = draw.randrange(len(lines))
    lines[number] = of_values(lines[number], draw)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def mutants(valid: bytes, count: int, seed: int, change: Callable[[bytes, random.Random], bytes]) -> Iterator[bytes]:
    """`count` changed forms of a valid file."""
    for number in range(count):
        yield change(valid, random.Random(seed * 1_000_003 + number))


@contextmanager
def bounded() -> Iterator[None]:
    """Stops what takes too long, and what asks for too much memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(use: Callable[[], object]) -> bool:
    """Whether it was refused; anything but an EkgfxError in one line passes through, and fails the test."""
    try:
        use()
    except EkgfxError as error:
        said = str(error)
    else:
        return False
    assert said.strip(), "the error says nothing"
    assert len(said) < LONGEST, f"an error nobody can read: {said}"
    return True
