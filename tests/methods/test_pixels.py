"""Methods that learn from pixels: views, schedules, E-step, presets; any number of workers; resume to the bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rayclust.errors import ConfigError
from rayclust.methods import build, find, load
from rayclust.methods.base import Batch, CheckpointInterval, Method
from rayclust.methods.pixels.augment import BYOL, SIMCLR, Augmentation, draw, keyed_seed, random_view
from rayclust.methods.pixels.backbones import SyncedBatchNorm1d, SyncedBatchNorm2d, build_backbone, folded, mlp
from rayclust.methods.pixels.base import KeyQueue, MomentumMethod, PixelMethod
from rayclust.methods.pixels.propos import ProPos
from rayclust.methods.pixels.settings import PixelConfig, ProPosConfig
from rayclust.methods.settings import EMBEDDINGS, Plan
from rayclust.training.loop import Stepper, Trainer
from rayclust.training.sampling import ArrayRows
from tests.stores import MemoryStore
from tests.workers import on_two_workers

METHODS = ("propos", "byol", "simsiam", "simclr", "moco", "pcl", "cc")
N, SIDE, K = 48, 8, 3
SETTINGS: dict[str, Any] = {
    "clusters": K, "backbone": "small", "features": 8, "batch_size": 16, "epochs": 2, "warmup_epochs": 1, "restarts": 1,
    "learning_rate": 0.1, "reassign": 1, "precision": "fp32",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "propos": {"hidden": 12, "queue": 20, "resample": True, "final_momentum": 1.0},
    "byol": {"hidden": 12, "joint_views": True, "norm_groups": 2},
    "simsiam": {"bottleneck": 6, "layers": 3},
    "moco": {"queue": 20, "norm_groups": 4},
    "pcl": {"queue": 20, "prototypes": [6, 12, 400], "e_step_rows": "views"},
}


def _images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of three colours with noise, as rows."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.2, 0.8]], dtype=torch.float64)
    noise = 0.1 * torch.randn((N, SIDE, SIDE, 3), generator=generator, dtype=torch.float64)
    return (colours[torch.arange(N) % K][:, None, None] + noise).clamp(0, 1).reshape(N, -1).to(dtype)


def _fit(name: str, dtype: torch.dtype = torch.float32, store: MemoryStore | None = None, **more: Any) -> PixelMethod:
    method = build(_config(name, **more), SIDE * SIDE * 3, N, seed=1).to(dtype)
    assert isinstance(method, PixelMethod)
    method.fit(ArrayRows(_images(dtype)), Trainer(1, store=store, every=CheckpointInterval(epochs=1)))
    return method


def _config(name: str, **more: Any) -> PixelConfig:
    config = find(name).config_type.model_validate({"name": name} | SETTINGS | OWN.get(name, {}) | more)
    assert isinstance(config, PixelConfig)
    return config


@pytest.mark.parametrize("name", METHODS)
def test_a_fitted_method_gives_the_same_after_it_was_stored(name: str):
    method = _fit(name).eval()
    x = _images()
    expected = method.predict_proba(x)
    assert expected.shape == (N, K)
    assert torch.allclose(expected.sum(1), torch.ones(N), atol=1e-5)
    assert torch.allclose(method.transform(x).norm(dim=1), torch.ones(N), atol=1e-5)
    again = load(method.state())
    assert torch.equal(again.predict_proba(x), expected)
    assert again.predict_proba(x[:0]).shape == (0, K)
    state = method.state()
    assert not [key for key in state.tensors if key.startswith(("online", "predictor", "queue", "labels"))]
    first = next(iter(state.tensors))
    with pytest.raises(ValueError, match=first):
        load(replace(state, tensors={key: x for key, x in state.tensors.items() if key != first}))


def _states_of_all(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    states = {name: dict(_fit(name, torch.float64).state_dict()) for name in METHODS}
    return states | {"bf16": dict(_fit("simclr", precision="bf16").state_dict())}


@pytest.fixture(scope="module")
def two_workers() -> list[dict[str, dict[str, Tensor]]]:
    found: list[dict[str, dict[str, Tensor]]] = on_two_workers(_states_of_all)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_workers_end_at_the_weights_of_one(name: str, two_workers: list[dict[str, dict[str, Tensor]]]):
    alone = _fit(name, torch.float64).state_dict()
    for states in two_workers:
        for key, value in alone.items():
            torch.testing.assert_close(states[name][key], value, rtol=1e-6, atol=1e-8, msg=f"{name}: {key}")


def test_two_workers_train_in_bf16_as_well(two_workers: list[dict[str, dict[str, Tensor]]]):
    alone = _fit("simclr", precision="bf16").state_dict()
    for states in two_workers:
        for key in ("backbone.norms.0.running_mean", "backbone.norms.5.running_var"):
            torch.testing.assert_close(states["bf16"][key], alone[key], rtol=0.05, atol=0.01, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_was_killed_ends_at_the_same_bits(name: str):
    whole = _fit(name).state_dict()
    store = MemoryStore(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        _fit(name, store=store)
    resumed = _fit(name, store=store).state_dict()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_a_shifted_image_is_mirrored_at_its_edges():
    image, numbers = torch.arange(64.0).view(1, 1, 8, 8) / 64, torch.full((1, 16), 0.5)
    numbers[0, 2:5] = torch.tensor([1.0, 0.0, 0.9])  # one pixel of eight to the right, one upwards, not mirrored
    options = Augmentation(shift=0.125, jitter=0.0, grey=0.0)
    wide = torch.cat([image[..., 1:], image[..., -1:]], 3)
    torch.testing.assert_close(random_view(image, options, numbers), torch.cat([wide[:, :, :1], wide[:, :, :-1]], 2))


def test_learning_rates_of_the_published_schedule():
    config = ProPosConfig(clusters=10, batch_size=512)
    plan = Plan.of(config, 51_200)  # 100 steps an epoch
    assert config.rate_at(25 * 100, plan) == pytest.approx(0.05, rel=1e-3)
    assert config.rate_at(50 * 100, plan) == pytest.approx(0.1)
    assert config.rate_at(1000 * 100, plan) == pytest.approx(6.1558e-4, rel=1e-4)
    by_epochs = ProPosConfig.model_validate({"clusters": 20, "preset": "cifar20_r34"}).resolved(25_600)
    rates = [by_epochs.rate_at(step, Plan.of(by_epochs, 25_600)) for step in (0, 4_999, 5_000, 5_099, 50_000, 99_999)]
    last = 0.025 * (1 - math.cos(0.001 * math.pi))
    assert rates == pytest.approx([0, 0.0496922, 0.0496922, 0.0496922, 0.025, last])
    steps = ProPosConfig(clusters=10, batch_size=256, milestones=(600, 800))
    plan = Plan.of(steps, 25_600)
    rates = [steps.rate_at(step, plan) for step in (4_999, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005])


def test_a_step_schedule_has_no_cosine():
    for key in ("cosine_by_epochs", "min_learning_rate"):
        with pytest.raises(ValueError, match="milestones: without a cosine"):
            ProPosConfig.model_validate({"clusters": 10, "milestones": [600], key: True})


@pytest.mark.parametrize(("name", "is_fixed"), [("simsiam", True), ("byol", False)])
def test_a_predictor_has_a_rate_of_its_own(name: str, is_fixed: bool):
    method = build(_config(name, epochs=4, warmup_epochs=2, predictor_rate=5.0), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, PixelMethod)
    stepper, predictor = Stepper(method.train()), {id(p) for p in method.predictor.parameters()}  # type: ignore[union-attr]
    stepper.step(Batch({EMBEDDINGS: _images()[None, :16]}, torch.arange(16), step=0, epoch=0))
    rates = {id(p) in predictor: group["lr"] for group in stepper.optimizer.param_groups for p in group["params"]}
    assert rates == {True: pytest.approx(5 * 0.1 * 16 / 256 if is_fixed else 0.0), False: 0.0}


def test_the_clusters_sizes_in_cc():
    method = build(_config("cc"), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, PixelMethod)
    last, batch = method.cluster_head[-1], Batch({EMBEDDINGS: _images()[None, :16]}, torch.arange(16), 0, 0)  # type: ignore[index]
    torch.nn.init.zeros_(last.weight)  # all rows alike: first all clusters, then one
    for bias, expected in ((0.0, 0.0), (50.0, 2 * math.log(K))):
        last.bias.data = torch.tensor([bias, 0.0, 0.0])
        assert method.training_step(batch)["imbalance"].item() == pytest.approx(expected, abs=1e-6)


def test_momentum_rises_on_half_a_cosine():
    class One(MomentumMethod):
        def __init__(self) -> None:
            super().__init__(_config("byol", steps=4), SIDE * SIDE * 3, N, 0)
            self.start_target(torch.nn.Linear(1, 1, bias=False))

    method = One()
    momenta = []
    for step in range(5):
        method.online.weight.data.fill_(1.0)  # type: ignore[operator, union-attr]
        method.target.weight.data.fill_(0.0)  # type: ignore[operator, union-attr]
        method.update_target(Batch({}, torch.arange(1), step, 0), 0.996, 1.0)
        momenta.append(1 - float(method.target.weight))  # type: ignore[arg-type]
    assert momenta[1:] == pytest.approx([0.99658579, 0.998, 0.99941421, 1.0], abs=1e-6)
    assert momenta[0] == 1.0  # the first step finds the copy as it was made


def test_a_copy_moves_once_for_all_parts_of_a_batch():
    method = build(_config("byol", accumulation=2, norm_groups=1, final_momentum=0.996), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, MomentumMethod)
    stepper, before = Stepper(method.train()), method.target.state_dict()["0.down.0.weight"].clone()
    method.online[0].down[0].weight.data.add_(1.0)  # type: ignore[operator, union-attr, index]
    stepper.step(Batch({EMBEDDINGS: _images()[None, :16]}, torch.arange(16), step=1, epoch=0))
    moved = (method.target.state_dict()["0.down.0.weight"] - before).mean()
    assert float(moved) == pytest.approx(1 - 0.996, rel=0.01)


class Squares(Method):
    """The mean of (w − x)² over the rows."""

    def __init__(self, parts: int) -> None:
        super().__init__(_config("simclr"), 1, 6, 0)
        self.plan, self.parts = Plan(6, 1, 1, 0), parts
        self.w = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (self.w - batch.x[0]).square().mean()}


def test_parts_of_a_batch_add_up_to_its_gradient():
    found = []
    for parts in (1, 4):
        method = Squares(parts)
        batch = Batch({EMBEDDINGS: torch.arange(6.0)[None, :, None]}, torch.arange(6), 0, 0, weight=0.5)
        loss = Stepper(method).step(batch)["loss"]
        assert method.w.grad is not None
        found.append((float(method.w.grad), float(loss)))
    assert found[1] == pytest.approx(found[0])
    with pytest.raises(ConfigError, match="accumulation = 7"):
        Stepper(Squares(7))


def test_parts_see_the_views_of_the_whole_batch():
    batch = Batch({EMBEDDINGS: torch.zeros(1, 5, 1)}, torch.arange(5), 0, 0)
    drawn = torch.arange(5)
    assert [part.own(drawn).tolist() for part in batch.split(2)] == [[0, 2, 4], [1, 3]]
    assert batch.own(drawn).tolist() == drawn.tolist()


@pytest.mark.parametrize("settings", [
    {"optimizer": "lars", "learning_rate": 4.8}, {"accumulation": 2}, {"backbone": "timm/test_efficientnet"},
])  # fmt: skip
def test_other_optimizers_parts_and_networks_train(settings: dict[str, Any]):
    method = build(_config("propos", **settings), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, ProPos)
    before = [p.detach().clone() for p in method.online.parameters()]
    method.fit(ArrayRows(_images()), Trainer(1))
    assert all(
        p.isfinite().all() and not torch.equal(p, b) for p, b in zip(method.online.parameters(), before, strict=True)
    )


# Views.


def test_a_view_depends_on_its_own_numbers_alone():
    images, numbers = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0)), draw(6, 3)
    for family in (SIMCLR, BYOL):
        for options in family:
            whole = random_view(images, options, numbers)
            assert whole.shape == images.shape
            assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
            assert torch.allclose(random_view(images[2:4], options, numbers[2:4]), whole[2:4], atol=1e-6)


def test_a_view_without_any_change_is_the_image():
    images = torch.rand(3, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    still = Augmentation(scale=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    numbers = draw(3, 0)
    numbers[:, 1] = 0.5  # a square crop
    assert torch.allclose(random_view(images, still, numbers), images, atol=1e-5)
    mirrored = random_view(images, Augmentation(scale=(1.0, 1.0), flip=1.0, jitter=0.0, grey=0.0), numbers)
    assert torch.allclose(mirrored, images.flip(3), atol=1e-5)
    grey = random_view(images, Augmentation(scale=(1.0, 1.0), flip=0.0, jitter=0.0, grey=1.0), numbers)
    weights = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose(grey, torch.einsum("c,bchw->bhw", weights, images)[:, None].expand(-1, 3, -1, -1), atol=1e-3)


def test_a_crop_keeps_its_share_of_the_area():
    # An image whose red is its column: the spread of a crop's red is its width.
    columns = torch.linspace(0, 1, 64).expand(200, 1, 64, 64)
    half = Augmentation(scale=(0.25, 0.25), flip=0.0, jitter=0.0)
    crops = random_view(columns, half, draw(200, 5))
    widths = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    assert widths.mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_blur_keeps_the_mean_and_flattens():
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    numbers = draw(4, 0)
    numbers[:, 1], numbers[:, 12] = 0.5, 1.0
    blurred = random_view(images, Augmentation(scale=(1.0, 1.0), flip=0.0, jitter=0.0, blur=1.0), numbers)
    assert blurred.mean().item() == pytest.approx(images.mean().item(), abs=0.01)
    assert blurred.std() < images.std()


def test_solarizing_inverts_what_is_bright():
    images = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    view = random_view(images, Augmentation(scale=(1.0, 1.0), flip=0.0, jitter=0.0, solarize=1.0), draw(2, 0))
    assert view[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.1])


# Networks, queue, E-step.


@pytest.mark.parametrize(
    ("name", "width"), [("small", 128), ("resnet18", 512), ("preact_resnet18", 512), ("timm/test_vit", 64)]
)
def test_networks_start_from_the_seed_alone(name: str, width: int):
    (first, found), (second, _) = (build_backbone(name, 16, 3, seed=4) for _ in range(2))
    assert found == width
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("name", "kept"), [("small", 0), ("resnet18", 0), ("preact_resnet18", 9)])
def test_a_folded_network_maps_as_before(name: str, kept: int):
    backbone, width = build_backbone(name, 8, 3, seed=4)
    network, images = torch.nn.Sequential(backbone, mlp(width, 6, 2)).double(), torch.rand(4, 3, 8, 8).double()
    network(images)  # statistics other than 0 and 1
    expected = network.eval()(images)
    inference = folded(network)
    torch.testing.assert_close(inference(images), expected, rtol=1e-9, atol=1e-12)
    called = {node.target for node in inference.graph.nodes}  # type: ignore[union-attr, operator]
    norms = [n for n, layer in inference.named_modules() if n in called and isinstance(layer, SyncedBatchNorm2d)]
    assert len(norms) == kept, "those behind a sum"


def test_keys_are_normalised_in_shuffled_groups_and_come_back_in_order():
    method = build(_config("moco"), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, MomentumMethod)
    x, batch = torch.arange(16.0)[:, None] ** 2, Batch({EMBEDDINGS: torch.zeros(1, 16, 1)}, torch.arange(16), 3, 0)
    norm = SyncedBatchNorm1d(1)
    norm.groups = 4
    keys = method.shuffled(norm(method.shuffled(x, batch, 0)), batch, 0, back=True)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(keyed_seed(method.seed, 3, 5, 0)))
    means = []
    for group in (order[place::4] for place in range(4)):
        assert len(set((group % 4).tolist())) > 1, "a query's group is that of its place, a key's is not"
        variance, mean = torch.var_mean(x[group], correction=0)
        torch.testing.assert_close(keys[group], (x[group] - mean) / (variance + norm.eps).sqrt())
        means.append(mean)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean()[None])
    torch.testing.assert_close(method.shuffled(method.shuffled(x, batch, 1), batch, 1, back=True), x)
    assert not torch.equal(method.shuffled(x, batch, 0), method.shuffled(x, batch, 1))


@pytest.mark.parametrize(("groups", "message"), [(3, "the batch of 16 rows"), (16, "two or more")])
def test_groups_of_norms_must_be_equal(groups: int, message: str):
    with pytest.raises(ConfigError, match=message):
        _fit("moco", norm_groups=groups)


def test_residual_networks_have_the_sizes_of_the_paper():
    network, _ = build_backbone("resnet18", 32, 3, 0)
    assert sum(p.numel() for p in network.parameters()) == 11_168_832
    method = ProPos(ProPosConfig(clusters=10), 32 * 32 * 3, 60_000, 0)
    assert sum(p.numel() for p in method.predictor.parameters()) == 2_109_696
    assert sum(p.numel() for p in method.online[1].parameters()) == 3_158_272  # type: ignore[index]


def test_an_unknown_network_and_rows_that_are_no_images_are_refused():
    with pytest.raises(ConfigError, match="backbone = resnet19"):
        build_backbone("resnet19", 16, 3, 0)
    with pytest.raises(ConfigError, match="77 values are none"):
        ProPos(ProPosConfig(clusters=2), 77, 10, 0)


def test_the_queue_holds_the_newest_keys():
    queue = KeyQueue(4, 1)
    for step in range(3):
        queue.add(torch.tensor([[3.0 * step + 2], [3.0 * step + 1]]), torch.tensor([2, 1]))
    keys, rows = queue.filled()
    assert sorted(keys[:, 0].tolist()) == [4.0, 5.0, 7.0, 8.0]
    assert sorted(rows.tolist()) == [1, 1, 2, 2]


def test_the_e_step_finds_planted_clusters_and_tells_a_collapse():
    method = _fit("simclr")
    method._rows = ArrayRows(_images())
    row = method.e_step()
    assert row["feature_std"] > 0.2
    labels = method.labels.view(-1, K)
    assert all(torch.equal(labels[0], row) for row in labels)
    for parameter in method.projector.parameters():
        parameter.data.zero_()
    method.projector[-1].bias.data.fill_(1.0)
    assert method.e_step()["feature_std"] == pytest.approx(0.0, abs=1e-3)


def test_a_mixture_in_the_e_step_finds_planted_clusters_and_is_stored():
    method = _fit("simclr", e_step="mixture").eval()
    labels = method.labels.view(-1, K)
    assert all(torch.equal(labels[0], row) for row in labels)
    assert sorted(labels[0].tolist()) == list(range(K))
    probabilities = method.predict_proba(_images())
    assert torch.equal(probabilities.argmax(1), method.labels)
    assert float(method.mixture().weights.sum()) == pytest.approx(1.0)
    assert torch.equal(load(method.state()).predict_proba(_images()), probabilities)


def test_an_e_step_of_views_takes_what_the_copy_has_made_of_them():
    method = build(_config("byol", e_step_rows="views"), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, MomentumMethod)
    keys = [torch.randn(N, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    batch = Batch({EMBEDDINGS: torch.zeros(1, N, 1)}, torch.arange(N), 0, 0)
    method.take_keys([k[1:] for k in keys], replace(batch, rows=batch.rows[1:]))
    method._rows = ArrayRows(_images())  # one image has not been in a batch: all are read
    own, exact = (method.own_features(exactly=exactly) for exactly in (False, True))
    torch.testing.assert_close(own, exact, rtol=0, atol=0.05)
    method.take_keys(keys, batch)
    first, second = (functional.normalize(k, dim=1) for k in keys)
    torch.testing.assert_close(method.own_features(exactly=False), functional.normalize(first + second, dim=1))
    method._rows = None  # no image is read
    assert method.e_step()["feature_std"] == pytest.approx(1, abs=0.1)
    assert len(method.labels.unique()) == K


def test_resampling_draws_each_cluster_equally_often():
    method = ProPos(ProPosConfig(clusters=3, backbone="small", hidden=8, resample=True), SIDE * SIDE * 3, 10_000, 0)
    method.labels.copy_((torch.arange(10_000) >= 9_000).long())  # 90 to 10, and one without rows
    drawn = method.labels[method.epoch_order(0)]
    assert float((drawn == 0).double().mean()) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 10_000))
    assert not torch.equal(method.epoch_order(0), method.epoch_order(1))


def test_before_the_warm_up_ends_propos_is_byol():
    plain = {"epochs": 1, "final_momentum": 0.996}
    own: dict[str, dict[str, Any]] = {
        "propos": {"queue": 0, "resample": False},
        "byol": {"joint_views": False, "norm_groups": 1},
    }
    states = []
    for name, settings in own.items():
        method = build(_config(name, **plain, **settings), SIDE * SIDE * 3, N, 1)
        method.fit(ArrayRows(_images()), Trainer(1))
        assert isinstance(method, MomentumMethod)
        states.append(method.target.state_dict())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


# encoder; batch, rate, epochs; momenta; λ, σ; views joint, resampled.
PUBLISHED = {
    "cifar10_r18": ("resnet18", 512, 0.05, 1000, 0.996, 0.996, 0.1, 0.001, False, False),
    "cifar20_r18": ("resnet18", 256, 0.05, 1000, 0.996, 1.0, 0.1, 0.001, True, True),
    "cifar20_r34": ("resnet34", 256, 0.05, 1000, 0.996, 1.0, 0.1, 0.001, True, True),
    "imagenetdogs_r34": ("resnet34", 256, 0.05, 1000, 0.996, 1.0, 0.1, 0.001, True, True),
    "imagenet_r50": ("resnet50", 4096, 0.3, 200, 0.99, 1.0, 0.001, 1e-4, False, False),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_configurations(preset: str):
    c = ProPosConfig.model_validate({"clusters": 10, "preset": preset}).resolved(60_000)
    found = (c.backbone, c.batch_size, c.learning_rate, c.epochs, c.momentum, c.final_momentum, c.scatter_weight)
    assert (*found, c.noise, c.joint_views, c.resample) == PUBLISHED[preset]
    assert (c.temperature, c.features, c.hidden) == (0.5, 256, 4096)
    is_imagenet = preset == "imagenet_r50"
    assert (c.weight_decay, c.warmup_epochs, c.queue) == ((1e-6, 10, 10_240) if is_imagenet else (5e-4, 50, 0))
    assert (c.optimizer, c.predictor_rate, c.reassign) == (("lars", 1.0, 10) if is_imagenet else ("sgd", 10.0, 1))


def test_a_written_key_wins_over_the_preset():
    c = ProPosConfig.model_validate({"clusters": 5, "preset": "cifar20_r34", "epochs": 7}).resolved(60_000)
    assert (c.backbone, c.epochs) == ("resnet34", 7)


@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_is_built_from_its_preset(name: str):
    settings = {"name": name, "clusters": K, "backbone": "small", "preset": "short", "batch_size": 24, "epochs": 1}
    method = build(find(name).config_type.model_validate(settings), SIDE * SIDE * 3, N, 1)
    assert isinstance(method, PixelMethod)
    method.fit(ArrayRows(_images()), Trainer(1))
    assert method.eval().transform(_images()).shape == (N, method.config.features)
    width = getattr(method.config, "hidden", getattr(method.config, "bottleneck", None))
    assert width is None or method.predictor[0].out_features == width  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_a_short_training_follows_from_its_number_of_steps(name: str):
    config_type = find(name).config_type
    short = config_type.model_validate({"clusters": 10, "preset": "short"}).resolved(3_000)
    assert (Plan.of(short, 3_000).steps, short.preset) == (44 * 23, "none")  # of 128 rows, or half as many epochs of 64
    longer = config_type.model_validate({"clusters": 10, "preset": "short", "epochs": 20_000}).resolved(3_000)
    assert (longer.epochs, longer.warmup_epochs) == (20_000, 2_000)
    if hasattr(short, "momentum"):
        assert short.momentum == pytest.approx(1 - 16 / (44 * 23))
        assert longer.momentum == config_type.model_fields["momentum"].default
    assert (getattr(short, "e_step_rows", "") == "views") == (name == "propos")  # an E-step an epoch


def test_features_are_those_of_the_copy():
    method = _fit("byol").eval()
    images = method.normalized(method.shape.images(_images()))
    assert torch.allclose(functional.normalize(method.target(images), dim=1), method.transform(_images()), atol=1e-6)
