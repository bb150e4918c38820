from __future__ import annotations

import pytest

from rayclust.config import RunConfig, known_keys, parse, validate
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
    "method.clusters=ten": ["method.clusters = 'ten'", "an integer"],
    "method.clusters=2.5": ["method.clusters = 2.5", "integer"],
    "method.clusters=some": ["method.clusters = 'some'", "auto", "[5, 8, 10]"],
    "method.clusters=[]": ["method.clusters = []", "no candidate"],
    "method.clusters=[0,5]": ["method.clusters = [0, 5]", "0 must be at least 2"],
    "method.clusters=[5,1]": ["method.clusters = [5, 1]", "1 must be at least 2"],
    "method.clusters=[5,8,5]": ["method.clusters = [5, 8, 5]", "5 more than once"],
    "method.clusters=[5,many]": ["method.clusters = [5, 'many']", "'many' is no integer"],
    "method.clusters=[5,7.5]": ["method.clusters = [5, 7.5]", "7.5 is no integer"],
    "select_k.candidates=auto": ["method.clusters = 10", "select_k.candidates = auto", "keep one"],
    "select_k.candidates=[2]": ["method.clusters = 10", "select_k.candidates = [2]", "keep one"],
    "select_k.least=1": ["select_k.least = 1", "greater than or equal to 2"],
    "select_k.most=1": ["select_k.most = 1", "select_k.least = 2"],
    "select_k.most=many": ["select_k.most = 'many'"],
    "select_k.seeds=0": ["select_k.seeds = 0"],
    "select_k.rule=best": ["select_k.rule = 'best'", "vote"],
    "select_k.rows=1": ["select_k.rows = 1"],
    "select_k.max_concurrent=0": ["select_k.max_concurrent = 0", "at least 1"],
    "select_k.gpus_per_trial=-1": ["select_k.gpus_per_trial = -1"],
    "select_k.cpus_per_trial=0": ["select_k.cpus_per_trial = 0"],
    "select_k.candidate=auto": ["select_k.candidate: unknown key", "did you mean candidates?"],
    "selectk.seeds=3": ["selectk: unknown key", "did you mean select_k?"],
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
    "resources.min_workers=0": ["resources.min_workers = 0", "greater than or equal to 1"],
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


OPEN = {
    "method.clusters=auto": "auto",
    "method.clusters=[5,8,10]": (5, 8, 10),
    "method.clusters=[10,5]": (5, 10),
    "method.clusters=[7]": (7,),
}


@pytest.mark.parametrize("override", OPEN)
def test_an_open_number_of_clusters_is_a_list_of_candidates_and_is_written_as_it_was_read(override: str):
    config = parse(GOOD, [override])
    assert config.is_open
    assert config.select_k.candidates == OPEN[override]
    for tree in (config.model_dump(mode="json", exclude_unset=True), config.model_dump(mode="json")):
        assert validate(tree).select_k == config.select_k
        assert validate(tree).method == config.method
    written = config.model_dump(mode="json", exclude_unset=True)
    assert written["method"]["clusters"] == (list(OPEN[override]) if override != "method.clusters=auto" else "auto")
    assert "select_k" not in written
    assert validate(written) == config


def test_candidates_may_be_given_under_either_key():
    without = GOOD.replace(", clusters: 10", "")
    assert parse(without, ["select_k.candidates=auto"]) == parse(GOOD, ["method.clusters=auto"])
    assert parse(without, ["select_k.candidates=[8,5]", "select_k.seeds=3"]) == parse(
        GOOD, ["method.clusters=[5,8]", "select_k.seeds=3"]
    )
    with pytest.raises(ConfigError, match=r"select_k\.candidates = 5: must be auto, or a list"):
        parse(without, ["select_k.candidates=5"])
    with pytest.raises(ConfigError, match=r"select_k\.candidates = auto: method\.clusters = \[5\] says it already"):
        parse(GOOD, ["select_k.candidates=auto", "method.clusters=[5]"])


def test_a_settled_config_is_the_one_with_the_number():
    settled = parse(GOOD, ["method.clusters=auto", "select_k.seeds=3", "method.heads=7"]).closed(12)
    assert settled == parse(GOOD, ["method.clusters=12", "select_k.seeds=3", "method.heads=7"])
    assert settled.method.model_fields_set == {"name", "clusters", "heads"}
    assert not settled.is_open


def test_the_schema_takes_what_the_reader_takes():
    clusters = RunConfig.model_json_schema()["$defs"]["TemiConfig"]["properties"]["clusters"]
    number = {"type": "integer", "minimum": 2}
    assert clusters["anyOf"][:2] == [number, {"const": "auto"}]
    assert clusters["anyOf"][2]["items"] == number


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


def test_the_fewest_workers_are_no_more_than_the_workers():
    assert parse(GOOD, ["resources.workers=4", "resources.min_workers=2"]).resources.min_workers == 2
    assert parse(GOOD, ["resources.min_workers=2"]).resources.workers == "auto"
    with pytest.raises(ConfigError, match=r"resources\.min_workers = 3: must be at most workers, 2"):
        parse(GOOD, ["resources.workers=2", "resources.min_workers=3"])
