from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from rayclust.config import (
    NodePrice,
    PlacementConfig,
    ResourcesConfig,
    Rule,
    RunConfig,
    SelectKConfig,
    denormalize_clusters,
    known_keys,
    normalize_clusters,
    parse,
    validate,
)
from rayclust.errors import ConfigError
from rayclust.metrics.selection import CRITERIA, RULES, geometric_grid
from tests.stages.runs import tree

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
    "unclosed quote": ('run: "abc', "line"),
    "binary": ("\x00\x01", "not allowed"),
    "empty run": (GOOD.replace("runs/photos", "''"), "run = ''"),
    "run is a list": (GOOD.replace("runs/photos", "[a]"), "run ="),
    "images is text": (GOOD.replace("{uri: photos}", "photos"), "images = 'photos'"),
    "anchors without end": ("a: &a [*a]", "a"),
    "nested without end": ("run: " + "[" * 1200, "nested too deeply"),
    "a table": ("PAR1\x00\x15", "a RUN.yaml is text in UTF-8"),
    "a group that is a list": (GOOD + "features: [center]\n", "features = ['center']: should be a group of keys"),
    "an empty group": (GOOD + "features:\n", "features = None: should be a group of keys"),
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
    "resources.rows=cells": ["resources.rows = cells: was removed", "a seeded hundredth"],
    "resources.rows=whole": ["resources.rows = whole: was removed"],
    "resources.gpus=1": ["resources.gpus: unknown key", "gpus_per_worker"],
    "clusters=5": ["clusters: unknown key", "method.clusters"],
    "epochs=5": ["epochs: unknown key", "method.epochs"],
    "encoder.image_size=-3": ["encoder.image_size = -3"],
    "label.exemplars=-1": ["label.exemplars = -1"],
    "label.voters=some": ["label.voters = 'some': should be a valid integer, or 'auto' or 'all'"],
    "label.templates=['no place']": ["label.templates.0 = 'no place'", "should hold {} once"],
    "label.templates=[]": ["label.templates = []", "at least 1"],
    "images.split=0": ["images.split = 0: should be greater than 0, or a valid string, or a list"],
    "images.split=[]": ["images.split = []"],
    "assign.levels=[3,5]": ["assign.levels = [3, 5]", "should fall"],
    "assign.levels=[30,5]": ["assign.levels = [30, 5]", "at most method.clusters, 10"],
    "assign.levels=[1]": ["assign.levels.0 = 1", "greater than or equal to 2"],
    "curate.duplicates.epsilon=0.01": ["curate.duplicates: has no effect without a preset"],
    "curate={preset: list, sample: {rows: 9, levels: [5, 10]}}": ["curate.sample.levels = [5, 10]", "should fall"],
    "method.vocabulary=words.txt": ["method.vocabulary: unknown key; only other methods have it"],
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
    assert config.needs_selection
    assert config.select_k.candidates == OPEN[override]
    for dumped in (config.model_dump(mode="json", exclude_unset=True), config.model_dump(mode="json")):
        assert validate(dumped).select_k == config.select_k
        assert validate(dumped).method == config.method
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


def test_a_config_with_its_number_is_the_one_with_the_number():
    chosen = parse(GOOD, ["method.clusters=auto", "select_k.seeds=3", "method.heads=7"]).with_clusters(12)
    assert chosen == parse(GOOD, ["method.clusters=12", "select_k.seeds=3", "method.heads=7"])
    assert chosen.method.model_fields_set == {"name", "clusters", "heads"}
    assert not chosen.needs_selection


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


def test_every_rule_that_choices_are_made_by_can_be_asked_for():
    assert set(get_args(Rule)) == {*RULES, *CRITERIA}


def test_auto_tries_up_to_twice_the_root_of_the_rows():
    config = SelectKConfig(candidates="auto")
    assert [config.bounds(rows)[1] for rows in (2, 3, 100, 1797, 10_000)] == [2, 3, 20, 85, 200]
    assert SelectKConfig(candidates="auto", most=50).bounds(10_000) == (2, 50)
    assert SelectKConfig(candidates="auto", most=50).bounds(30) == (2, 30)
    assert SelectKConfig(candidates="auto", least=20).bounds(25) == (20, 20)
    assert SelectKConfig(candidates=(5, 80)).bounds(1_000_000) == (5, 80)


def test_auto_begins_with_a_grid():
    for least, most in ((4, 40), (2, 100), (2, 1000)):
        grid = geometric_grid(*SelectKConfig(candidates="auto", least=least, most=most).bounds(10_000))
        assert (grid[0], grid[-1]) == (least, most)
        assert all(1 < b / a <= 1.5 + 1 / a for a, b in itertools.pairwise(grid))
        assert len(grid) < 18
    assert geometric_grid(*SelectKConfig(candidates="auto").bounds(2)) == (2,)


TREES: dict[str, dict[str, Any]] = {
    "a number": {"method": {"name": "kmeans", "clusters": 4}},
    "a number as text": {"method": {"clusters": "4"}},
    "no number": {"method": {"name": "kmeans"}},
    "a method that is none": {"method": "kmeans"},
    "a group that is none": {"method": {"clusters": "auto"}, "select_k": 3},
    "nothing": {},
}


@pytest.mark.parametrize("name", TREES)
def test_what_leaves_nothing_open_is_left_as_it_is(name: str):
    assert normalize_clusters(TREES[name]) == TREES[name]


def test_a_number_is_written_as_it_is():
    written = {"method": {"clusters": 4}, "select_k": {"seeds": 3}}
    assert denormalize_clusters(written) == written


def test_candidates_are_sorted_and_stood_in_for_by_their_largest():
    written = {"method": {"name": "kmeans", "clusters": [9, 3]}, "seed": 1}
    read = normalize_clusters(written)
    assert read == {
        "method": {"name": "kmeans", "clusters": 9},
        "select_k": {"candidates": (3, 9)},
        "seed": 1,
    }
    assert written["method"] == {"name": "kmeans", "clusters": [9, 3]}, "the tree given was changed"
    assert denormalize_clusters(read) == {"method": {"name": "kmeans", "clusters": [3, 9]}, "seed": 1}


def test_other_settings_of_the_group_stay():
    written = {"method": {"clusters": "auto"}, "select_k": {"seeds": 5}}
    assert denormalize_clusters(normalize_clusters(written)) == written


def test_the_stability_of_one_fit_cannot_choose():
    with pytest.raises(ValueError, match=r"rule = stability: needs select_k\.seeds of at least 2"):
        SelectKConfig(rule="stability", seeds=1)


def test_by_default_any_node_will_do():
    assert all(getattr(PlacementConfig(), name) == {} for name in PlacementConfig.model_fields)


@pytest.mark.parametrize(
    "labels", [{"pool": ""}, {"": "cpu"}, {"po ol": "cpu"}, {"pool": "in(a, b)"}, {"pool": "!cpu"}]
)
def test_what_no_node_can_carry_is_refused(labels: dict[str, str]):
    with pytest.raises(ConfigError, match=r"resources\.placement\.decode"):
        validate(tree("/run", "/images", resources={"placement": {"decode": labels}}))


def test_an_unknown_kind_of_work_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"resources\.placement\.decoder.*decode"):
        validate(tree("/run", "/images", resources={"placement": {"decoder": {"pool": "cpu"}}}))


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


TEXTS = {
    "run=s3://bucket/runs/try #2": ("run", "s3://bucket/runs/try #2"),
    "run=2024": ("run", "2024"),
    "run=a: b": ("run", "a: b"),
    "run=[1": ("run", "[1"),
    "run='quoted # text'": ("run", "quoted # text"),
    "images.uri=/data/set #1": ("images.uri", "/data/set #1"),
    "images.uri=*.jpg": ("images.uri", "*.jpg"),
    "images.uri=%x": ("images.uri", "%x"),
    "images.uri={a}": ("images.uri", "{a}"),
    "images.labels=no": ("images.labels", "no"),
    "images.classes=@list #3.txt": ("images.classes", "@list #3.txt"),
    "images.classes=[cat, no, dog]": ("images.classes", ("cat", "no", "dog")),
    "label.vocabulary=- a": ("label.vocabulary", "- a"),
    "encoder.pretrained=null": ("encoder.pretrained", None),
    "encoder=pixels": ("encoder.name", "pixels"),
    "tracking.project=#1": ("tracking.project", "#1"),
    "resources.placement.train.pool=on": ("resources.placement.train", {"pool": "on"}),
    "method.clusters=010": ("method.clusters", 10),
    "method.clusters=0o17": ("method.clusters", 15),
    "method.tolerance=1e-3": ("method.tolerance", 1e-3),
    "features.center=no": ("features.center", False),
    "resources.workers=auto": ("resources.workers", "auto"),
    "seed=1_000": ("seed", 1000),
}


@pytest.mark.parametrize("override", TEXTS)
def test_text_is_taken_as_it_is_given_and_other_values_as_yaml_1_2(override: str):
    key, wanted = TEXTS[override]
    found: Any = parse("run: /r\nimages: {uri: /i}\nmethod: {name: kmeans, clusters: 2}\n", [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == wanted


def test_numbers_of_yaml_1_1_are_decimal_or_refused():
    text = "run: 2024-01-01\nimages: {uri: /i, labels: off}\nmethod: {name: kmeans, clusters: 010}\n"
    config = parse(text)
    assert (config.run, config.images.labels, config.method.clusters) == ("2024-01-01", "off", 10)
    with pytest.raises(ConfigError, match=r"method\.clusters = '1:30': must be an integer, auto"):
        parse(text.replace("010", "1:30"))


def test_an_encoder_may_be_a_word_and_is_auto_by_default():
    base = {"run": "/r", "images": {"uri": "/i"}, "method": {"name": "kmeans", "clusters": 2}}
    assert validate(base).encoder == validate(base | {"encoder": "auto"}).encoder
    assert validate(base | {"encoder": "timm/resnet18"}).encoder.family == "timm"
    with pytest.raises(ConfigError, match=r"encoder\.pretrained = w\.pt: needs encoder\.name"):
        validate(base | {"encoder": {"pretrained": "w.pt"}})


def test_gpus_are_a_number_once_they_are_resolved():
    assert ResourcesConfig().gpus == ResourcesConfig(gpus_per_worker=0).gpus == 0
    assert ResourcesConfig(gpus_per_worker=0.5).gpus == 0.5


def test_a_method_without_a_name_is_the_default():
    assert parse(GOOD.replace("name: temi, ", "")).method.name == "auto"


def test_several_encoders_have_a_space_each():
    encoders = [{"name": "open_clip/ViT-B-32.openai"}, {"name": "pixels", "features": {"center": True}}]
    found = validate(_tree(encoders=encoders, features={"normalize": False}))
    assert found.spaces == ("vit-b-32", "pixels")
    assert (found.features.of("vit-b-32").center, found.features.of("pixels").center) == (False, True)
    assert (found.features.of("vit-b-32").normalize, found.features.of("pixels").normalize) == (False, True)
    dumped = found.model_dump(mode="json", exclude_unset=True)
    assert dumped["features"] == {"normalize": False}
    assert validate(dumped) == found


def test_one_encoder_in_a_list_is_the_encoder():
    entry = {"name": "pixels", "space": "small", "image_size": 8, "features": {"center": True}}
    listed = validate(_tree(encoders=[entry]))
    alone = validate(_tree(encoder={"name": "pixels", "image_size": 8}, features={"center": True}))
    assert listed.model_dump(exclude_unset=True) == alone.model_dump(exclude_unset=True)
    assert listed.spaces == ()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"encoders": ["pixels", "pixels"]}, "encoders: pixels is the space of two; set `space` of one of them"),
        ({"encoders": ["pixels"], "encoder": "pixels"}, "encoders: is given beside encoder; keep one of them"),
        (
            {"encoders": ["pixels", {"image_size": 3}]},
            "encoders.1.space: is missing; an encoder without a name needs one",
        ),
        ({"encoders": ["pixels", {"name": "pixels", "space": "B"}]}, r"encoders.1.space = 'B': should match"),
        (
            {"encoders": ["pixels", {"name": "pixels", "space": "z"}]},
            "encoders: space = z: is taken for something else",
        ),
        ({"encoders": [{"space": "a", "embeddings": "a.npy"}]}, "encoders.0.embeddings: a run with one space takes"),
        ({"encoders": [{"space": s, "embeddings": s} for s in "ab"]}, "encoders: all have `embeddings`"),
        ({"features": {"spaces": {"a": {}}}}, "features.spaces: write `features` of an entry of `encoders`"),
        ({"label": {"encoder_space": "q"}}, "label.encoder_space = q: is no space of the run"),
        ({"neighbors": {"spaces": "agree"}}, "neighbors.spaces = agree: the run has one encoder"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(groups: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        validate(_tree(**groups))


def _tree(**groups: Any) -> dict[str, Any]:
    return {"run": "/r", "images": {"uri": "/i"}, "method": {"name": "kmeans", "clusters": 3}} | groups
