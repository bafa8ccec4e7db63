"""Makes ``twistd claude-proxy`` known to Twisted."""

from twisted.application.service import ServiceMaker

claude_proxy = ServiceMaker(
    "claude-proxy",
    "claude_proxy.tap",
    "Serve the Claude Code CLI over HTTP",
    "claude-proxy",
)
