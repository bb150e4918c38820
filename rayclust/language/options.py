"""How clusters are to be named."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayclust.options import Config


class LabelConfig(Config):
    """Names for clusters."""

    vocabulary: str | tuple[str, ...] = "auto"
    """auto | none | imagenet | wordnet | classes | a text file or URI, one name a line | a parquet of words with
    embeddings; or a list of them, in which equal names count once.

    `auto` is ImageNet's names when the encoder reads text, else none. `classes` are the true names of the run's labels:
    what is named by them says so, and beside other lists every cluster is named without them as well.
    """
    templates: tuple[str, ...] = ("a photo of a {}",)
    """Prompts around each name; their embeddings are averaged."""
    scale: float = Field(100, gt=0)
    """What cosines between images and words are multiplied by before the softmax; CLIP's own is 100."""
    space: Literal["auto", "encoder", "features"] = "auto"
    """Where images meet words: the encoder's unit rows, or what `features` makes of them. auto: features for words that
    come with embeddings, else encoder."""
    unique: bool = False
    """Whether no two clusters may get one name."""
    voters: int | Literal["auto", "all"] = "auto"
    """Images per cluster that vote, a seeded sample. auto: all of them for up to 5,000 words, else 300."""
    runners_up: int = Field(5, ge=0, le=100)
    """Next best names kept per cluster."""
    exemplars: int = Field(12, ge=0, le=200)
    """Most typical images kept per cluster."""
    outliers: int = Field(6, ge=0, le=200)
    """Least certain images kept per cluster."""

    @property
    def lists(self) -> tuple[str, ...]:
        """The lists of names that `vocabulary` gives."""
        return (self.vocabulary,) if isinstance(self.vocabulary, str) else self.vocabulary

    @model_validator(mode="after")
    def _consistent(self) -> LabelConfig:
        if isinstance(self.vocabulary, tuple):
            alone = [name for name in self.vocabulary if name in ("auto", "none")]
            if alone or not self.vocabulary:
                given = f"[{', '.join(self.vocabulary)}]"
                raise ValueError(f"vocabulary = {given}: a list needs at least one name, and neither auto nor none")
        if isinstance(self.voters, int) and self.voters < 1:
            raise ValueError(f"voters = {self.voters}: must be at least 1, all or auto")
        return self
