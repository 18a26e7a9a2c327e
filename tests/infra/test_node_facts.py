"""Nodes of the cluster whose code or packages differ from the driver's."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipelines import node_facts
from pipelines.node_facts import NodeFacts, check_same_versions, differences, facts_of_this_node, is_fatal

OWN = facts_of_this_node()({}, False)["versions"]


def answers(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    monkeypatch.setattr(node_facts, "ask_nodes", lambda: [NodeFacts("a", versions=OWN), NodeFacts("b", **facts)])


def test_node_says_its_own_versions_and_code() -> None:
    assert {"torch", "ray", "code"} <= OWN.keys()
    assert differences(OWN, OWN) == {}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"torch": "2.1.0"}, r"node b of the Ray cluster has torch 2\.1\.0, this process .*: install torch=="),
        ({"torch": None}, r"node b of the Ray cluster has torch none"),
        (
            {"code": "0" * 12},
            r"node b of the Ray cluster has code 000000000000, .*: start its workers with the driver's code",
        ),
    ],
)
def test_other_torch_or_code_is_refused(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], line: str) -> None:
    versions = {name: value for name, value in {**OWN, **changed}.items() if value is not None}
    answers(monkeypatch, versions=versions)
    with pytest.raises(ValueError, match=line):
        check_same_versions()


def test_other_patch_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    patch = ".".join([*OWN["torch"].split(".")[:2], "99"])
    answers(monkeypatch, versions={**OWN, "torch": patch})
    with caplog.at_level(logging.WARNING):
        check_same_versions()
    assert f"node b of the Ray cluster has torch {patch}, this process {OWN['torch']}" in caplog.text
    assert not is_fatal("ray", "1.0", "2.0"), "Ray compares itself when a node joins"


def test_node_that_has_just_died_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    answers(monkeypatch, error="the node doesn't exist any more")
    with caplog.at_level(logging.WARNING):
        check_same_versions()
    assert "node b of the Ray cluster cannot run a task: the node doesn't exist" in caplog.text
    answers(monkeypatch, error="Failed to set up runtime environment: no pip in the runtime_env")
    with pytest.raises(ValueError, match="correct the job's runtime_env"):
        check_same_versions()
