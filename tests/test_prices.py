from __future__ import annotations

import pytest

from rayclust.config import NodePrice, parse
from rayclust.errors import ConfigError

GOOD = "run: s3://b/r\nimages: {uri: s3://b/i}\nmethod: {name: kmeans, clusters: 2}\n"


def test_kinds_of_nodes_are_named_by_whoever_pays():
    config = parse(GOOD, ["prices.spot={dollars_per_hour: 0.5, cpus: 16, gpus: 1}"])
    assert config.prices == {"spot": NodePrice(dollars_per_hour=0.5, cpus=16, gpus=1)}
    assert parse(GOOD).prices == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prices.spot={cpus: 16}", "prices.spot.dollars_per_hour: this key is required"),
        ("prices.spot={dollars_per_hour: -1, cpus: 16}", "prices.spot.dollars_per_hour = -1"),
        ("prices.spot={dollars_per_hour: 1, cpus: 0}", "prices.spot.cpus = 0"),
        ("prices.spot={dollars_per_hour: 1, cpus: 1, cores: 1}", "prices.spot.cores: unknown key"),
    ],
)
def test_an_impossible_price_is_one_line(override: str, words: str):
    with pytest.raises(ConfigError) as caught:
        parse(GOOD, [override])
    assert str(caught.value).startswith(words)
