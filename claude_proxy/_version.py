"""
Provides claude_proxy version information.
"""

# This file is auto-generated! Do not edit!
# Use `python -m incremental.update claude_proxy` to change this file.

from incremental import Version

__version__ = Version("claude_proxy", 26, 11, 0)
__all__ = ["__version__"]
