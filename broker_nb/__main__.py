"""`python -m broker_nb up kafka`: a real broker on this machine, without Docker, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pathlib
import signal
import sys
import time


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 0 after Ctrl-C, 1 when a server could not be started or ended by itself."""
    from broker_nb.testing.servers import NAMES  # here: `broker_nb.testing` is the top layer, and only this needs it

    parser = argparse.ArgumentParser(prog="python -m broker_nb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start real brokers on this machine; Ctrl-C stops them")
    up.add_argument("names", nargs="+", metavar="NAME", help=f"which: {', '.join(NAMES)}")
    up.add_argument("--port", type=int, help="port on 127.0.0.1 (default: a free one)")
    up.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep the data in DIR/NAME and use it again next time")
    arguments = parser.parse_args(argv)
    return _up(arguments.names, arguments.port, arguments.keep)


def _up(names: list[str], port: int | None, keep: pathlib.Path | None) -> int:
    from broker_nb.testing.servers import DigestMismatch, OwnServer, ServerFailed, ServerMissing

    if port is not None and len(names) > 1:
        print("--port is for one server: name one, or leave it out", file=sys.stderr)
        return 1
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("broker_nb.testing.servers").setLevel(logging.INFO)
    for stopping in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell without job control hands it down ignored
        signal.signal(stopping, signal.default_int_handler)
    with contextlib.ExitStack() as servers:
        servers.callback(print, "stopped")
        try:
            running = [servers.enter_context(OwnServer(name, port=port, keep=keep and keep / name)) for name in names]
            for server in running:
                print(f"{server.name} is ready at {server.address}; in a notebook:\n  %load_ext broker_nb", flush=True)
                print(f"  %broker connect {server.url}\nCtrl-C stops it.", flush=True)
            while all(server.running for server in running):
                time.sleep(0.2)
        except (ServerMissing, DigestMismatch, ServerFailed) as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            for stopping in (signal.SIGINT, signal.SIGTERM):  # stopping takes a moment; let nothing cut it short
                signal.signal(stopping, signal.SIG_IGN)
        for server in running:
            if not server.running:
                print(f"{server.name} ended by itself; its log is {server.folder / 'server.log'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
