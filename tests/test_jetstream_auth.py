"""Servers that want to know who we are, let us do less, are away, or have no JetStream."""

import asyncio
import json
import ssl
import subprocess
import sys
import time

import nats_keys
import pytest
from nats_bed import ALL, Bed, on, take

import broker_nb
from broker_nb.backends.driver import Entity, Kind, Outbound, Sent, Settled, Settlement, Verdict
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute
from broker_nb.testing.servers import OwnServer
from broker_nb.testing.servers.process import free_port

SECRET = "s3cret-and-long"  # noqa: S105 - of servers of this module


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return nats_keys.Authority(tmp_path_factory.mktemp("ours"), "server", "client")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    return nats_keys.Authority(tmp_path_factory.mktemp("others"), "client")


def refusal(url, timeout=5.0, **settings):
    """The error of `connect`, which comes soon and has no secret in it."""
    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        broker_nb.connect(url, timeout=timeout, **settings)
    assert time.monotonic() - began < 5
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def works(url, **settings):
    with broker_nb.connect(url, **settings) as connection:
        assert SECRET not in repr(connection)
        return list(connection.topics()["topic"])


def test_user_and_password():
    with OwnServer("nats", config=f'authorization {{ user: me, password: "{SECRET}" }}\n') as server:
        host = server.address
        assert works(f"nats://{host}", user="me", password=SECRET) == []
        assert works(f"nats://me@{host}", password=SECRET) == []
        assert works(f"nats://{host}", options={"user": "me", "password": SECRET}) == []
        for url, settings in (
            (f"nats://{host}", {}),
            (f"nats://{host}", {"user": "me", "password": f"{SECRET}-not"}),
            (f"nats://me@{host}", {}),
            (f"nats://{host}", {"token": SECRET}),
        ):
            error = refusal(url, **settings)
            assert (error.kind, host in str(error)) == (ErrorKind.AUTH, True)
        assert refusal(f"nats://me:{SECRET}@{host}").kind is ErrorKind.INVALID
        assert refusal(f"nats://{host}", options={"user": "me"}, user="you").kind is ErrorKind.INVALID


def test_token():
    with OwnServer("nats", config=f'authorization {{ token: "{SECRET}" }}\n') as server:
        assert works(server.url, token=SECRET) == []
        assert refusal(server.url, token=f"{SECRET}-not").kind is ErrorKind.AUTH
        assert refusal(server.url).kind is ErrorKind.AUTH


def test_nkey(tmp_path):
    ours, other = nats_keys.user(), nats_keys.user()
    (tmp_path / "seed").write_text(ours.seed)
    with OwnServer("nats", config=f"authorization {{ users: [ {{ nkey: {ours.public} }} ] }}\n") as server:
        assert works(server.url, nkeys_seed_str=ours.seed) == []
        assert works(server.url, nkeys_seed=str(tmp_path / "seed")) == []
        error = refusal(server.url, nkeys_seed_str=other.seed)
        assert (error.kind, other.seed in str(error)) == (ErrorKind.AUTH, False)
        assert refusal(server.url).kind is ErrorKind.AUTH
        assert refusal(server.url, nkeys_seed_str="SUnonsense").kind is ErrorKind.INVALID
        assert refusal(server.url, nkeys_seed=str(tmp_path / "none")).kind is ErrorKind.INVALID
        assert refusal(f"{server.url}?nkeys_seed_str={SECRET}").kind is ErrorKind.INVALID


def test_credentials(tmp_path):
    operator, system, account, user = nats_keys.operator(), nats_keys.account(), nats_keys.account(), nats_keys.user()
    limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    stored = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    accounts = {
        system.public: nats_keys.token(operator, system, "account", limits=limits),
        account.public: nats_keys.token(operator, account, "account", limits=limits | stored),
    }
    top = nats_keys.token(operator, operator, "operator", system_account=system.public)
    config = f"operator: {top}\nresolver: MEMORY\nresolver_preload: {json.dumps(accounts)}\nsystem_account: {system.public}\n"
    may = {"subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}}
    good, foreign = nats_keys.token(account, user, "user", **may), nats_keys.token(nats_keys.account(), user, "user", **may)
    for name, text in (
        ("good", nats_keys.credentials(good, user.seed)),
        ("foreign", nats_keys.credentials(foreign, user.seed)),
        ("other seed", nats_keys.credentials(good, nats_keys.user().seed)),
    ):
        (tmp_path / name).write_text(text)
    with OwnServer("nats", config=config) as server:
        assert works(server.url, user_credentials=str(tmp_path / "good")) == []
        assert works(server.url, user_credentials=tmp_path / "good") == []
        for name in ("foreign", "other seed"):
            assert refusal(server.url, user_credentials=str(tmp_path / name)).kind is ErrorKind.AUTH
        error = refusal(server.url, user_credentials=str(tmp_path / "none"))
        assert (error.kind, "user_credentials" in str(error)) == (ErrorKind.INVALID, True)


def tls(pki, **more):
    settings = {"cert_file": pki.path("server.pem"), "key_file": pki.path("server.key"), "ca_file": pki.path("ca.pem"), **more}
    return f"tls {json.dumps(settings)}\n"


def test_tls(pki, strangers):
    ours = {"tls_ca": pki.path("ca.pem")}
    with OwnServer("nats", config=tls(pki)) as server:
        assert works(server.url, **ours) == []
        assert works(server.url, options=ours) == []
        assert works(server.url, tls=ssl.create_default_context(cafile=pki.path("ca.pem"))) == []
        assert works(server.url, tls_hostname="localhost", **ours) == []
        for settings in ({}, {"tls_ca": strangers.path("ca.pem")}, {"tls_hostname": "elsewhere", **ours}):
            error = refusal(server.url, **settings)
            assert (error.kind, server.address in str(error), "tls_ca" in str(error)) == (ErrorKind.AUTH, True, True)
        code = f"import broker_nb; broker_nb.connect({server.url!r}, tls_ca={ours['tls_ca']!r}).close()"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stderr == ""
    for settings in (
        {"tls_ca": pki.path("none.pem")},
        {"tls": "yes"},
        {"tls_key": pki.path("client.key")},
        {"tls_ca": pki.path("client.key")},
    ):
        assert refusal("nats://127.0.0.1:1", **settings).kind is ErrorKind.INVALID


def test_tls_of_both_sides(pki, strangers):
    ca = {"tls_ca": pki.path("ca.pem")}
    with OwnServer("nats", config=tls(pki, verify=True)) as server:
        assert works(server.url, tls_cert=pki.path("client.pem"), tls_key=pki.path("client.key"), **ca) == []
        for settings in ({}, {"tls_cert": strangers.path("client.pem"), "tls_key": strangers.path("client.key")}):
            error = refusal(server.url, **settings, **ca)
            assert (error.kind, server.address in str(error)) == (ErrorKind.AUTH, True)


def test_nothing_goes_out_in_plain_text_where_tls_was_asked_for(pki, nats_url):
    """The client would send the password in plain text to a server that does not demand TLS."""
    error = refusal(nats_url, tls_ca=pki.path("ca.pem"), user="me", password=SECRET)
    assert (error.kind, "TLS" in str(error)) == (ErrorKind.AUTH, True)
    with OwnServer("nats", config="allow_non_tls: true\n" + tls(pki)) as server:

        async def body(opened):
            return opened.driver._wire._transport._io_writer.get_extra_info("cipher")

        assert on(Bed(server.url), body, tls_ca=pki.path("ca.pem")) is not None


def test_options():
    for settings, word in (
        ({"passwort": "x"}, "passwort"),
        ({"error_cb": print}, "error_cb"),
        ({"ping_interval": "often"}, "ping_interval"),
        ({"domain": "a.b"}, "a.b"),
        ({"domain": "a", "prefix": "b.API"}, "b.API"),
        ({"prefix": "a b"}, "a b"),
        ({"key_header": "a: b"}, "a: b"),
        ({"prefix": "a.>"}, "a.>"),
    ):
        error = refusal("nats://127.0.0.1:1", **settings)
        assert (error.kind, word in str(error)) == (ErrorKind.INVALID, True)
    assert refusal("nats://").kind is ErrorKind.INVALID


def test_options_in_the_url(nats_url):
    assert works(f"{nats_url}?ping_interval=5&dont_randomize=true&max_reconnect_attempts=3&key_header=X") is not None


def test_servers_that_do_not_answer(nats_url):
    """A closed port, one that says nothing, one that speaks otherwise: soon, and named; one good server among them is enough."""
    closed = f"127.0.0.1:{free_port()}"
    error = refusal(f"nats://{closed}")
    assert (error.kind, closed in str(error)) == (ErrorKind.UNREACHABLE, True)
    assert refusal(f"nats://{closed},{closed}").kind is ErrorKind.UNREACHABLE
    good = nats_url.removeprefix("nats://")
    for hosts in (f"{closed},{good}", f"{good},{closed}"):
        assert works(f"nats://{hosts}") is not None

    async def silent(reader, writer):
        await reader.read()
        writer.close()

    async def rude(reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def body(serve):
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.to_thread(refusal, f"nats://127.0.0.1:{port}", 1.0)

    for serve in (silent, rude):
        assert asyncio.run(body(serve)).kind is ErrorKind.UNREACHABLE


def test_no_jetstream():
    with OwnServer("nats", config="jetstream: disabled\n") as server:
        error = refusal(server.url)
    assert (error.kind, "JetStream" in str(error)) == (ErrorKind.UNSUPPORTED, True)


@pytest.mark.parametrize("config", ["", "feature_flags { js_ack_fc_v2: true }\n"])
def test_a_domain(tmp_path, config):
    """Questions go by other subjects there, and newer servers may write longer subjects for acks."""
    store = json.dumps(str(tmp_path))
    with OwnServer("nats", config=f"jetstream: {{ domain: hub, store_dir: {store} }}\n{config}") as server:
        bed = Bed(server.url)
        name = bed.stream(retention="workqueue")
        bed.put(name, b"1")

        async def body(opened):
            assert len((await opened.look(name))[0]) == 1
            source = await opened.source(name, "c", create=True)
            ((row, token),) = await take(source, 1)
            assert (row.id, row.delivery_count, token.count(".")) == ("1", 1, 10 if config else 8)
            assert abs(row.publish_time_ns - time.time_ns()) < 60e9
            (until,) = await source.extend([token], 30)
            assert until - time.monotonic() > 25
            assert (await source.settle([Settlement(token, Verdict.ACK)]))[0].state is Settled.CONFIRMED

        on(bed, body, **({"prefix": "$JS.hub.API"} if config else {"domain": "hub"}))
        assert bed.state(name)["messages"] == 0
        error = refusal(server.url, domain="elsewhere")
        assert (error.kind, "domain" in str(error)) == (ErrorKind.UNSUPPORTED, True)


ALL_RIGHTS, READER, TAKER = ({"user": name, "password": "x"} for name in ("all", "reader", "taker"))
RIGHTS = """
authorization {
  users: [
    { user: all, password: x }
    { user: reader, password: x, permissions: {
        publish: ["$JS.API.STREAM.INFO.>", "$JS.API.STREAM.NAMES", "$JS.API.DIRECT.GET.>", "$JS.API.STREAM.MSG.GET.>"]
        subscribe: ["_INBOX.>"] } }
    { user: taker, password: x, permissions: { publish: { deny: ["$JS.ACK.>", "secret.>"] }, subscribe: ["mine.>"] } }
  ]
}
"""


def test_rights():
    """What may not be done is told at once, by name; what may be done works."""
    with OwnServer("nats", config=RIGHTS) as server:
        bed = Bed(server.url, **ALL_RIGHTS)
        name, secret = bed.stream(), bed.stream(subjects=["secret.>"])
        consumer = bed.consumer(name)
        bed.put(name, b"1", b"2")

        async def reads(opened):
            assert len((await opened.look(name))[0]) == 2
            for call in (opened.source(name, consumer), opened.source(name, "new", create=True)):
                with pytest.raises(BrokerError) as caught:
                    await call
                assert caught.value.kind is ErrorKind.PERMISSION
            (result,) = await (await opened.sender(name)).send([Outbound(b"x")])
            assert (result.state, result.error.kind) == (Sent.REFUSED, ErrorKind.PERMISSION)

        on(bed, reads, **READER)

        async def takes(opened):
            source = await opened.source(name, consumer)
            ((_, token), _) = await take(source, 2)
            began = time.monotonic()
            (outcome,) = await source.settle([Settlement(token, Verdict.ACK)])
            assert (outcome.state, outcome.error.kind) == (Settled.REFUSED, ErrorKind.PERMISSION)
            results = await (await opened.sender("secret.x")).send([Outbound(b"x", b"k"), Outbound(b"y", b"k")])
            assert [r.state for r in results] == [Sent.REFUSED] * 2
            assert time.monotonic() - began < 2

        on(bed, takes, **TAKER, inbox_prefix="mine")
        error = refusal(server.url, **TAKER)
        assert (error.kind, "_inbox" in str(error).lower()) == (ErrorKind.PERMISSION, True)
        assert bed.state(secret)["messages"] == 0


def test_old_server():
    """2.9: no batched looks, and what it would drop without a word is refused by name."""
    with OwnServer("nats@2.9") as server:
        bed = Bed(server.url)
        name = bed.stream()
        bed.put(name, *[b"%d" % i for i in range(50)], raw=b"A: 1\r\nA: 2")
        bed.delete(name, 7)

        async def body(opened):
            assert "2.9" in opened.driver.about
            rows, _ = await opened.look(name)
            assert [r.position[0] for r in rows] == [i for i in range(1, 51) if i != 7]
            times = [r.publish_time_ns for r in rows]
            entity = Entity(Kind.TOPIC, name)
            for row in (rows[0], rows[5], rows[6], rows[-1]):
                assert await opened.driver.locate(entity, {0: row.publish_time_ns}) == {0: row.position}
                assert await opened.driver.locate(entity, {0: row.publish_time_ns - 1}) == {0: row.position}
            assert await opened.driver.locate(entity, {0: times[-1] + 1}) == {0: None}
            for native in ({"filter_subjects": [name]}, {"metadata": {"a": "b"}}, {"pause_until": "2099-01-01T00:00:00Z"}):
                with pytest.raises(BrokerError, match=r"needs nats-server 2\.1[01]") as caught:
                    await opened.source(name, "new", create=True, native=native)
                assert caught.value.kind is ErrorKind.UNSUPPORTED
                assert next(iter(native)) in str(caught.value)
            assert (await asyncio.to_thread(bed.api, f"CONSUMER.NAMES.{name}"))["consumers"] == []
            source = await opened.source(name, "new", create=True)
            taken = await take(source, 49)
            assert [r.position for r, _ in taken] == [r.position for r in rows]
            verdicts = [Settlement(t, Verdict.REJECT, reason="x") for _, t in taken[:5]]
            verdicts += [Settlement(t, Verdict.RELEASE, delay=0.1) for _, t in taken[5:10]]
            verdicts += [Settlement(t, Verdict.ACK) for _, t in taken[10:]]
            assert {o.state for o in await source.settle(verdicts)} == {Settled.CONFIRMED}
            again = await take(source, 5)
            assert {r.delivery_count for r, _ in again} == {2}
            assert await source.pull(1, ALL, 0.2) is None
            sender = await opened.sender(name)
            assert "2.11" in sender.check(Outbound(b"x", None, [Attribute("Nats-TTL", b"1s")]))
            (result,) = await sender.send([Outbound(b"x")])
            assert result.state is Sent.ACCEPTED

        on(bed, body)
