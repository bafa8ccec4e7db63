"""Finding the value that counts, and collecting what is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from claude_proxy.settings.table import BY_VARIABLE

__all__ = ["Paths", "Reader", "SettingsError", "shown"]

# The longest delay that JavaScript timers know, so that values move over unchanged.
_MAX_MS = 2_147_483_647
_SHOWN = 80

_SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)
_NUMBER = re.compile(r"[0-9]{1,15}")


class SettingsError(Exception):
    """
    The settings cannot be used.

    @ivar mistakes: one sentence for each bad setting; none shows a key.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        lines = "".join(f"\n  {mistake}" for mistake in self.mistakes)
        super().__init__(f"The settings cannot be used:{lines}")


def shown(value: str) -> str:
    """A bad value as a message shows it."""
    return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")


class Reader:
    """Finds the value that counts, and collects what is wrong with it."""

    def __init__(
        self,
        flags: Mapping[str, str | None],
        environ: Mapping[str, str],
        dotenv: Mapping[str, str | None],
    ) -> None:
        self._flags = flags
        self._environ = environ
        self._dotenv = dotenv
        self.mistakes: list[str] = []

    def _find(self, variable: str) -> tuple[str, str | None]:
        setting = BY_VARIABLE[variable]
        levels = (
            (f"--{setting.flag}", self._flags.get(setting.flag) if setting.flag else None),
            ("the environment", self._environ.get(variable)),
            (".env", self._dotenv.get(variable)),
        )
        for source, value in levels:
            if value and value.strip():
                return value.strip(), source
        return setting.default, None

    def text(self, variable: str) -> str:
        return self._find(variable)[0]

    def source(self, variable: str) -> str | None:
        """Where the value comes from, None for the default."""
        return self._find(variable)[1]

    def refuse(self, variable: str, accepted: str) -> None:
        value, source = shown(self.text(variable)), self.source(variable)
        self.mistakes.append(f"{variable} is {value} (from {source}). Accepted: {accepted}.")

    def number(self, variable: str, low: int, high: int) -> int:
        text = self.text(variable)
        if _NUMBER.fullmatch(text) and low <= int(text) <= high:
            return int(text)
        unit = BY_VARIABLE[variable].unit
        self.refuse(variable, f"a whole number from {low} to {high} {unit}".rstrip())
        return low

    def seconds(self, variable: str, low: int) -> float:
        return self.number(variable, low, _MAX_MS) / 1000

    def choice(self, variable: str, accepted: tuple[str, ...]) -> str:
        text = self.text(variable).lower()
        if text not in accepted:
            self.refuse(variable, ", ".join(accepted))
        return text

    def switch(self, variable: str) -> bool:
        text = self.text(variable).lower()
        if text not in _SWITCH:
            self.refuse(variable, ", ".join(_SWITCH))
        return _SWITCH.get(text, False)

    def items(
        self, variable: str, check: Callable[[str], str | None], accepted: str
    ) -> tuple[str, ...]:
        """The parts between commas, each as `check` returns it; None from it is a mistake."""
        parts = [part.strip() for part in self.text(variable).lower().split(",")]
        checked = [check(part) for part in parts if part]
        if None in checked:
            self.refuse(variable, f"{accepted}, separated by commas")
        return tuple(dict.fromkeys(part for part in checked if part is not None))


class Paths:
    """Makes paths absolute; `~` is expanded because nothing expands it in a `.env` file."""

    def __init__(self, cwd: Path, environ: Mapping[str, str]) -> None:
        self._cwd = cwd
        # Some service managers set no HOME: then the user database knows it.
        self.home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - never raises

    def absolute(self, text: str) -> Path:
        if text == "~" or text.startswith("~/"):
            text = self.home + text[1:]
        return self._cwd / text
