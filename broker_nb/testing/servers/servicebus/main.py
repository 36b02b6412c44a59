"""The stand-in's process: `main.py PORT ADMINISTRATION_PORT CONFIG_FILE`."""

from __future__ import annotations

import json
import pathlib
import sys

from proton.reactor import Container

from broker_nb.testing.servers.servicebus.admin import serve
from broker_nb.testing.servers.servicebus.broker import StandIn

if __name__ == "__main__":
    port, administration = map(int, sys.argv[1:3])
    stand_in = StandIn(port, json.loads(pathlib.Path(sys.argv[3]).read_text()))
    serve(administration, stand_in)
    Container(stand_in).run()
