"""The pages that come from the code are those of this code; part of `make lint`."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import types

import pytest

from broker_nb.backends.driver import Capabilities

ROOT = pathlib.Path(__file__).parent.parent
STALE = "not of this code: run `make docs` and commit what it writes"


@pytest.fixture(scope="module")
def docs() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("broker_nb_tools_docs", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_pages_are_of_this_code(docs):
    assert (ROOT / "docs" / "capabilities.md").read_text("utf-8") == docs.capabilities(), STALE
    assert docs.between((ROOT / "README.md").read_text("utf-8"))[1] == docs.readme(), STALE


def test_the_committed_conformance_run_has_every_backend_and_no_failure(docs):
    text = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    header = next(line for line in text.splitlines() if line.startswith("| suite | about |"))
    assert {*docs.drivers()} <= {*header.strip("| ").split(" | ")}, STALE
    assert "FAILED" not in text


def test_every_capability_has_its_words(docs):
    assert {field.name for field in dataclasses.fields(Capabilities)} - {"never", "notyet", "server_min"} <= {*docs.WORDS}


def results(**states: str) -> dict[str, dict[str, dict[str, str]]]:
    return {"Tails": {f"test_{name}": {"state": state, "says": f"why {state}"} for name, state in states.items()}}


def test_a_conformance_page(docs, monkeypatch):
    monkeypatch.setattr(docs, "of_what", lambda: "From a run.")
    told = {"good": results(times="pass", a_compacted_gap="never", stopped_early="notyet"), "bad": results(times="fail")}
    text = docs.conformance(told | {"none": results(times="never", stopped_early="never")})
    assert (
        "| Tails | Ends of ranges at which others wait for a row that never comes. | 1 of 1; 1 not yet, 1 never | 0 of 1 | 2 never |"
        in text
    )
    assert "| Tails | a compacted gap | good | never | why never |" in text
    assert "| Tails | times | bad | FAILED | why fail |" in text
    assert "| Tails | all | none | never | why never |" in text
    assert "| pass | FAILED | never |\n" in text
    assert "| never | not run | not run |\n" in text


@pytest.mark.parametrize("state", ["fail", "never", None])
def test_the_readme_says_yes_only_to_what_the_run_shows(docs, state):
    told: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for scheme in docs.drivers():
        for row in docs.ROWS:
            for suite, name in map(str.split, row.proofs):
                told.setdefault(scheme, {}).setdefault(suite, {})[f"test_{name}"] = {"state": "pass", "says": ""}
    docs.prove(told)
    if state:
        told["kafka"]["Tails"]["test_times"]["state"] = state
    else:
        del told["kafka"]["Tails"]["test_times"]
    with pytest.raises(docs.Unproven, match=f"README: kafka: .*: Tails times: {state or 'not run'}"):
        docs.prove(told)


def test_a_run_older_than_the_code_makes_no_page(docs, monkeypatch, tmp_path):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "conformance.json")
    monkeypatch.setattr(docs.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="99999999999"))
    docs.RESULTS.write_text("{}")
    with pytest.raises(docs.Unproven, match=r"conformance\.json is older than the code: run `make test` first"):
        docs.of_what()


def test_a_bar_in_a_text_does_not_break_a_table(docs):
    assert docs.table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x/y |\n"
