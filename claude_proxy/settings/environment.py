"""The `.env` file, and the environment that the CLI inherits."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import MappingProxyType

# Not dotenv_values: that one logs the lines it does not understand and goes on without them.
from dotenv.parser import parse_stream

from claude_proxy.settings.reader import SettingsError
from claude_proxy.settings.table import OWN_VARIABLES

__all__ = ["child_environment", "read_dotenv"]

# What a service manager hands to this process alone.
_SERVICE_VARIABLES = frozenset(
    {
        "CREDENTIALS_DIRECTORY",
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "NOTIFY_SOCKET",
        "STATE_DIRECTORY",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)


def read_dotenv(path: Path) -> dict[str, str | None]:
    """
    The variables of a `.env` file, as written; none if there is no such file.

    @raise SettingsError: it cannot be read, or a line is not KEY=VALUE.  A line that is passed
        over could be the one with the API key, and the server would be open.
    """
    try:
        # Editors on Windows put a byte order mark before the first name.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}."]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{path} cannot be read: it is not UTF-8 text."]) from error
    values: dict[str, str | None] = {}
    mistakes: list[str] = []
    for binding in parse_stream(StringIO(text)):
        if binding.error or "=" in (binding.key or "") or "\0" in binding.original.string:
            written = binding.original.string
            blank_lines = written[: len(written) - len(written.lstrip())].count("\n")
            mistakes.append(
                f"{path} line {binding.original.line + blank_lines} is not understood. "
                "Accepted: KEY=VALUE, with quotes that are closed."
            )
        elif binding.key is not None:
            values[binding.key] = binding.value
    if mistakes:
        raise SettingsError(mistakes)
    return values


def child_environment(
    environ: Mapping[str, str], dotenv: Mapping[str, str | None]
) -> Mapping[str, str]:
    """What the CLI inherits: everything but our own settings and the service manager's."""
    merged = {name: value for name, value in dotenv.items() if value is not None}
    # Empty is as unset here too: it does not hide what `.env` says.
    merged.update({n: value for n, value in environ.items() if value or n not in merged})
    withheld = OWN_VARIABLES | _SERVICE_VARIABLES
    return MappingProxyType({n: value for n, value in merged.items() if n not in withheld})
