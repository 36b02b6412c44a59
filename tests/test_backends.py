import asyncio
import subprocess
import sys

import pytest

from broker_nb import backends
from broker_nb.backends import has_secret, load, profile_from_url, schemes
from broker_nb.backends.inmem.driver import InmemDriver
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.client import Client

THIRD_PARTY = """
import acme_client
from broker_nb.backends.inmem.driver import InmemDriver

class AcmeDriver(InmemDriver):
    requires = ("acme_client", "fast")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution `acme-broker` with a backend `acme`, and its client."""
    info = tmp_path / "acme_broker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-broker\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[broker_nb.backends]\nacme = acme_backend:AcmeDriver\n")
    (tmp_path / "acme_backend.py").write_text(THIRD_PARTY)
    (tmp_path / "acme_client.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("acme_backend", "acme_client"):
        sys.modules.pop(name, None)


def test_unknown_scheme_names_those_that_exist():
    with pytest.raises(
        BrokerError, match=r"^no backend for 'rabbit'; there are: demo, inmem, kafka, nats, pubsub, pulsar, servicebus$"
    ) as caught:
        load("rabbit")
    assert caught.value.kind is ErrorKind.INVALID


def test_schemes_of_brokers_to_come_are_not_listed():
    assert schemes() == ["demo", "inmem", "kafka", "nats", "pubsub", "pulsar", "servicebus"]


def test_a_third_party_backend_is_found_listed_and_used(installed):
    assert "acme" in schemes()
    assert issubclass(load("acme"), InmemDriver)

    async def use():
        client = await Client.open("acme", {"hosts": [], "path": "", "options": {}, "timeout": 5})
        try:
            return await client.entities()
        finally:
            await client.close()

    assert asyncio.run(asyncio.wait_for(use(), 10)) == []


def test_a_third_party_backend_cannot_take_the_place_of_ours(installed):
    (installed / "acme_broker-1.0.dist-info" / "entry_points.txt").write_text(
        "[broker_nb.backends]\ninmem = acme_backend:AcmeDriver\n"
    )
    assert load("inmem") is InmemDriver


def test_a_third_party_backend_without_its_client_says_what_to_install(installed):
    (installed / "acme_backend.py").write_text(THIRD_PARTY.replace("import acme_client\n", ""))
    (installed / "acme_client.py").unlink()
    with pytest.raises(BrokerError) as caught:
        load("acme")
    assert str(caught.value) == 'acme: its client acme_client is not installed; run: pip install "acme-broker[fast]"'


def test_a_missing_client_gives_the_exact_install_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("broker_nb.backends.kafka")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)  # what Python does for a module that is not there
    with pytest.raises(BrokerError) as caught:
        load("kafka")
    assert str(caught.value) == 'kafka: its client confluent_kafka is not installed; run: pip install "broker-nb[kafka]"'
    assert caught.value.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("broken", ["import not_there_at_all", "raise ImportError('libfoo.so.1: cannot open')"])
def test_other_import_errors_pass_through(tmp_path, monkeypatch, broken):
    (tmp_path / "breaking_backend.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    entry = backends._Entry("breaking_backend:Driver", "confluent_kafka", "kafka")
    monkeypatch.setitem(backends._SCHEMES, "breaking", entry)
    with pytest.raises(ImportError, match=r"not_there_at_all|libfoo"):
        load("breaking")


def test_the_table_imports_no_backend():
    code = "import sys, broker_nb.backends; print([m for m in sys.modules if 'inmem' in m or 'kafka' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("url", "scheme", "profile"),
    [
        ("demo", "demo", {"hosts": [], "path": "", "options": {}}),
        ("inmem://", "inmem", {"hosts": [], "path": "", "options": {}}),
        ("INMEM://shop", "inmem", {"hosts": ["shop"], "path": "", "options": {}}),
        (" kafka://a:9092,b:9093 ", "kafka", {"hosts": ["a:9092", "b:9093"], "path": "", "options": {}}),
        ("kafka://[::1]:9092,[fe80::1]", "kafka", {"hosts": ["[::1]:9092", "[fe80::1]"], "path": "", "options": {}}),
        ("x://h/a%2Fb/c?k=v%20w&empty=", "x", {"hosts": ["h"], "path": "a/b/c", "options": {"k": "v w", "empty": ""}}),
        ("kafka://ann@h:1", "kafka", {"hosts": ["h:1"], "path": "", "options": {}, "username": "ann"}),
    ],
)
def test_a_url_becomes_a_profile(url, scheme, profile):
    assert profile_from_url(url) == (scheme, profile)
    assert not has_secret(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "not a connection URL"),
        ("localhost:9092", "not a connection URL"),
        ("://h", "not a connection URL"),
        ("kafka://a,,b", "is not a host"),
        ("kafka://a b:1", "is not a host"),
        ("kafka://:9092", "is not a host"),
        ("kafka://a:b", "bad port"),
        ("kafka://a:0", "bad port"),
        ("kafka://a:70000", "bad port"),
        ("kafka://a:", "bad port"),
        ("kafka://a:٣", "bad port"),
        ("kafka://a:9092?x", "option=value"),
        ("kafka://a:9092?x=1&x=2", "'x' is given twice"),
        ("kafka://a\n:9092", "control characters"),
    ],
)
def test_a_malformed_url_is_one_line(url, says):
    with pytest.raises(BrokerError, match=says) as caught:
        profile_from_url(url)
    assert caught.value.kind is ErrorKind.INVALID
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "kafka://ann:hunter2@h:9092",
        "kafka://ann:hunter2/with@odd?signs@h:9092",
        "kafka://:hunter2@h",
        "kafka://h:9092?sasl.password=hunter2",
        "kafka://h?ssl.key.passphrase=hunter2",
        "nats://h?TOKEN=hunter2",
        "x://h?client_secret=hunter2",
        "x://h?sasl.jaas.config=hunter2",
    ],
)
def test_a_password_in_a_url_is_seen_and_refused_without_repeating_it(url):
    assert has_secret(url)
    with pytest.raises(BrokerError, match="password") as caught:
        profile_from_url(url)
    assert "hunter2" not in str(caught.value)
    assert "odd" not in str(caught.value)


def test_a_password_is_taken_when_allowed():
    scheme, profile = profile_from_url("kafka://ann:p%40ss@h:9092", allow_secret=True)
    assert (scheme, profile["username"], profile["password"], profile["hosts"]) == ("kafka", "ann", "p@ss", ["h:9092"])


def test_a_principal_in_an_option_is_not_a_password():
    url = "kafka://h:9092?sasl.kerberos.principal=ann@REALM"
    assert not has_secret(url)
    assert profile_from_url(url)[1]["options"] == {"sasl.kerberos.principal": "ann@REALM"}
