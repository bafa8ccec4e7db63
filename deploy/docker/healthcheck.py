"""
The image's HEALTHCHECK: ends with 0 if the server can serve, with 1 and a sentence if it cannot.

`degraded` counts as healthy, as it does for the server itself.  PORT is the server's own setting.
"""

import json
import os
import sys
import urllib.error
import urllib.request

_SECONDS = 8
_URL = f"http://127.0.0.1:{os.environ.get('PORT') or '3000'}/health"


def _main() -> str | None:
    """Why the server is not healthy; None if it is."""
    # Not through a proxy, whatever the environment says for the agent.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(_URL, timeout=_SECONDS) as answer:
            status = json.load(answer)["status"]
    except urllib.error.HTTPError as error:
        return f"unhealthy: {error.read(1000).decode('utf-8', 'replace')}"
    except (OSError, ValueError, KeyError) as error:
        return f"no answer from {_URL}: {error}"
    return None if status in ("healthy", "degraded") else f"the server says {status!r}"


sys.exit(_main())
