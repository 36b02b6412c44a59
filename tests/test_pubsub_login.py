"""Who we are, to a server that wants TLS and a token: in a process of its own, as grpc reads its certificates once per process."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

PROGRAM = """
import os, pathlib, sys
import grpc
from google.oauth2.credentials import Credentials
from pubsub_standin import StandIn
import broker_nb

folder, tokens, how = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
pair = ((folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes())
with StandIn(grpc.ssl_server_credentials([pair])) as server:
    server.topic("orders")
    endpoint = "localhost:" + server.address.split(":")[1]
    if how == "key file":
        settings = {"service_account_file": str(folder / "account.json")}
    else:
        settings = {"credentials": Credentials(None, "refresh", token_uri=tokens, client_id="id", client_secret="hunter2")}
    try:
        connection = broker_nb.connect("pubsub://standin", api_endpoint=endpoint, **settings)
    except broker_nb.BrokerError as error:
        print(error.kind.name, error)
    else:
        print(connection.about, *connection.topics().topic, sep="; ")
        connection.close()
"""


class Tokens(http.server.ThreadingHTTPServer):
    """Gives no token to anybody."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer = json.dumps({"error": "invalid_grant", "error_description": "Token has been expired or revoked."}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass


@pytest.fixture
def tokens() -> Iterator[str]:
    with Tokens(("127.0.0.1", 0), Tokens.Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/token"
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: pathlib.Path, tokens: str) -> pathlib.Path:
    """A server's key and certificate, and a service account's file."""
    key = rsa.generate_private_key(65537, 2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem, now = key.private_bytes(*form), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - dt.timedelta(1), now + dt.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "key.pem").write_bytes(pem)
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    account = {"type": "service_account", "project_id": "other", "private_key_id": "1", "client_email": "a@example.com"}
    (tmp_path / "account.json").write_text(json.dumps(account | {"private_key": pem.decode(), "token_uri": tokens}))
    return tmp_path


def connect(folder: pathlib.Path, tokens: str, how: str) -> str:
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(folder / "cert.pem"),
        "PYTHONPATH": f"{here}:{here.parent}",
    }
    environment.pop("PUBSUB_EMULATOR_HOST", None)
    command = [sys.executable, "-c", PROGRAM, folder, tokens, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert "hunter2" not in line
    return line


def test_a_key_file(folder: pathlib.Path, tokens: str) -> None:
    assert connect(folder, tokens, "key file") == "Google Pub/Sub, project standin; orders"


def test_credentials_that_get_no_token_any_more(folder: pathlib.Path, tokens: str) -> None:
    """grpc calls that unavailable; it is who we are that is not accepted."""
    line = connect(folder, tokens, "credentials")
    assert line.startswith("AUTH pubsub: not logged in (")
    assert "Token has been expired or revoked" in line
    assert "gcloud auth application-default login" in line
