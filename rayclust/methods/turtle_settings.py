"""Settings of TURTLE (arXiv 2406.07236) and its presets, to be read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayclust.methods.settings import BaseMethodConfig
from rayclust.settings import Config

AUTO_STEPS, AUTO_BATCH, AUTO_SEEDS, AUTO_COMPONENTS, AUTO_OUTER_RATE = 300, 1_000, 5, 64, 0.25
"""The last relative to η_in."""
PUBLISHED_RATE, PUBLISHED_WIDTH = 1e-3, 768
"""M steps of Adam move a logit by at most M η_in ‖z‖₁, in proportion to η_in d: `auto` keeps that of CLIP ViT-L/14."""


class TurtleSetting(Config):
    """What is to be tried: the loss of the labels depends on how far M steps of a classifier lead."""

    inner_rate: float = Field(PUBLISHED_RATE, gt=0)
    """η_in, Adam's rate for the classifiers."""
    outer_rate: float = Field(PUBLISHED_RATE, gt=0)
    """η_out, Adam's rate for the labels."""
    start: Literal["cold", "warm"] = "cold"
    """cold: classifiers start anew in each outer step. warm: they go on from the last one."""


class TurtleConfig(TurtleSetting, BaseMethodConfig):
    """TURTLE (arXiv 2406.07236): labels of maximal margin. A key that is written wins over the preset."""

    name: Literal["turtle"] = "turtle"
    """Labels that linear classifiers learn best, in one or several spaces."""
    preset: Literal["auto", "published"] = "auto"
    """auto: chosen from N, D and K without labels, and seconds on a CPU. published: the defaults below."""
    gamma: float = Field(10.0, ge=0)
    """γ, on the entropy of the clusters' shares in each space."""
    steps: int = Field(6_000, ge=1)
    """T, outer steps."""
    inner_steps: int = Field(10, ge=0)
    """M, steps of the classifiers in each outer step."""
    batch_size: int = Field(10_000, ge=2)
    """B, rows an outer step over all workers, drawn anew each time; a smaller set is taken whole."""
    sweep: tuple[TurtleSetting, ...] = ()
    """Settings to try instead of `inner_rate`, `outer_rate` and `start`; all run at once, and the score chooses."""
    seeds: int = Field(1, ge=1)
    """Starts of each setting; they run at once as well."""
    labels: Literal["softmax", "sparsemax"] = "softmax"
    """Map from logits to labels; sparsemax as in PET-TURTLE."""
    prior: Literal["uniform"] | Annotated[float, Field(ge=0)] = "uniform"
    """uniform: minus the entropy of the shares. A number α: KL from the shares Π_k ∝ k^−α, largest to largest, as in
    PET-TURTLE, for uneven classes; its γ is 25 at K = 10."""
    scale: Literal["auto", "published"] = "published"
    """published: rows as they come, which should be as the encoder gives them. auto: each space is centred and its
    components have mean square 1, without which classifiers of unit rows hardly leave their start."""
    components: int | None = Field(None, ge=1)
    """Principal components kept of each space, with `scale: auto`, turned at random so that each has the same variance:
    Adam moves all by the same. None keeps the axes as they are."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> TurtleConfig:
        for name, field in TurtleSetting.model_fields.items() if self.sweep else ():
            if (value := getattr(self, name)) != field.default:
                raise ValueError(f"{name} = {value}: sweep holds the settings, write it there")
        is_raw = self.scale == "published" and (self.preset == "published" or "scale" in self.model_fields_set)
        if self.components is not None and is_raw:
            raise ValueError(f"components = {self.components}: rows are taken as they come, set scale: auto")
        return self

    def resolved(self, count: int, dimensions: Sequence[int]) -> TurtleConfig:
        """Return this config with its preset written out; `preset` is then `published`.

        Args:
            count: N.
            dimensions: D of each space.
        """
        written = {key: getattr(self, key) for key in self.model_fields_set}
        chosen: dict[str, Any] = {}
        if self.preset == "auto":
            chosen = {"scale": "auto"} | written
            if chosen["scale"] == "auto" and "components" not in written:
                chosen["components"] = max(AUTO_COMPONENTS, 2 * self.clusters)
            widths = [min(chosen.get("components") or width, width, count - 1) for width in dimensions]
            rate = PUBLISHED_RATE * PUBLISHED_WIDTH / (sum(widths) / len(widths))
            rates = {} if self.sweep else {"inner_rate": rate, "outer_rate": AUTO_OUTER_RATE * rate}
            batch = max(AUTO_BATCH, 20 * self.clusters)
            chosen = {"steps": AUTO_STEPS, "batch_size": batch, "seeds": AUTO_SEEDS} | rates | chosen
        return TurtleConfig.model_validate(chosen | written | {"preset": "published"})

    def runs(self) -> list[tuple[TurtleSetting, int]]:
        """Return setting and number of the start of each of R runs."""
        alone = TurtleSetting.model_validate(self.model_dump(include=set(TurtleSetting.model_fields)))
        return [(setting, start) for setting in self.sweep or (alone,) for start in range(self.seeds)]

    def describe_plan(self, count: int, dimension: int, workers: int, device: str = "cpu") -> str:
        """Describe the fit in a line; see `BaseMethodConfig`."""
        config = self.resolved(count, [dimension])
        batch, runs = min(config.batch_size, count), len(config.runs())
        width = min(config.components or dimension, dimension)
        operations = batch * self.clusters * runs * width * (4 * config.inner_steps + 6) * config.steps
        return f"{runs} runs at once: {config.steps:,} steps of {batch:,} rows, {operations / 1e12:.3g} TFLOP"
