"""What the documents show, compared with what came: JSON with parts left out, and printed lines."""

from __future__ import annotations

import math
import re

# Parts of what is shown: a string, a number, a word of JSON, a part left out ("..."), or a sign.
_PART = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<left_out>\.\.\.)|(?P<number>-?\d[\d.eE+-]*)|(?P<word>true|false|null)|(?P<sign>[][{}:,]))',
    re.DOTALL,
)
_STRINGS = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}
_WORDS = {"true": True, "false": False, "null": None}
LEFT_OUT = object()
# Other at each run.
_CLOCKS = ("created", "created_at", "total_duration")
_ID = re.compile(r"^([a-z-]+-)[0-9a-f]{16}$")
# Printed numbers have a few digits; those of replies differ between machines in the sixth.
TOLERANCE = 2e-3


def parse(text: str) -> object:
    """JSON as the documents show it: `...` stands for parts that are left out, long strings go on in the next line."""
    parts = [found for found in _PART.finditer(text) if found[0].strip()]
    assert "".join(found[0].strip() for found in parts) == "".join(_outside(text)), f"This is no JSON: {text}"
    value, rest = _value(parts)
    assert not rest, f"What stands behind the JSON? {[part[0] for part in rest]}"
    return value


def _outside(text: str) -> list[str]:
    return [
        part if part.startswith('"') else re.sub(r"\s+", "", part) for part in re.split(r'("(?:[^"\\]|\\.)*")', text)
    ]


def _value(parts: list[re.Match[str]]) -> tuple[object, list[re.Match[str]]]:
    first, rest = parts[0], parts[1:]
    if first["string"]:
        joined = re.sub(r"\n\s*", " ", first["string"][1:-1])
        return re.sub(r'\\[n"\\]', lambda found: _STRINGS[found[0]], joined), rest
    if first["left_out"]:
        return LEFT_OUT, rest
    if first["number"]:
        digits = first["number"]
        return (int(digits) if re.fullmatch(r"-?\d+", digits) else float(digits)), rest
    if first["word"]:
        return _WORDS[first["word"]], rest
    if first["sign"] == "[":
        items: list[object] = []
        while rest[0]["sign"] != "]":
            item, rest = _value(rest[1:] if rest[0]["sign"] == "," else rest)
            items.append(item)
        return items, rest[1:]
    assert first["sign"] == "{", first[0]
    fields: dict[object, object] = {}
    while rest[0]["sign"] != "}":
        rest = rest[1:] if rest[0]["sign"] == "," else rest
        key, rest = _value(rest)
        if key is LEFT_OUT:
            fields[LEFT_OUT] = LEFT_OUT
        else:
            fields[key], rest = _value(rest[1:])
    return fields, rest[1:]


def compare(shown: object, got: object, *, numbers: bool, path: str = "$") -> None:
    """Assert that a reply has the fields, types, texts and whole numbers that are shown.

    numbers: whether fractions must be equal too; those of random models are not.
    """
    if shown is LEFT_OUT:
        return
    if isinstance(shown, dict):
        assert isinstance(got, dict), f"{path}: {got!r}"
        named = [key for key in shown if key is not LEFT_OUT]
        if LEFT_OUT not in shown:
            assert sorted(named) == sorted(got), f"{path}: {sorted(named)} are shown, {sorted(got)} came"
        for key in named:
            assert key in got, f"{path}: no {key!r} among {sorted(got)}"
            if key in _CLOCKS:
                assert isinstance(got[key], int), f"{path}.{key}"
            else:
                compare(shown[key], got[key], numbers=numbers, path=f"{path}.{key}")
    elif isinstance(shown, list):
        assert isinstance(got, list), f"{path}: {got!r}"
        if LEFT_OUT in shown:
            first = shown.index(LEFT_OUT)
            last = len(shown) - first - 1
            assert len(got) >= len(shown) - 1, path
            pairs = [*zip(shown[:first], got[:first], strict=True)]
            pairs += zip(shown[first + 1 :], got[len(got) - last :], strict=True)
        else:
            assert len(shown) == len(got), f"{path}: {len(shown)} are shown, {len(got)} came"
            pairs = [*zip(shown, got, strict=True)]
        for place, (one, other) in enumerate(pairs):
            compare(one, other, numbers=numbers, path=f"{path}[{place}]")
    elif isinstance(shown, float):
        assert isinstance(got, int | float), f"{path}: {got!r}"
        assert not numbers or math.isclose(shown, got, abs_tol=TOLERANCE), f"{path}: {shown} is shown, {got} came"
    elif isinstance(shown, str) and (found := _ID.match(shown)):
        assert isinstance(got, str), path
        assert got.startswith(found[1]), f"{path}: {got}"
    elif isinstance(shown, str) and shown.endswith("..."):
        assert str(got).startswith(shown[:-3]), f"{path}: {got}"
    else:
        assert shown == got, f"{path}: {shown!r} is shown, {got!r} came"


_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e-?\d+)?(?:\.\.\.)?")


def printed(shown: str, got: str) -> bool:
    """Whether a line was printed as shown, but for the last digits of numbers and for white space."""
    if re.sub(r"\s+", "", _NUMBER.sub("#", shown)) != re.sub(r"\s+", "", _NUMBER.sub("#", got)):
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(got), strict=True)
    return all(math.isclose(float(one.removesuffix("...")), float(other), abs_tol=TOLERANCE) for one, other in pairs)
