"""Claude Code behind HTTP: a Twisted daemon that serves the ``claude`` command-line agent."""

from claude_proxy._version import __version__ as _version

__version__: str = _version.public()

__all__ = ["__version__"]
