"""The measurements of a run in a file that it appends to, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_instant.tools.bench.plan import BadInputError
from vllm_instant.tools.measure.interleaved_rounds import ArmRound

Place = tuple[int, int]
"""Round number and concurrency."""


class BenchCheckpoint:
    """The file and its contents.

    Args:
        path: of the file; it need not exist.
        setup: of the measurement, as JSON types; a file of another setup is refused.
        arms: the names of the arms.

    Raises:
        BadInputError: when the file belongs to another setup.

    """

    def __init__(self, path: Path, setup: dict[str, Any], arms: Sequence[str]) -> None:
        self.path = path
        self.arms = list(arms)
        self.arm_rounds: dict[Place, dict[str, ArmRound]] = {}
        """Complete rounds only."""
        self.served: dict[str, dict[str, Any]] = {}
        self.quality: dict[str, Any] | None = None
        self.attempt = 0
        self.salt = secrets.token_hex(4)
        lines = _records(path)
        if lines:
            self._check(lines[0]["setup"], json.loads(json.dumps(setup)))
            self.salt = lines[0]["salt"]
            self._read(lines[1:])
            self.attempt += 1
            # The last line may have been cut off: appending to it would spoil the next one, too.
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        else:
            self._append({"setup": setup, "salt": self.salt})
        self._append({"attempt": self.attempt})

    def has(self, place: Place) -> bool:
        """Whether every arm has been measured there."""
        return place in self.arm_rounds

    def add_round(self, place: Place, by_arm: dict[str, ArmRound]) -> None:
        """Save a complete round."""
        self.arm_rounds[place] = by_arm
        self._append({"place": place, "arms": {arm: found.plain() for arm, found in by_arm.items()}})

    def add_served(self, served: dict[str, dict[str, Any]]) -> None:
        """Save what the servers said about themselves."""
        self.served = served
        self._append({"served": served})

    def add_quality(self, quality: dict[str, Any]) -> None:
        """Save the measurements of the quality rows."""
        self.quality = quality
        self._append({"quality": quality})

    def finished(self) -> None:
        """Delete the file: the results are written and there is nothing to resume."""
        self.path.unlink(missing_ok=True)

    def _check(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
        for key in {**found, **expected}:
            if found.get(key) != expected.get(key):
                raise BadInputError(
                    f"{self.path} is an unfinished run with another {key} ({_short(found.get(key))}, now "
                    f"{_short(expected.get(key))}): give --fresh to drop it, or another --output"
                )

    def _read(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "arms" in line:
                place = (int(line["place"][0]), int(line["place"][1]))
                self.arm_rounds[place] = {arm: ArmRound.read(plain) for arm, plain in line["arms"].items()}
            self.attempt = line.get("attempt", self.attempt)
            self.served = line.get("served", self.served)
            self.quality = line.get("quality", self.quality)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise BadInputError(f"{self.path} cannot be written: {error.strerror or error}") from None


def _records(path: Path) -> list[dict[str, Any]]:
    """The complete lines."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # killed while writing
    return records


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
