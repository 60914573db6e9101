"""Exit code 0 if the service in this container answers a canary through its models in time."""

import http.client
import os
import sys


def main() -> int:
    # Not urllib: it would ask a proxy that the environment names, for its own host too.
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(os.environ.get("CLIPSERVE_PORT", "8000")), timeout=9
    )
    try:
        connection.request("GET", "/health/ready")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, http.client.HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main())
