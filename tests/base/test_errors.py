from __future__ import annotations

import pickle
from collections import Counter

import pytest

from orchestrator.base import errors
from orchestrator.base.errors import OrchestratorError, StoreError, error_classes
from orchestrator.stores import store as stores

STORE_SUBCLASSES = {stores.ObjectExistsError, stores.ObjectMissingError, stores.ObjectChangedError, stores.NoSuchUploadError}
CLASSES = sorted(error_classes().values(), key=lambda cls: cls.__name__)
by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def test_exit_codes_every_situation_has_its_own() -> None:
    codes = Counter(cls.exit_code for cls in CLASSES if cls not in STORE_SUBCLASSES)
    assert [code for code, count in codes.items() if count > 1] == []


def test_exit_codes_store_subclasses_share_that_of_the_store() -> None:
    assert {cls.exit_code for cls in STORE_SUBCLASSES} == {StoreError.exit_code}


@by_class
def test_exit_codes_are_neither_success_nor_wrong_usage_nor_a_bug(cls: type[OrchestratorError]) -> None:
    reserved = {0, 2} if cls is OrchestratorError else {0, 1, 2}
    assert cls.exit_code not in reserved
    assert 0 < cls.exit_code < 256


@by_class
def test_error_says_what_it_stands_for(cls: type[OrchestratorError]) -> None:
    assert (cls.__doc__ or "").strip().endswith(".")


@by_class
def test_pickle_message_and_advice_survive(cls: type[OrchestratorError]) -> None:
    back = pickle.loads(pickle.dumps(cls("what is wrong", "what to do")))
    assert type(back) is cls
    assert (str(back), back.message, back.advice) == ("what is wrong", "what is wrong", "what to do")


@by_class
def test_advice_of_its_own_wins_over_the_default(cls: type[OrchestratorError]) -> None:
    assert cls("m").advice == cls.default_advice
    assert cls("m", "mine").advice == "mine"


def test_error_classes_holds_every_class_of_the_module() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, OrchestratorError)}
    assert defined <= set(error_classes())
    assert {cls.__name__ for cls in STORE_SUBCLASSES} <= set(error_classes())
    assert all(name == cls.__name__ for name, cls in error_classes().items())
