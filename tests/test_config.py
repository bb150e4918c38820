from __future__ import annotations

import pytest

from rayclust.config import RunConfig, known_keys, parse
from rayclust.errors import ConfigError

GOOD = """
run: runs/photos
images: {uri: photos}
encoder: {name: pixels}
method: {name: temi, clusters: 10}
"""


def test_a_short_file_is_enough_and_overrides_win():
    config = parse(GOOD, ["method.clusters=20", "seed=3", "features.center=true", "images.max_reject_share=0.5"])
    assert (config.method.clusters, config.seed, config.features.center) == (20, 3, True)
    assert config.images.max_reject_share == 0.5


def test_an_override_reaches_a_group_that_the_file_does_not_name():
    assert parse(GOOD, ["resources.workers=4"]).resources.workers == 4


def test_numbers_in_scientific_notation_are_numbers():
    assert parse(GOOD, ["method.learning_rate=1e-3"]).method.learning_rate == 1e-3


def test_the_tree_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse(GOOD).seed = 1


BAD_FILES = {
    "empty": ("", "mapping"),
    "a list": ("- a\n- b\n", "mapping"),
    "a scalar": ("42", "mapping"),
    "unclosed bracket": ("run: [1, 2", "line"),
    "tab as indent": ("run: x\n\timages: y", "line 2"),
    "key twice": (GOOD + "seed: 1\nseed: 2\n", "seed is given twice"),
    "key that is a number": (GOOD + "7: 1\n", "not text"),
    "python object": ("run: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "no run": (GOOD.replace("run: runs/photos", ""), "run: this key is required"),
    "no images": (GOOD.replace("images: {uri: photos}", ""), "images: this key is required"),
    "no uri": (GOOD.replace("uri: photos", "format: auto"), "images.uri: this key is required"),
    "no method": (GOOD.replace("method: {name: temi, clusters: 10}", ""), "method: this key is required"),
    "method without a name": (GOOD.replace("name: temi, ", ""), "method.name"),
    "unclosed quote": ('run: "abc', "line"),
    "binary": ("\x00\x01", "not allowed"),
    "empty run": (GOOD.replace("runs/photos", "''"), "run = ''"),
    "run is a list": (GOOD.replace("runs/photos", "[a]"), "run ="),
    "images is text": (GOOD.replace("{uri: photos}", "photos"), "images = 'photos'"),
    "anchors without end": ("a: &a [*a]", "a"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_line(name):
    text, wanted = BAD_FILES[name]
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert wanted in message


BAD_VALUES = {
    "method.clusters=1": ["method.clusters = 1", "greater than or equal to 2"],
    "method.clusters=ten": ["method.clusters = 'ten'", "integer"],
    "method.clusters=2.5": ["method.clusters = 2.5", "integer"],
    "method.clusters=auto": ["method.clusters = auto", "select-k"],
    "method.clusters=[5,10]": ["method.clusters = [5, 10]", "select-k"],
    "method.clustrs=5": ["method.clustrs: unknown key", "did you mean clusters?"],
    "method.name=temmi": ["method.name = 'temmi'", "must be one of", "did you mean temi?"],
    "method.beta=0": ["method.beta = 0", "greater than 0"],
    "method.batch_size=many": ["method.batch_size = 'many'"],
    "seed=-1": ["seed = -1", "greater than or equal to 0"],
    "seed=abc": ["seed = 'abc'"],
    "sead=1": ["sead: unknown key", "did you mean seed?"],
    "images.ur=x": ["images.ur: unknown key", "did you mean uri?"],
    "images.format=tar": ["images.format = 'tar'", "webdataset"],
    "images.shard_size=0": ["images.shard_size = 0"],
    "images.max_reject_share=2": ["images.max_reject_share = 2", "less than or equal to 1"],
    "images.max_reject_share=.nan": ["images.max_reject_share = nan", "finite"],
    "images.max_pixels=-5": ["images.max_pixels = -5"],
    "features.center=perhaps": ["features.center = 'perhaps'"],
    "features.centre=true": ["features.centre: unknown key", "did you mean center?"],
    "neighbors.k=0": ["neighbors.k = 0"],
    "neighbors.k=1e9": ["neighbors.k ="],
    "neighbors.method=hnsw": ["neighbors.method = 'hnsw'"],
    "resources.workers=0": ["workers = 0", "at least 1"],
    "resources.gpus_per_worker=-1": ["resources.gpus_per_worker = -1"],
    "resources.gpus=1": ["resources.gpus: unknown key", "gpus_per_worker"],
    "clusters=5": ["clusters: unknown key", "method.clusters"],
    "epochs=5": ["epochs: unknown key", "method.epochs"],
    "encoder.image_size=-3": ["encoder.image_size = -3"],
    "label.exemplars=-1": ["label.exemplars = -1"],
    "report.thumbnail=1": ["report.thumbnail = 1"],
    "method.learning_rate=0": ["method.learning_rate = 0"],
    "method.heads=0": ["method.heads = 0"],
    "method.preset=best": ["method.preset = 'best'", "auto"],
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_bad_value_names_key_value_and_bound(override):
    with pytest.raises(ConfigError) as caught:
        parse(GOOD, [override])
    message = str(caught.value)
    assert "\n" not in message
    for wanted in BAD_VALUES[override]:
        assert wanted in message, message


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", ".=1", "seed=[1,"])
def test_a_bad_override_says_how_to_write_one(override):
    with pytest.raises(ConfigError, match="override"):
        parse(GOOD, [override])


def test_several_problems_are_counted_in_the_one_line():
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        parse(GOOD, ["seed=-1", "neighbors.k=0"])


def test_every_key_has_a_description_in_the_schema():
    schema = RunConfig.model_json_schema()
    described = [
        (name, key)
        for name, definition in schema["$defs"].items()
        for key, field in definition.get("properties", {}).items()
        if "description" not in field and "$ref" not in field and "const" not in field
    ]
    assert described == []
    assert {"run", "images.uri", "method.clusters", "method.beta", "resources.workers"} <= set(known_keys())
