"""Method names: parsing, options and their owners."""

from __future__ import annotations

from typing import Any

import pytest

from evenbits.algorithms.rtn import rtn
from evenbits.algorithms.smoothquant import smoothquant
from evenbits.errors import EvenbitsError
from evenbits.pipeline.methods import Methods
from evenbits.schemes.scheme import resolve


def test_a_weight_method_alone_has_no_balance() -> None:
    methods = Methods.parse("rtn", {})
    assert methods.weight is rtn and methods.balance is None and methods.balance_options == {}


@pytest.mark.parametrize("name", ["smoothquant", "smoothquant+rtn", "rtn+smoothquant"])
def test_a_balance_method_is_followed_by_rtn(name: str) -> None:
    methods = Methods.parse(name, {"alpha": 0.7})
    assert methods.weight is rtn and methods.balance is smoothquant
    assert methods.balance_options == {"alpha": 0.7} and methods.weight_options == {}
    assert methods.name == name and methods.options == {"alpha": 0.7}


@pytest.mark.parametrize(
    ("name", "nearest"), [("smothquant", "smoothquant"), ("rnt", "rtn"), ("smoothquant+rtm", "rtn")]
)
def test_an_unknown_method_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(EvenbitsError, match=f"Did you mean '{nearest}'"):
        Methods.parse(name, {})


@pytest.mark.parametrize("name", ["", "+", "rtn+", " rtn", "RTN"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(EvenbitsError, match="unknown method"):
        Methods.parse(name, {})


@pytest.mark.parametrize("name", ["rtn+rtn", "smoothquant+smoothquant"])
def test_two_methods_of_one_kind_are_refused(name: str) -> None:
    with pytest.raises(EvenbitsError, match="names two"):
        Methods.parse(name, {})


@pytest.mark.parametrize("name", [None, 3, ["rtn"], b"rtn"])
def test_a_method_is_named_by_a_string(name: Any) -> None:
    with pytest.raises(EvenbitsError, match="named by a string"):
        Methods.parse(name, {})


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(EvenbitsError, match=r"'alfa'.*Did you mean 'alpha'"):
        Methods.parse("smoothquant", {"alfa": 0.5})


@pytest.mark.parametrize("option", ["alpha", "loss", "fmt", "stats"])
def test_an_option_of_another_method_or_an_internal_one_is_refused(option: str) -> None:
    with pytest.raises(EvenbitsError, match=f"'{option}'"):
        Methods.parse("rtn", {option: 1})


def test_loss_is_the_pipelines_own_and_no_option() -> None:
    with pytest.raises(EvenbitsError, match="'loss'"):
        Methods.parse("smoothquant", {"loss": None})


@pytest.mark.parametrize("option", [{"criterion": "max"}, {"scope": "block"}, {"sequential": True}], ids=str)
@pytest.mark.parametrize("alpha", [{}, {"alpha": 0.5}], ids=["default", "0.5"])
def test_options_of_the_search_need_a_search(option: dict[str, Any], alpha: dict[str, Any]) -> None:
    with pytest.raises(EvenbitsError, match=f"'{next(iter(option))}' says how α is searched, and here α is 0.5"):
        Methods.parse("smoothquant", {**alpha, **option})
    assert Methods.parse("smoothquant", {"alpha": "auto", **option}).options == {"alpha": "auto", **option}


@pytest.mark.parametrize("option", [{"policy": "hardware"}, {"weighted": False}], ids=str)
def test_options_of_pairs_need_pairs(option: dict[str, Any]) -> None:
    Methods.parse("by_format", option, resolve({"weights": "ovp4:row", "input_activations": "int8:row"}))
    with pytest.raises(EvenbitsError, match=f"'{next(iter(option))}' is for layers of outlier-victim pairs"):
        Methods.parse("by_format", option, resolve("W8A8"))
    for default in ({}, {"policy": None}, {"weighted": True}):
        Methods.parse("by_format", default, resolve("W8A8"))
