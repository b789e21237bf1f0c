"""What an operator promises, such as `p95<3s,errors<0.1%`, and whether a run kept it.

Terms stand between commas: a measure, `<` or `>`, a number and its unit.

    p50 .. p99.9, mean, max     latency of answered requests, from when they were due; s or ms
    errors                      share of all requests that failed or were refused; %
    refused                     share that was refused because the queue was full; %
    late                        share that the generator sent late; %
    throughput, goodput         answers a second, and those within the latency bounds and the requests' own timeouts; /s
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from diffuserve.errors import DiffuserveError

_TERM = re.compile(
    r"(?P<measure>[a-z]+|p\d{1,2}(?:\.\d+)?)\s*(?P<sign>[<>])\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>\S*)"
)
_LATENCIES = ("mean", "max")
_SHARES = ("errors", "refused", "late")
_RATES = ("throughput", "goodput")
_FACTOR = {"s": 1.0, "ms": 0.001, "%": 0.01, "/s": 1.0}


class SloError(DiffuserveError):
    """A term that says nothing."""

    code = "slo_error"


class Term(msgspec.Struct, frozen=True):
    """`bound` is in seconds, a share of 1, or a rate a second."""

    measure: str
    sign: Literal["<", ">"]
    bound: float
    text: str

    @property
    def is_share(self) -> bool:
        return self.measure in _SHARES

    @property
    def is_latency(self) -> bool:
        return self.measure in _LATENCIES or self.measure.startswith("p")

    def kept_by(self, value: float | None) -> bool:
        """Not by None, which stands for the latency of a run in which nothing was answered."""
        if value is None:
            return False
        return value < self.bound if self.sign == "<" else value > self.bound


class Verdict(msgspec.Struct, frozen=True):
    """One term and what was measured, in the same unit as its bound."""

    term: Term
    value: float | None
    kept: bool

    @property
    def words(self) -> str:
        """The value in the term's unit."""
        if self.value is None:
            return "nothing was answered"
        if self.term.is_share:
            return f"{self.value:.2%}"
        return f"{self.value:.3g} s" if self.term.is_latency else f"{self.value:.3g}/s"


class Slo(msgspec.Struct, frozen=True):
    """All terms, which must all be kept."""

    terms: tuple[Term, ...] = ()

    @property
    def latency_bound_s(self) -> float | None:
        """The largest latency that a term allows, which an answer must not exceed to count as goodput."""
        bounds = [term.bound for term in self.terms if term.is_latency and term.sign == "<"]
        return max(bounds, default=None)

    def judge(self, values: Mapping[str, float | None]) -> list[Verdict]:
        """`values`: by measure."""
        return [Verdict(term, values[term.measure], term.kept_by(values[term.measure])) for term in self.terms]


def slo_from_text(text: str) -> Slo:
    """Raises `SloError`: a term that cannot be read, or whose unit is not its measure's."""
    return Slo(tuple(_term(part.strip()) for part in text.split(",") if part.strip()))


def _term(text: str) -> Term:
    match = _TERM.fullmatch(text)
    if match is None:
        raise SloError(f"{text!r} is not a term of an SLO; terms are like p95<3s, errors<0.1% or goodput>1.5/s.")
    measure, unit = match["measure"], match["unit"]
    is_latency = measure in _LATENCIES or bool(re.fullmatch(r"p\d.*", measure))
    if not is_latency and measure not in (*_SHARES, *_RATES):
        known = ", ".join(("p50 .. p99.9", *_LATENCIES, *_SHARES, *_RATES))
        raise SloError(f"{text!r} measures {measure!r}; there are {known}.")
    units = ("s", "ms") if is_latency else ("%",) if measure in _SHARES else ("/s",)
    if unit not in units:
        raise SloError(f"{text!r} has the unit {unit!r}; {measure} is in {' or '.join(units)}.")
    sign: Literal["<", ">"] = "<" if match["sign"] == "<" else ">"
    return Term(measure, sign, float(match["number"]) * _FACTOR[unit], text)
