"""A page's side of the stream of events, in Python: takes frames in and keeps the picture."""

import json
from typing import Any


class Picture:
    """What a page would show."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.values: dict[str, Any] = {}
        self.maps: list[list[str]] = []
        self.marks: list[list[Any]] = []
        self.tree: list[dict[str, Any]] = []
        self.rows: dict[str, list[list[Any]]] = {}
        self.whole: dict[str, Any] = {}

    def take(self, frame: bytes) -> None:
        """One frame, as it came."""
        assert frame.endswith(b"\n\n")
        if frame.startswith(b":"):
            self.kinds.append("comment")
            return
        head, data = frame.decode().strip().split("\n")
        kind, told = head.removeprefix("event: "), json.loads(data.removeprefix("data: "))
        self.kinds.append(kind)
        self.values = told["v"]
        if kind == "whole":
            self.whole = told
            self.maps = [[group["map"], group["host"]] for group in told["groups"]]
            self.marks = []
        for group, tiers in enumerate(told.get("map", ())):
            for tier, changes in enumerate(tiers):
                states = self.maps[group][tier]
                for start, new in changes:
                    states = states[:start] + new + states[start + len(new) :]
                self.maps[group][tier] = states
        self.marks += told.get("marks", ())
        self.tree = told.get("tree", self.tree)
        self.rows = told.get("rows", self.rows)
