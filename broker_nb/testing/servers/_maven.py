"""Fetch Maven artifacts; a program, run with the folder of the `maven-artifact` wheel as its argument.

Reads `{"group:artifact:version": "path", ...}` from stdin. That tool knows the registry; `BROKER_NB_MAVEN` names
a mirror instead.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import sys


def main() -> None:
    """Fetch all, eight at a time."""
    sys.path.insert(0, sys.argv[1])
    from maven_artifact import Artifact, Downloader  # type: ignore[import-not-found]  # installed in that folder only

    mirror = os.environ.get("BROKER_NB_MAVEN")
    downloader = Downloader(base=mirror) if mirror else Downloader()
    with contextlib.redirect_stdout(sys.stderr), concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(downloader.download, Artifact.parse(coordinates), path)
            for coordinates, path in json.load(sys.stdin).items()
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
