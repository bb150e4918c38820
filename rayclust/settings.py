"""Base class of all groups of settings, options that clusterings and methods share, one-line messages of refusals.

Options of k-means, mixtures and spectral clustering stand here, apart from the arithmetic, so that a config is read
without torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator


class Config(BaseModel):
    """A frozen group of settings that refuses unknown keys.

    The string below each field is its description: meaning, unit or range, special values.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


def _with_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("should hold {} once, where the name goes")
    return template


Template = Annotated[str, AfterValidator(_with_place)]
"""A prompt around a name."""


Metric = Literal["cosine", "euclidean"]


class KMeansOptions(Config):
    """Settings of k-means."""

    clusters: int = Field(ge=1)
    """K."""
    metric: Metric = "cosine"
    """`cosine`: rows and centres are unit vectors (spherical k-means). `euclidean`: rows as given, centres means."""
    restarts: int = Field(10, ge=1)
    """Starts from different seeds; the one with the least inertia is kept. They share every pass over the rows."""
    max_iterations: int = Field(300, ge=1)
    """Most passes of one restart."""
    tolerance: float = Field(1e-4, ge=0)
    """A restart stops when the squared shift of its centres, summed, is at most this times the mean variance of a
    dimension; it always stops when no row changes cluster."""
    seeding_rows: int = Field(65_536, ge=1)
    """k-means++ sees all rows up to this many, else an evenly spread sample of this many (at least 32 per cluster)."""


class GmmOptions(Config):
    """Settings of a mixture."""

    clusters: int = Field(ge=1)
    """K, number of components."""
    covariance: Literal["diagonal", "spherical"] = "diagonal"
    """diagonal: a variance for each dimension of each component. spherical: one for each component."""
    regularization: float = Field(1e-6, ge=0)
    """Added to every variance."""
    restarts: int = Field(10, ge=1)
    """Starts of the k-means whose partition is the first estimate."""
    max_iterations: int = Field(100, ge=1)
    """Most passes over the rows."""
    tolerance: float = Field(1e-3, ge=0)
    """Rise of the mean log-likelihood, in nats per row, below which it stops."""


class SpectralOptions(Config):
    """Settings of spectral clustering."""

    temperature: float = Field(0.15, gt=0)
    """η: entropy of the membership; smaller looks at nearer rows only. Published: 0.15 after training."""
    half_steps: int | None = Field(None, ge=1)
    """Sinkhorn half-steps, an odd number (published: 5); None goes on until rows and columns sum to 1."""
    dense_rows: int = Field(15_000, ge=2)
    """Rows whose kernel is held at once, as float32: 900 MB at 15,000. Of more rows a sample of so many is solved, or
    all in tiles."""
    beyond: Literal["sample", "tiles"] = "sample"
    """What to do with more rows: `sample` solves for an evenly spread sample; `tiles` for all of them, exactly and in
    O(N) memory, making the kernel anew for each of some 30 products with it, N² · (width + K) operations each. The
    partition then keeps all codes, and assigning all rows costs one product more."""
    restarts: int = Field(10, ge=1)
    """Starts of the k-means of the eigenvectors' rows."""
    tolerance: float = Field(1e-5, gt=0)
    """Longest residual of an eigenvector, relative to the largest eigenvalue."""
    confidence: float = Field(0.1, gt=0)
    """Temperature of the probabilities when assigning, relative to the mean squared distance to the centres."""

    @field_validator("half_steps", "final_half_steps", check_fields=False)
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and value % 2 == 0:
            raise ValueError("must be odd, rows are normalised last")
        return value


def format_error(error: ValidationError, known: Sequence[str]) -> str:
    """Return the first error in one line: full key, value, bound, and for an unknown key the nearest known one.

    Args:
        error: of a config.
        known: all dotted keys.
    """
    problems: list[Any] = error.errors(include_url=False)
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path, kind, value = _path(problem), problem["type"], problem["input"]
    key, others = ".".join(path), len({tuple(_path(each)) for each in problems}) - 1
    more = f" (and {others} more)" if others else ""
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest_key(path, known)}{more}"
    if kind == "missing":
        return f"{key}: this key is required{more}"
    # Each branch of a union has a problem of its own: the value should be what one of them says.
    messages = list(dict.fromkeys(_message(each) for each in problems if _path(each) == path))
    message = ", or ".join([messages[0], *(each.removeprefix("should be ") for each in messages[1:])])
    if kind == "value_error" and isinstance(value, dict):  # a group's own check names the key below it
        return f"{key}.{message}{more}" if key else f"{message}{more}"
    shown = repr(value) if isinstance(value, str) else str(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{key} = {shown}: {message}{more}" if key else f"{shown}: {message}{more}"


def _path(problem: Any) -> list[str]:
    """Return the parts of the dotted key, without pydantic's names for the branches of unions."""
    branches = {"int", "str", "float", "bool"}
    is_key = (
        isinstance(p, int) or not ("[" in p or p in branches or p.startswith("constrained-")) for p in problem["loc"]
    )
    return [str(part) for part, kept in zip(problem["loc"], is_key, strict=True) if kept]


def _message(problem: Any) -> str:
    """Return what is wrong with a value, in the words of RUN.yaml."""
    kind: str = problem["type"]
    text: str = problem["msg"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a group of keys"
    if kind in ("tuple_type", "list_type"):
        return "should be a list, such as [a, b]"
    for start in ("Value error, ", "Input ", "String ", "Tuple "):
        text = text.removeprefix(start)
    return text.partition(", unable to parse")[0]


def _suggest_key(path: list[str], known: Sequence[str]) -> str:
    """Return a hint at the intended key: a similar one here, one of that name elsewhere, or all keys of the group."""
    prefix = "".join(part + "." for part in path[:-1])
    fields = sorted({key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)})
    elsewhere = [key for key in known if key.split(".")[-1] == path[-1]]
    if ".".join(path) in known:
        return "; only other methods have it"
    if (near := closest(path[-1], fields)) or not (elsewhere or fields):
        return near
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(fields)}"


def closest(word: str, words: Iterable[str]) -> str:
    """Return a hint at the word that a mistyped one most resembles, "" if none is near."""
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
