"""Training many adapters at once: against torch's own Adam, itself in other company, and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor
from torch.nn import functional

from lorapower import InputError, _checks, randomness, training
from lorapower.networks import FNN, Decoder, LinearNetwork, Partition, Transformer
from lorapower.training import Data, Fixed, Fresh, Training, Tuning, train
from lorapower.training.dynamics import flow
from lorapower.training.tuning import Loss

KINDS = ("linear", "fnn", "transformer")
LINEAR_LAST = "fnn, linear last"
# More than a block of batches.
STEPS = Data.BLOCK + 10


def network(
    kind: str, depth: int = 2, width: int = 6, *, seed: int = 0, batch: tuple[int, ...] = ()
) -> Any:
    if kind == "transformer":
        # Scores of moderate size: saturated softmax amplifies rounding.
        return Transformer.random(
            depth, width, 2, scale=width**-0.5, seed=seed, batch_shape=batch, dtype=torch.float32
        )
    options: dict[str, Any] = {"seed": seed, "batch_shape": batch, "dtype": torch.float32}
    if kind == "linear":
        return LinearNetwork.random(depth, width, **options)
    return FNN.random(depth, width, linear_last=kind == LINEAR_LAST, **options)


def fresh(kind: str, width: int = 6, *, samples: int = 20, seed: int = 0) -> Fresh:
    shape = (width, 3) if kind == "transformer" else (width,)
    target = network(kind, 1, width, seed=seed + 100)
    return Fresh(target, shape, samples=samples, seed=seed)


def parts(result: Training[Any], *index: Any) -> list[np.ndarray[Any, Any]]:
    """All numbers of some runs."""
    chosen = result.network[index]
    names = "training_loss", "validation_loss", "best_loss", "best_step", "diverged"
    losses = (getattr(result, name)[index] for name in names)
    return [tensor.numpy() for tensor in (*chosen.weights, *chosen.biases, *losses)]


def assert_same(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """Bit by bit."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    """But for rounding, of which Adam makes more where a gradient is small."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def start_factors(frozen: Any, tuning: Tuning, data: Data, **options: Any) -> list[Tensor]:
    """Each weight's ``B`` before the first step, from which so small a step does not move it."""
    still = replace(tuning, learning_rate=1e-30, weight_decay=0.0)
    return [u.right[0] for u in train(frozen, [still], data, steps=1, **options).adapters.updates]


def mean_loss(out: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return functional.mse_loss(out, y.double())
    return functional.cross_entropy(out.mT, y)


def plain_loop(
    frozen: Any, tuning: Tuning, ranks: Sequence[int], data: Data, steps: int
) -> tuple[list[float], list[float]]:
    """Training and validation losses of one run, in double precision."""
    starts = start_factors(frozen, tuning, data)
    weights, biases = ([p.double() for p in each] for each in (frozen.weights, frozen.biases))
    first = len(weights) - tuning.final
    full = {m: weights[m].clone() for m in range(first, len(weights))}
    factors = {
        m: (weights[m].new_zeros(len(weights[m]), rank), starts[m][:, :rank].double())
        for m, rank in enumerate(ranks)
        if rank
    }
    chosen = tuning.biases
    if isinstance(chosen, bool):
        # Beside layers that are tuned in full no other bias moves; W_out has none.
        start = len(biases) if isinstance(frozen, Transformer) else first
        start = min(start, len(biases)) if tuning.final and first else 0
        chosen = (False,) * start + (chosen,) * (len(biases) - start)
    biases = [bias.clone() for bias in biases]
    # One that no loss feels, where there is no other.
    idle = torch.zeros((), dtype=torch.float64)
    tuned = [idle, *full.values(), *(f for pair in factors.values() for f in pair)]
    tuned += [bias for bias, is_tuned in zip(biases, chosen, strict=True) if is_tuned]
    for parameter in tuned:
        parameter.requires_grad_()
    adam = torch.optim.Adam(tuned, tuning.learning_rate, weight_decay=tuning.weight_decay)

    def loss(x: Tensor, y: Tensor, kind: str = "squared") -> Tensor:
        adapted = [full.get(m, weight) for m, weight in enumerate(weights)]
        for m, (A, B) in factors.items():
            adapted[m] = adapted[m] + A @ B.T
        network = frozen.with_parameters(adapted, biases, checked=False)
        if kind != "squared":
            p = FNN(network.weights, network.biases, linear_last=True, checked=False)(x.double())
            rows = [kind == "one-sided" or bool(row.max() <= 0) for row in p]
            parts = [row if whole else row.clamp(min=0) for row, whole in zip(p, rows, strict=True)]
            return torch.where(y > 0, torch.stack(parts) - y, p.clamp(min=0)).square().mean()
        return mean_loss(network(x.double()), y)

    training, validation = [math.nan], [loss(*data.validation).item()]
    for step in range(steps):
        x, y = (part[step % Data.BLOCK] for part in data.block(step // Data.BLOCK))
        adam.zero_grad()
        if tuning.schedule == "cosine":
            part_left = (1 + math.cos(math.pi * step / steps)) / 2
            adam.param_groups[0]["lr"] = tuning.learning_rate * part_left
        value = loss(x, y, tuning.loss)
        (value + idle).backward()
        adam.step()
        training.append(value.item())
        validation.append(loss(*data.validation).item())
    return training, validation


def assert_losses(result: Training[Any], run: int, wanted: tuple[list[float], ...]) -> None:
    losses = result.training_loss[run], result.validation_loss[run]
    # Adam divides by a gradient's size, so that the rounding of small ones counts.
    np.testing.assert_allclose(torch.stack(losses), wanted, rtol=1e-4)


def assert_trained_as_plainly(
    frozen: Any, tuning: Tuning, data: Data, ranks: Sequence[int], steps: int = 20
) -> Training[Any]:
    result = train(frozen, [tuning], data, steps=steps)
    assert_losses(result, 0, plain_loop(frozen, tuning, ranks, data, steps))
    return result


@st.composite
def chains(draw: st.DrawFn) -> tuple[Any, list[Tuning]]:
    """A chain of any sizes, and settings of one run or more, which may tune nothing or diverge."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    kind = draw(st.sampled_from(["linear", "fnn", LINEAR_LAST]))
    generator = randomness.generator(draw(seeds), "chain")
    shapes = [*zip(sizes[1:], sizes[:-1], strict=True)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    biases = [torch.rand(out, generator=generator) for out, _ in shapes]
    frozen: Any = LinearNetwork(weights)
    if kind != "linear":
        frozen = FNN(weights, biases, linear_last=kind == LINEAR_LAST)
    caps = [min(shape) for shape in shapes]
    ranks = st.tuples(*(st.integers(0, cap) for cap in caps)) | st.integers(0, max(caps))
    each = st.booleans() | st.tuples(*(st.booleans() for _ in frozen.biases))
    options = {
        "biases": each,
        "learning_rate": st.sampled_from([1e-3, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "schedule": st.sampled_from(["constant", "cosine"]),
        "loss": st.sampled_from(get_args(Loss)[: 3 if kind == "fnn" else 1]),
    }
    full = st.builds(Tuning, final=st.integers(1, len(shapes)), **options)
    tunings = draw(st.lists(st.builds(Tuning, ranks, **options) | full, min_size=1, max_size=3))
    diverging = [Tuning(max(caps), learning_rate=1e30)] * draw(st.integers(0, 1))
    return frozen, tunings + diverging


@given(chains(), seeds)
def test_runs_of_chains_are_those_of_a_plain_loop_with_torchs_adam(
    chain: tuple[Any, list[Tuning]], seed: int
) -> None:
    frozen, tunings = chain
    out, into = frozen.widths[-1], frozen.widths[0]

    def label(x: Tensor) -> Tensor:
        return x[..., :1, :].sin().abs().expand(*x.shape[:-2], out, -1)

    data = Fresh(label, (into,), samples=20, seed=seed)
    result = train(frozen, tunings, data, steps=20)
    for i, tuning in enumerate(tunings):
        if tuning.learning_rate > 1:
            continue
        sizes = [min(weight.shape) for weight in frozen.weights]
        ranks = tuning.ranks
        if isinstance(ranks, int):  # One rank for all is a cap.
            ranks = tuple(min(ranks, size) for size in sizes)
        assert_losses(result, i, plain_loop(frozen, tuning, ranks, data, 20))
        for update, rank in zip(result.adapters[i].updates, ranks, strict=True):
            assert torch.linalg.matrix_rank(update.matrix()) <= rank
    assert result.network.relus == frozen.relus


# Of all weights of the transformer that tests train.
IN_HEADS = (2,) * 16 + (0, 0) + (0, 2) + (2,)


def test_runs_of_transformers_are_those_of_a_plain_loop() -> None:
    """Also beside one that diverges."""
    frozen, data = network("transformer"), fresh("transformer")
    ranks = {
        Tuning(2, learning_rate=1e-2): IN_HEADS,
        Tuning((1, 2, 0) * 7, biases=False): (1, 2, 0) * 7,
        Tuning(final=1): (0,) * 21,
        Tuning(final=21, weight_decay=1e-3): (0,) * 21,
    }
    result = train(frozen, [*ranks, Tuning(2, learning_rate=1e6)], data, steps=STEPS)
    for run, (tuning, each) in enumerate(ranks.items()):
        assert_losses(result, run, plain_loop(frozen, tuning, each, data, STEPS))
    assert result.diverged.tolist() == [False] * 4 + [True]
    assert result.validation_loss[-1, -1].isnan()
    assert result.best_loss[-1].isfinite()
    assert all(w.isfinite().all() for w in result.network.weights)


@pytest.mark.parametrize("kind", ["linear", "fnn", LINEAR_LAST])
def test_classes_are_learnt_by_torchs_cross_entropy(kind: str) -> None:
    data = fresh(kind)
    labelled = Fresh(lambda x: data.label(x).argmax(-2), data.shape, samples=20, seed=3)
    tuning = Tuning(2, learning_rate=1e-2)
    assert_trained_as_plainly(network(kind), tuning, labelled, (2, 2), STEPS)


def test_transformers_need_not_be_square() -> None:
    draw = randomness.generator(0, "inputs")
    L, H, D, d, v, F, out = 2, 3, 5, 2, 7, 6, 4
    shapes: list[Any] = [(L, H, d, D)] * 2 + [(L, H, v, D), (L, H, D, v)]
    shapes += [(L, F, D), (L, F), (L, D, F), (L, D), (out, D)]
    names = ("W_Q", "W_K", "W_V", "W_O", "W_1", "b_1", "W_2", "b_2", "W_out")
    sizes = zip(names, shapes, strict=True)
    matrices: Any = {name: 0.4 * torch.randn(s, generator=draw) for name, s in sizes}
    frozen = Transformer(matrices)
    data = Fresh(lambda x: x[..., :out, :], (D, 4), samples=30, seed=1)
    ranks = (2,) * len(frozen.weights)
    assert_trained_as_plainly(frozen, Tuning(ranks), data, ranks)


@pytest.mark.parametrize(
    "options", [{}, {"gated": True, "groups": 1, "rotary": 100.0, "activation": "silu"}]
)
def test_residual_transformers_are_trained_alike(options: dict[str, Any]) -> None:
    """Adapters of one part, and some of the biases and gains."""
    frozen, target = (
        Decoder.random(1, 4, 2, hidden=6, residual=True, norm="layer", seed=s, **options)
        for s in (0, 1)
    )
    frozen, target = frozen.to(torch.float32), target.to(torch.float32)
    moving = tuple(name[:3] in ("b_1", "g_2") for name in frozen.bias_names)
    ranks, data = frozen.ranks(2, "mlp"), Fresh(target, (4, 3), samples=8, seed=2)
    tuning = Tuning(ranks, biases=moving, learning_rate=1e-2)
    result = assert_trained_as_plainly(frozen, tuning, data, ranks)
    assert [bool(change.any()) for change in result.adapters[0].bias_updates] == [*moving]


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_of_a_batch_is_the_same_alone(kind: str) -> None:
    frozen, data = network(kind, batch=(2, 2)), fresh(kind)
    seeds, tunings = [5, 6, 7, 7], [Tuning(1), Tuning(3)]
    together = train(frozen, tunings, data, steps=STEPS, seed=seeds)
    assert together.network.batch_shape == (2, 2, 2)
    assert together.best_loss.shape == (2, 2, 2)
    for i, seed in enumerate(seeds):
        at = divmod(i, 2)
        alone = train(frozen[at], tunings, data, steps=STEPS, seed=seed)
        assert_close(parts(alone), parts(together, slice(None), *at))


def test_first_factors_are_normal_and_shared_by_all_ranks() -> None:
    frozen, data = network("fnn", 2, 64), fresh("fnn", 64)
    largest = start_factors(frozen, Tuning(64), data)
    for m, B in enumerate(start_factors(frozen, Tuning(10), data)):
        assert torch.equal(B, largest[m][:, :10])
    entries = torch.stack(largest).flatten()
    # Standard errors of the mean and of the standard deviation of as many normal numbers.
    assert abs(entries.mean()) < 4 * 0.25 / math.sqrt(len(entries))
    assert abs(entries.std() - 0.25) < 4 * 0.25 / math.sqrt(2 * len(entries))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_that_of_the_least_validation_loss(kind: str) -> None:
    frozen, data = network(kind), fresh(kind)
    # A high learning rate, so that the last step is not the best.
    tunings = [Tuning(3, learning_rate=rate) for rate in (1e-3, 3.0)] + [Tuning(final=1)]
    result = train(frozen, tunings, data, steps=STEPS)
    assert result.best_step.tolist() == result.validation_loss.argmin(-1).tolist()
    assert_same([result.best_loss], [result.validation_loss.amin(-1)])
    assert result.best_step[1] < STEPS
    x, y = (part.double() for part in data.validation)
    for i in range(len(tunings)):
        loss = (result.network[i].to(torch.float64)(x) - y).square().mean()
        # Outputs in single precision, whose error cancels in small differences from labels.
        assert loss.item() == pytest.approx(float(result.best_loss[i]), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_what_was_added(kind: str) -> None:
    frozen = network(kind, batch=(2,))
    result = train(frozen, [Tuning(1), Tuning(4)], fresh(kind), steps=20)
    merged = result.adapters.merge(frozen)
    torch.testing.assert_close(merged.weights, result.network.weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.biases, result.network.biases, rtol=0, atol=1e-7)
    for m, update in enumerate(result.adapters.updates):
        ranks = torch.linalg.matrix_rank(update.matrix().double(), rtol=1e-6)
        adapted = not isinstance(frozen, Transformer) or frozen.adapted[m]
        assert ranks.tolist() == ([[1, 1], [4, 4]] if adapted else [[0, 0], [0, 0]])


def test_losses_may_be_taken_less_often() -> None:
    frozen, data = network("fnn"), fresh("fnn")
    all_steps, some = (train(frozen, [Tuning(2)], data, steps=STEPS, every=e) for e in (1, 7))
    assert some.steps.tolist() == list(range(0, STEPS + 1, 7))
    assert_same([some.validation_loss], [all_steps.validation_loss[:, ::7]])
    assert_same([some.training_loss[:, 1:]], [all_steps.training_loss[:, 7::7]])
    assert some.training_loss[0, 0].isnan()
    assert some.best_step.item() % 7 == 0


def test_a_run_ends_at_its_goal_and_no_more_data_is_made_when_all_have() -> None:
    asked = []

    class Counted(Fresh):
        def block(self, index: int) -> tuple[Tensor, Tensor]:
            asked.append(index)
            return super().block(index)

    frozen, data = network("fnn"), Counted(fresh("fnn").label, (6,), samples=20)
    tunings = [Tuning(6, learning_rate=rate) for rate in (1e-2, 1e-6)]
    result = train(frozen, tunings, data, steps=400, until=0.5)
    reached, short = result.validation_loss
    end = int(result.best_step[0])
    assert 0 < end < 400
    assert reached[end] <= 0.5 * reached[0] < reached[:end].min()
    assert reached[end + 1 :].isnan().all()
    assert short.isfinite().all()
    assert result.diverged.tolist() == [False, False]
    asked.clear()
    alone = train(frozen, tunings[:1], data, steps=5000, until=0.5)
    assert alone.steps[-1] == alone.best_step[0]
    assert max(asked) <= end // Fresh.BLOCK + 2


@pytest.mark.parametrize(("kind", "size"), [("fnn", 1e25), ("transformer", 1e30)])
def test_what_overflows_from_the_start_diverges(kind: str, size: float) -> None:
    """Of a transformer scores alone, which its softmax does not hide."""
    frozen = network(kind)
    weights = [size * w if m < 8 else w for m, w in enumerate(frozen.weights)]
    large = frozen.with_parameters(weights)
    result = train(large, [Tuning(1)], fresh(kind), steps=3)
    assert result.diverged.all()
    assert result.best_loss.isinf().all()
    assert_same([result.network.weights[0][0].numpy()], [large.weights[0].numpy()])


def test_fresh_batches_depend_on_seed_and_index_alone() -> None:
    one, same, other = (fresh("fnn", seed=0), fresh("fnn", seed=0), fresh("fnn", seed=1))
    late = one.block(3)
    assert_same(late, same.block(3))
    assert_same(one.block(0), same.block(0))
    blocks = [one.block(0)[0], one.block(1)[0], other.block(0)[0]]
    inputs = [*(b for block in blocks for b in block.mT.flatten(0, 1)), *one.validation[0].mT]
    inputs += [*one.test(50)[0].mT]
    assert len(torch.stack(inputs).unique(dim=0)) == len(inputs)


def test_fresh_inputs_are_normal_and_labelled() -> None:
    data = fresh("transformer", samples=40)
    twice = Fresh(data.label, data.shape, samples=40, scale=2.0)
    x, y = data.block(0)
    assert x.shape == (Data.BLOCK, 40, 6, 3)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / x.numel())
    torch.testing.assert_close(y[7], data.label(x[7]))
    assert torch.equal(twice.block(0)[0], 2 * x)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_fixed_batches_use_each_sample_once_an_epoch(
    count: int, samples: int, sequences: bool, seed: int
) -> None:
    samples = min(samples, count)
    x = torch.arange(count).float()
    x = x.reshape(count, 1, 1) if sequences else x.reshape(1, count)
    data = Fixed((x, 2 * x), (x, 2 * x), samples=samples, seed=seed)
    batches: list[Tensor] = []
    for index in range(3):
        inputs, labels = data.block(index)
        assert torch.equal(labels, 2 * inputs)
        batches += [batch.flatten() for batch in inputs]
    per_epoch = count // samples
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches) - per_epoch, per_epoch)]
    for epoch in epochs:
        used = torch.cat(epoch)
        assert len(used) == len(used.unique()) == per_epoch * samples
    if count > 20 and samples < count and len(epochs) > 1:
        assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert_same(data.block(1), Fixed((x, 2 * x), (x, 2 * x), samples=samples, seed=seed).block(1))


X, Y = torch.ones(6, 8), torch.ones(6, 8)
CLASSES = torch.arange(8) % 6


def given_data(x: Any = X, y: Any = Y, x_validation: Any = X, y_validation: Any = Y) -> Data:
    class Given(Data):
        validation = (x_validation, y_validation)

        def block(self, index: int) -> tuple[Tensor, Tensor]:
            return x.expand(self.BLOCK, *x.shape), y.expand(self.BLOCK, *y.shape)

    return Given()


def run(kind: str = "fnn", tuning: Tuning = Tuning(1), data: Any = None, **options: Any) -> Any:  # noqa: B008
    data = fresh(kind) if data is None else data
    return train(network(kind), [tuning], data, **{"steps": 1, **options})


HUGE = LinearNetwork(torch.full((1, 6, 6), 1e39, dtype=torch.float64))
NARROW = LinearNetwork([torch.ones(2, 4), torch.ones(4, 2)])
ONE_SIDED = Tuning(1, loss="one-sided")
BAD_RANKS: list[Any] = [2.7, "3", True, (1.9, 2), -1, [1, -1], None, np.array([1.5, 2.0])]
# The name in the error, and calls that are refused before any step.
BAD: list[tuple[str, Callable[[], Any]]] = [
    ("weight of layer 1", lambda: train(HUGE, [Tuning(1)], fresh("linear"))),
    ("rank", lambda: run("transformer", Tuning(7))),
    ("rank of layer 2", lambda: run(tuning=Tuning((1, 9)))),
    ("final", lambda: run(tuning=Tuning(final=3))),
    ("biases", lambda: run(tuning=Tuning(1, biases=(True, False, True)))),
    *(("rank( of layer [12])?", partial(run, tuning=Tuning(ranks))) for ranks in BAD_RANKS),
    ("every", lambda: run(steps=3, every=4)),
    ("until", lambda: run(until=-1.0)),
    ("seed", lambda: run(seed=[1, 2])),
    ("data's labels", lambda: run(data=Fixed((X, X[0]), (X, X[0])))),
    ("data's labels", lambda: run(data=given_data(y=CLASSES[:5], y_validation=CLASSES))),
    ("data's labels", lambda: run(data=given_data(y=Y[:5]))),
    ("data's labels", lambda: run(data=given_data(y_validation=Y[:, :5]))),
    ("data's labels", lambda: run(data=Fresh(lambda x: x * math.nan, (6,)))),
    ("data's inputs", lambda: run(data=fresh("fnn", 5))),
    ("data's inputs", lambda: run(data=fresh("transformer"))),
    ("data's inputs", lambda: run("transformer", data=fresh("fnn"))),
    ("data's inputs", lambda: run(data=given_data(x_validation=X[:5]))),
    ("loss", lambda: run("linear", ONE_SIDED)),
    ("loss", lambda: run("linear", replace(ONE_SIDED, loss="one-sided-dead"))),
    ("loss", lambda: run(LINEAR_LAST, ONE_SIDED)),
    ("loss", lambda: run("transformer", ONE_SIDED)),
    ("loss", lambda: run(tuning=ONE_SIDED, data=Fixed((X, CLASSES), (X, CLASSES)))),
    ("data's labels", lambda: run(tuning=ONE_SIDED, data=given_data(y=-Y))),
    ("ranks", lambda: training.train_fused(NARROW, 2, Fresh(NARROW, (4,)))),
    ("partition", lambda: training.train_fused(HUGE, 2, fresh("linear"), partition=Partition([1]))),
    ("right", lambda: flow(torch.eye(2), torch.ones(2, 2), torch.ones(1))),
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_bad_input_is_refused_before_any_step(
    name: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "backward", lambda *_: pytest.fail("a step"))
    with pytest.raises(InputError, match=f"^{name} must be"):
        call()


def test_subnormal_numbers_are_what_the_caller_says_again_afterwards() -> None:
    @_checks.flushing()
    def compute() -> float:
        with _checks.flushing():
            pass
        return math.prod([1e-200, 1e-120])

    for flush in (True, False):
        torch.set_flush_denormal(flush)
        assert compute() == 0
        assert (math.prod([1e-200, 1e-120]) == 0) == flush
    with pytest.raises(ZeroDivisionError), _checks.flushing():
        1 / math.prod([1e-200, 1e-120])
    assert math.prod([1e-200, 1e-120]) > 0


def test_the_one_sided_loss_of_dead_outputs_leaves_the_others_squared() -> None:
    frozen, x = FNN.random(1, 6), torch.randn(6, 50, dtype=torch.float64)
    p, y = frozen.preactivations(x)[0], torch.rand(6, 50, dtype=torch.float64)
    # Off everywhere; on at one input; and as drawn.
    lift = torch.cat([-p[0].max()[None] - 1, 1e-3 - p[1].max()[None], torch.zeros(4)])
    start = frozen.with_parameters(frozen.weights, [frozen.biases[0] + lift], checked=False)
    p = p + lift[:, None]
    errors = torch.cat([(p - y)[:1], (p.relu() - y)[1:]])
    slopes = (errors * torch.cat([torch.ones_like(p[:1]), (p[1:] > 0)])).mean(1)
    tuning = Tuning(final=1, loss="one-sided-dead")
    trained = train(start, [tuning], Fixed((x, y), (x, y)), steps=1)
    assert trained.training_loss[0, 1] == pytest.approx(float(errors.square().mean()), rel=1e-5)
    # Adam's first step has its rate for length.
    moved = trained.network.biases[0][0].double() - start.biases[0]
    torch.testing.assert_close(moved, -1e-3 * slopes.sign(), rtol=1e-3, atol=1e-7)
