# SPDX-License-Identifier: Apache-2.0
"""Nested mappings laid over each other, remembering where each value came from."""

from __future__ import annotations

from typing import Any

Key = tuple[str, ...]


class Layers:
    """`values` is the merged mapping; a later layer wins key by key, at any depth."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._sources: dict[Key, str] = {}

    def add(self, mapping: dict[str, Any], source: str, prefix: Key = ()) -> None:
        """Lay `mapping` over what is there. An empty section changes nothing."""
        for name, value in mapping.items():
            key = (*prefix, str(name))
            if isinstance(value, dict):
                self._sources.setdefault(key, source)
                self._section(key)
                self.add(value, source, key)
            elif value is None and not prefix:
                self._sources.setdefault(key, source)
            else:
                self.set(key, value, source)

    def set(self, key: Key, value: Any, source: str) -> None:
        """Give one key its value."""
        self._section(key[:-1])[key[-1]] = value
        self._sources[key] = source

    def source(self, key: Key) -> str:
        """Return where the value of `key`, or of the section round it, came from ("" if unset)."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._sources:
                return self._sources[key[:length]]
        return ""

    def _section(self, key: Key) -> dict[str, Any]:
        section = self.values
        for name in key:
            inner = section.get(name)
            if not isinstance(inner, dict):
                inner = section[name] = {}
            section = inner
        return section
