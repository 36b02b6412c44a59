"""Keys, certificates and signed claims for servers that want to know who we are."""

import base64
import datetime as dt
import hashlib
import ipaddress
import json
import os
import time

import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Key:
    """An nkey: `seed` and `public` as text."""

    def __init__(self, prefix):
        self.seed = nkeys.encode_seed(os.urandom(32), prefix).decode()
        self.pair = nkeys.from_seed(bytearray(self.seed.encode()))
        self.public = self.pair.public_key.decode()


def operator():
    return Key(nkeys.PREFIX_BYTE_OPERATOR)


def account():
    return Key(nkeys.PREFIX_BYTE_ACCOUNT)


def user():
    return Key(nkeys.PREFIX_BYTE_USER)


def token(issuer, subject, kind, **claims):
    """A JSON web token as NATS has them."""

    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).rstrip(b"=")

    body = {
        "iat": int(time.time()),
        "iss": issuer.public,
        "sub": subject.public,
        "name": kind,
        "nats": {"type": kind, "version": 2, **claims},
    }
    body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    text = part({"typ": "JWT", "alg": "ed25519-nkey"}) + b"." + part(body)
    return (text + b"." + base64.urlsafe_b64encode(issuer.pair.sign(text)).rstrip(b"=")).decode()


def credentials(jwt, seed):
    """The text of a .creds file."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


class Authority:
    """A certificate authority with its files in a folder: ca.pem, and <name>.pem with <name>.key for each name."""

    def __init__(self, folder, *names):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self._write("ca", self._certificate(self.name, self.key.public_key(), ca=True))
        for name in names:
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            self._write(name, self._certificate(subject, key.public_key(), ca=False), key)

    def path(self, file):
        return str(self.folder / file)

    def _certificate(self, subject, public, *, ca):
        now = dt.datetime.now(dt.UTC)
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _write(self, name, certificate, key=None):
        (self.folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            (self.folder / f"{name}.key").write_bytes(text)
