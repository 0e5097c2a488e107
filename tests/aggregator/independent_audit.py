"""An auditor of an exported ledger, written from the specifications alone: it shares no code with the product.

RFC 8785 (canonical JSON), RFC 8032 section 6 (Ed25519), RFC 6962 section 2.1 (Merkle tree), C2SP signed-note,
tlog-checkpoint and tlog-cosignature. Slow and short on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    """Add two points of the curve -x^2 + y^2 = 1 + d x^2 y^2."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + t, P - 2, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, P - 2, P) % P


def times(scalar: int, point: Point) -> Point:
    total: Point = (0, 1)
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point, scalar = add(point, point), scalar >> 1
    return total


def decode(data: bytes) -> Point:
    """Read a point: y, and the lowest bit of x in the highest bit."""
    number = int.from_bytes(data, "little")
    y, odd = number & (2**255 - 1), number >> 255
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square, "not on the curve"
    return (P - x if x % 2 != odd else x), y


BASE = decode((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))


def signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether s B = R + h A."""
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    h = int.from_bytes(hashlib.sha512(r + key + message).digest(), "little") % ORDER
    return s < ORDER and times(s, BASE) == add(decode(r), times(h, decode(key)))


def written(value: Any) -> str:
    """Canonical JSON: names sorted by UTF-16, numbers as ECMAScript writes them."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{written(name)}:{written(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, float):
        return ecmascript(value)
    return json.dumps(value, ensure_ascii=False)


def ecmascript(value: float) -> str:
    """Write a number as ECMA-262 section 6.1.6.1.20: shortest digits k, exponent n."""
    if value == 0:
        return "0"
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    n = int(exponent or 0) + (len(whole) if whole.strip("0") else len(digits) - len(fraction))
    digits = digits.rstrip("0")
    sign, k = "-" if value < 0 else "", len(digits)
    if k <= n <= 21:
        return sign + digits + "0" * (n - k)
    if 0 < n <= 21:
        return f"{sign}{digits[:n]}.{digits[n:]}"
    if -6 < n <= 0:
        return f"{sign}0.{'0' * -n}{digits}"
    scale = f"e{'+' if n > 0 else '-'}{abs(n - 1)}"
    return sign + digits[0] + (f".{digits[1:]}" if k > 1 else "") + scale


def root(leaves: list[bytes]) -> bytes:
    """MTH: split at the largest power of two below the number of leaves."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + root(leaves[:split]) + root(leaves[split:])).digest()


def audit(exported: bytes, log_key: bytes, witness_keys: dict[str, bytes]) -> dict[str, Any]:
    """Check every line of an export and its checkpoint; returns size, root and who rightly cosigned."""
    *lines, last = exported.splitlines()
    for index, line in enumerate(lines):
        entry = json.loads(line)
        assert written(entry).encode() == line, f"entry {index} is not canonical"
        assert entry["index"] == index, f"entry {index} is out of order"
        signature = bytes.fromhex(entry.pop("signature"))
        assert signed(log_key, written(entry).encode(), signature), f"entry {index} is not signed"
    text, _, signatures = json.loads(last)["checkpoint"].rpartition("\n\n")
    origin, size, encoded = text.split("\n")
    assert (int(size), base64.b64decode(encoded)) == (len(lines), root(lines)), "the checkpoint is of another log"
    body, witnessed = (text + "\n").encode(), []
    for line in signatures.splitlines():
        name, blob = line.removeprefix("— ").split(" ")
        data = base64.b64decode(blob)
        key, kind = (log_key, b"\x01") if name == origin else (witness_keys[name], b"\x04")
        assert data[:4] == hashlib.sha256(name.encode() + b"\n" + kind + key).digest()[:4], f"{name} has another key"
        when = b"" if name == origin else b"cosignature/v1\ntime %d\n" % int.from_bytes(data[4:12], "big")
        assert signed(key, when + body, data[4 if name == origin else 12 :]), f"the signature of {name} is wrong"
        witnessed += [name] if name != origin else []
    return {"size": len(lines), "root": root(lines).hex(), "witnesses": witnessed}
