"""`python -m broker_nb up kafka`: a real broker on this machine, without Docker, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pathlib
import signal
import sys
import time

from broker_nb.testing import servers


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0 after Ctrl-C, 1 when a server could not be started or ended by itself."""
    parser = argparse.ArgumentParser(prog="python -m broker_nb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start real brokers on this machine; Ctrl-C stops them")
    up.add_argument("--port", type=int, help="port on 127.0.0.1 (default: a free one)")
    up.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep the data in DIR/NAME and use it again next time")
    up.set_defaults(run=lambda given: _up(given.names, given.port, given.keep))
    fetch = commands.add_parser("fetch", help="download what `up` needs, to do without a network later")
    fetch.set_defaults(run=lambda given: _fetch(given.names))
    for command in (up, fetch):
        command.add_argument("names", nargs="+", metavar="NAME", help=f"which: {', '.join(servers.NAMES)}")
    given = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger(servers.__name__).setLevel(logging.INFO)
    try:
        given.run(given)
    except (servers.ServerMissing, servers.DigestMismatch, servers.ServerFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _fetch(names: list[str]) -> None:
    for name in names:
        servers.prepare(name)
        print(f"{name}: all here")


def _up(names: list[str], port: int | None, keep: pathlib.Path | None) -> None:
    if port is not None and len(names) > 1:
        raise servers.ServerFailed("--port is for one server: name one, or leave it out")
    for signum in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell without job control hands it down ignored
        signal.signal(signum, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        running = []
        try:
            for name in names:
                server = servers.OwnServer(name, port=port, keep=keep and keep / name)
                stack.callback(print, f"{name} stopped", flush=True)
                running.append(stack.enter_context(server))
                print(f"{name} is ready at {server.address}; in a notebook:", "%load_ext broker_nb", sep="\n  ")
                print(f"  %broker connect {server.url}\nCtrl-C stops it.", flush=True)
            while True:
                for server in running:
                    server.check()
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):  # stopping takes a moment; let nothing cut it short
                signal.signal(signum, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
