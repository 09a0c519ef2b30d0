"""A side without a model, as `sides.SideProcess` runs one: answers every command with figures that it is told.

python fake_side.py '{"dies": COMMAND, "seconds": ..., "turn": degrees that its vectors are turned, ...}'
"""

from __future__ import annotations

import json
import math
import sys

import numpy as np

WIDTH = 8


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec.get("dies") == "start":
        sys.stderr.write("no such library\n")
        sys.exit(3)
    _say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == spec.get("dies"):
            sys.stderr.write("out of luck\n")
            sys.exit(4)
        _say(answer(name, command, spec))


def _say(result: object) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def answer(name: str, command: dict[str, object], spec: dict[str, object]) -> dict[str, object]:
    seconds = float(spec.get("seconds", 1.0))  # type: ignore[arg-type]
    if name == spec.get("fails"):
        return {"failed": "there is no such kernel"}
    if name == "settings":
        return {"settings": [{"batch_size": 4}, {"batch_size": 8}, {"batch_size": 16}]}
    if name == "vectors":
        turn = math.radians(float(spec.get("turn", 0.0)))  # type: ignore[arg-type]
        rows = np.zeros((len(command["texts"]), WIDTH), np.float32)  # type: ignore[arg-type]
        rows[:, 0], rows[:, 1] = math.cos(turn), math.sin(turn)
        np.save(str(command["output"]), rows)
        return {}
    if name in ("latency", "outside"):
        return {"ms": [seconds] * 20 if name == "latency" else seconds}
    if name == "count":
        return {"tokens": 10 * len(command["texts"])}  # type: ignore[arg-type]
    if name == "rerank":
        places = range(len(command["documents"]))  # type: ignore[arg-type]
        # Of a peer, a batch of 8 suits best.
        slower = 1.0 if command.get("batch_size", 8) == 8 else 2.0
        return {"seconds": seconds * slower, "scores": [float(place) for place in places]}
    if name == "memory":
        return {"before": 10.0, "loaded": 20.0, "peak": 50.0, "passes": [30.0 + place for place in range(3)] * 3}
    if name in ("products", "reading"):
        return {"rate": 100.0}
    slower = 1.0 if command.get("batch_size", 8) == 8 else 2.0
    return {"seconds": seconds * slower}


if __name__ == "__main__":
    main()
