"""Everything follows the device of what it is given, and is drawn alike for all devices."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lorapower import InputError, bounds, lowrank, randomness
from lorapower.constructions import fnn, linear, transformer
from lorapower.experiments import digits, synthetic
from lorapower.networks import FNN, Gap, LinearNetwork, Network, Transformer
from lorapower.networks.rewriting import align, enlarge, relabel, with_gains
from lorapower.regions import Ball, Box, Region, Samples
from lorapower.training import Data, Fixed, Fresh, Tuning, minimize, train

FACTORIES = {
    getattr(torch, name): name
    for name in (
        *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"),
        *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
        *("sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "vander", "zeros"),
    )
}
CPU = torch.device("cpu")
WIDTH = 4


class NamedDevices(TorchFunctionMode):
    """Refuses to let the package make a tensor without saying where."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in FACTORIES and "device" not in kwargs:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"].startswith("lorapower"):
                place = f"{caller.f_globals['__name__']}:{caller.f_lineno}"
                raise AssertionError(f"torch.{FACTORIES[function]} without a device in {place}")
        return function(*args, **kwargs)


def devices() -> list[Any]:
    """The processor, where all devices have to be named; and CUDA, where torch finds it."""
    lacks = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
    return [CPU, pytest.param(torch.device("cuda"), marks=lacks)]


@pytest.fixture(params=devices(), ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with NamedDevices():
        yield request.param


def inputs(device: torch.device, *shape: int) -> torch.Tensor:
    generator = randomness.generator(0, "test inputs")
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)


def pair(kind: Any, device: torch.device, **options: Any) -> tuple[Any, Any]:
    """A frozen network and a target of two members each."""
    depths = (2, 2) if kind is Transformer else (4, 2)
    size = (WIDTH, 2) if kind is Transformer else (WIDTH,)
    frozen, target = (
        kind.random(depth, *size, batch_shape=(2,), seed=seed, **options).to(device=device)
        for seed, depth in enumerate(depths)
    )
    return frozen, target


def places(value: Any) -> set[torch.device]:
    """Where all tensors in something lie."""
    if isinstance(value, torch.Tensor):
        return {value.device}
    if isinstance(value, dict):
        return places([*value.values()])
    if isinstance(value, list | tuple | set):
        return set().union(*map(places, value))
    if type(value).__module__.startswith("lorapower"):
        slots = getattr(value, "_asdict", lambda: vars(value))
        return places(slots())
    return set()


def test_the_mode_refuses_what_has_no_device() -> None:
    code = compile("torch.zeros(3)", "package.py", "exec")
    with NamedDevices():
        exec(code, {"torch": torch, "__name__": "elsewhere"})
        exec(code.replace(co_names=("torch", "zeros")), {"torch": torch, "__name__": "elsewhere"})
        with pytest.raises(AssertionError, match=r"torch.zeros without a device in lorapower\.x:1"):
            exec(code, {"torch": torch, "__name__": "lorapower.x"})


def test_draws_do_not_depend_on_the_device(device: torch.device) -> None:
    for draw in (randomness.normal, randomness.uniform):
        one, other = (
            draw(randomness.generator(0, "there"), 3, 4, device=place) for place in (device, CPU)
        )
        assert one.device.type == device.type
        assert torch.equal(one.to(CPU), other)


@pytest.mark.parametrize("kind", [LinearNetwork, FNN, Transformer])
def test_networks(kind: Any, device: torch.device) -> None:
    frozen, _ = pair(kind, device)
    assert frozen.device.type == device.type
    here = frozen.to(torch.float32)
    assert (here.dtype, here.device) == (torch.float32, frozen.device)
    assert frozen.to(torch.float32, device).dtype == torch.float32
    assert places([frozen[0], frozen.map(torch.neg), here]) == {frozen.device}
    # Lists and arrays have no device: they are taken to the network's.
    x = inputs(CPU, WIDTH, 3)
    for given in (x.to(device), x.numpy(), x.tolist()):
        assert torch.equal(frozen.as_inputs(given), x.to(device))
    assert places([frozen(x), frozen.members(0)]) == {frozen.device}


def test_linear_networks(device: torch.device) -> None:
    frozen, target = pair(LinearNetwork, device)
    results: list[Any] = [
        linear.adapt(frozen, target, 1),
        linear.adapt(frozen, target, WIDTH, rtol=torch.inf),
        # What cannot be reached makes all splittings be tried, of singular layers above all.
        linear.adapt(frozen, frozen.map(torch.zeros_like), 1, rtol=torch.inf),
        linear.adapt(frozen.map(torch.zeros_like), target, 1, rtol=torch.inf),
        bounds.linear_error(frozen, target, 1),
        bounds.linear_threshold(frozen, target),
        Gap(frozen, target).undone(1),
        minimize(frozen, target, 1, starts=2, iterations=3),
        lowrank.rank(frozen.product(), scale=1.0),
    ]
    assert places(results) == {frozen.device}
    adapted = results[0].adapters.merge(frozen)
    assert places(adapted(inputs(device, WIDTH, 3))) == {frozen.device}


@pytest.mark.parametrize(
    "region",
    [
        lambda on: Ball(on(torch.ones(2))),
        lambda on: Box(on(-torch.ones(WIDTH)), on(torch.ones(WIDTH))),
        lambda on: Samples(on(inputs(CPU, WIDTH, 9))),
        lambda on: Ball(1.0),
        lambda on: Box(-1.0, 1.0),
    ],
)
def test_relu_networks_over_regions(region: Any, device: torch.device) -> None:
    frozen, target = pair(FNN, device)
    there: Region = region(lambda values: values.double().to(device))
    found = fnn.adapt(frozen, target, 2, there, rtol=torch.inf, max_digits_lost=torch.inf)
    x = found.region.sample(5)
    results = [
        found,
        found.covers(frozen, x),
        found.region.sample(5, edge=True),
        found.region.largest_norm(),
        fnn.adapt(frozen, target, 1, there, scalar_biases=True, throw=False),
    ]
    assert places(results) == {frozen.device}


def test_bounds_of_relu_networks(device: torch.device) -> None:
    frozen, target = pair(FNN, device)
    x = inputs(device, WIDTH, 9)
    results = [
        bounds.fnn_threshold(frozen, target),
        bounds.fnn_error(frozen, target, 1, x),
        bounds.fnn_error(frozen, target, 1, 4.0),
        bounds.fnn_error_on(frozen, target, 1, x),
        bounds.colliding_inputs(frozen, x),
        bounds.final_layers_floor(frozen, target, samples=5, steps=2),
        bounds.fnn_data_threshold(frozen, target, x),
        bounds.least_rank(frozen, target),
        bounds.least_error(frozen, target, 1, x),
        bounds.least_error(frozen, target, 1, 4.0),
    ]
    assert places(results) == {frozen.device}


@pytest.mark.parametrize("heads", [WIDTH, 2], ids=["square heads", "narrow heads"])
def test_transformers(heads: int, device: torch.device) -> None:
    frozen, target = pair(Transformer, device, head_size=heads)
    found = transformer.adapt(frozen, target, WIDTH, rtol=torch.inf)
    x = inputs(device, WIDTH, 3)
    results = [
        found,
        found.errors,
        found.condition_number,
        bounds.transformer_threshold(frozen, target),
        bounds.transformer_error(frozen, target, WIDTH, x),
        found.adapters.merge(frozen).trace(x),
    ]
    assert places(results) == {frozen.device}


@pytest.mark.parametrize("kind", [LinearNetwork, FNN, Transformer])
@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("fixed", [False, True])
def test_training(kind: Any, backend: Any, fixed: bool, device: torch.device) -> None:
    frozen, target = pair(kind, device)
    shape = (WIDTH, 3) if kind is Transformer else (WIDTH,)
    source = Fresh(target[0], shape, samples=6, validation_samples=6)
    data: Data = Fixed(source.test(9), source.test(4), samples=4) if fixed else source
    found = train(frozen, [Tuning(1), Tuning(final=1)], data, steps=3, backend=backend)
    assert places(found) == {frozen.device}
    if device.type != "cpu":
        here = train(frozen, [Tuning(1)], data, steps=3, backend="torch", device="cpu")
        torch.testing.assert_close(found.best_loss[:1], here.best_loss)


def test_classes(device: torch.device) -> None:
    frozen, target = pair(FNN, device)
    votes = [0, 0, 1, 1]
    source = Fresh(lambda x: target[0](x)[..., :2, :].argmax(-2), (WIDTH,), samples=6)
    backends: list[Any] = ["compiled", "torch"]
    for backend in backends:
        found = train(frozen, [Tuning(1)], source, steps=2, classes=votes, backend=backend)
        assert places(found) == {frozen.device}


@pytest.mark.parametrize(
    "problem",
    [
        {"model": "linear", "distance_rank": 1, "distance": 0.5},
        {"model": "fnn", "task": "binary", "pretraining": synthetic.PRETRAINED},
        {"model": "transformer", "depth": 1, "tokens": 2},
    ],
    ids=lambda problem: problem["model"],
)
def test_experiments_name_their_devices(problem: dict[str, Any]) -> None:
    made = synthetic.Problem(width=4, steps=4, every=4, **problem)
    with NamedDevices():
        frozen, target = made.start()
        data, fresh = made.data(target)
        train(frozen, [Tuning(1)], data, steps=2, classes=made.classes)
        fresh.test(3)


def test_digits_name_their_devices() -> None:
    with NamedDevices():
        for model in digits.MODELS:
            digits._task(model, 12.5, 3)


@pytest.mark.parametrize("kind", [LinearNetwork, FNN, Transformer])
def test_devices_that_are_refused(kind: Any) -> None:
    network: Network = pair(kind, CPU)[0]
    for device in ("meta", "abacus", "cuda:99"):
        with pytest.raises(InputError, match=r"^device must be"):
            network.to(device=device)
    with pytest.raises(InputError, match="meta"):
        network.map(lambda values: values.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_networks_on_two_devices() -> None:
    frozen, target = pair(LinearNetwork, CPU)
    with pytest.raises(InputError, match="target must be cuda:0, like the frozen network"):
        Gap(frozen.to(device="cuda"), target)
    data = Fresh(target, (WIDTH,))
    with pytest.raises(InputError, match="device must be cpu for compiled code; got cuda:0"):
        train(frozen, [Tuning(1)], data, steps=1, device="cuda")


def test_targets_are_rewritten_where_they_are(device: torch.device) -> None:
    options: Any = {"residual": True, "norm": "layer"}
    frozen, target = (
        Transformer.random(1, 5, 2, hidden=9, purpose=p, **options).to(device=device) for p in "ft"
    )
    smaller = Transformer.random(1, 5, 1, hidden=7, **options).to(device=device)
    written = [with_gains(target, frozen), align(target, frozen), enlarge(smaller, frozen)]
    written += [relabel(target, frozen)]
    assert {network.device.type for network in written} == {device.type}
