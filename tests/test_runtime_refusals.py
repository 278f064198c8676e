"""What every engine's language model refuses, each with an EngineError and without harm (edgeomni/components.py)."""

from __future__ import annotations

from typing import Any

import pytest
from engines_here import WITH_FAKE, every, matches, random_features, random_ids, truth

from edgeomni.components import Components, Features
from edgeomni.errors import EngineError
from edgeomni.model.omni import OmniModel
from edgeomni.runtimes import fake


@pytest.fixture
def llm(opened: dict[str, Components], request: pytest.FixtureRequest) -> Any:
    return opened[request.param].llm


@every("llm", WITH_FAKE)
def test_a_state_takes_exactly_its_frames(llm: Any, tiny_model: OmniModel) -> None:
    ids = random_ids(tiny_model, 5)
    for pieces in ([5], [4, 1], [1, 4]):
        state, at = llm.start(1, 5), 0
        for n in pieces:
            llm.forward(ids[:, :, at : at + n].copy(), (), state)
            at += n
        with pytest.raises(EngineError):
            llm.forward(ids[:, :, :1].copy(), (), state)
    with pytest.raises(EngineError):
        llm.forward(ids, (), llm.start(1, 4))
    state = llm.start(1, 5)
    llm.forward(ids[:, :, :3].copy(), (), state)
    with pytest.raises(EngineError):
        llm.forward(ids[:, :, :3].copy(), (), state)


@every("llm", WITH_FAKE)
def test_rows_are_those_that_are_active(llm: Any, tiny_model: OmniModel) -> None:
    one, two = random_ids(tiny_model, 1), random_ids(tiny_model, 1, rows=2)
    state = llm.start(2, 8)
    with pytest.raises(EngineError):
        llm.forward(two, (), state)
    llm.forward(one, (), state)
    llm.fork(state)
    with pytest.raises(EngineError):
        llm.forward(one, (), state)
    llm.forward(two, (), state)
    llm.drop(state, 1)
    with pytest.raises(EngineError):
        llm.forward(two, (), state)
    llm.forward(one, (), state)


@every("llm", WITH_FAKE)
def test_forks_need_room(llm: Any, tiny_model: OmniModel) -> None:
    single, double = llm.start(1, 8), llm.start(2, 8)
    for state in (single, double):
        llm.forward(random_ids(tiny_model, 1), (), state)
    with pytest.raises(EngineError):
        llm.fork(single)
    llm.fork(double)
    with pytest.raises(EngineError):
        llm.fork(double)


@every("llm", WITH_FAKE)
def test_only_the_last_row_can_be_dropped_and_never_row_0(llm: Any, tiny_model: OmniModel) -> None:
    state = llm.start(2, 8)
    llm.forward(random_ids(tiny_model, 1), (), state)
    for row in (-1, 0, 1):  # of one active row
        with pytest.raises(EngineError):
            llm.drop(state, row)
    llm.fork(state)
    for row in (-1, 0, 2):
        with pytest.raises(EngineError):
            llm.drop(state, row)
    llm.drop(state, 1)
    with pytest.raises(EngineError):
        llm.drop(state, 1)


@every("llm", WITH_FAKE)
@pytest.mark.parametrize(("start", "count"), [(-1, 2), (3, 2), (4, 1), (0, 5)])
def test_features_that_do_not_fit_are_refused(llm: Any, tiny_model: OmniModel, start: int, count: int) -> None:
    given = [Features(start, random_features(tiny_model, count))]
    with pytest.raises(EngineError):
        llm.forward(random_ids(tiny_model, 4), given, llm.start(1, 8))
    with pytest.raises(EngineError):  # the second of two
        llm.forward(random_ids(tiny_model, 4), [Features(0, random_features(tiny_model, 1)), *given], llm.start(1, 8))


@every("llm", WITH_FAKE)
@pytest.mark.parametrize("stream", [0, -2, -1])
def test_ids_without_a_row_are_refused(llm: Any, tiny_model: OmniModel, stream: int) -> None:
    for bad in (-1, tiny_model.spec.layout.joint_vocab):
        ids = random_ids(tiny_model, 3)
        ids[0, stream, 1] = bad
        with pytest.raises(EngineError):
            llm.forward(ids, (), llm.start(1, 8))


@every("llm", WITH_FAKE)
def test_ids_of_no_frames_are_refused(llm: Any, tiny_model: OmniModel) -> None:
    with pytest.raises(EngineError):
        llm.forward(random_ids(tiny_model, 0), (), llm.start(1, 8))


@every("llm", WITH_FAKE)
def test_an_error_leaves_the_engine_usable(llm: Any, tiny_model: OmniModel) -> None:
    ids, bad = random_ids(tiny_model, 3), random_ids(tiny_model, 3)
    bad[0, 0, 0] = -1
    with pytest.raises(EngineError):
        llm.forward(bad, (), llm.start(1, 3))
    hidden = llm.forward(ids, (), llm.start(1, 3))
    if not isinstance(llm, fake.FakeLanguageModel):
        matches(llm, hidden, 0, truth(tiny_model, ids))
