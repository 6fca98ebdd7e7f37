"""Short trainings of adapters on the language model from four starts; see ``starts.md``.

``python -m records.starts FOLDER`` makes the table, and with ``scales`` behind it the one of rates
at four ranks and scales; both go on there after an interruption.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from lorapower import randomness
from records import Results, Values, grid, language, models, pairs, run
from records.tables import begin, put

#: Starts that need a gradient, the one that needs inputs alone, and LoRA's own.
STARTS = ("random", "gradient", "whitened", "inputs")
RATES = (0.004, 0.008, 0.016)
BATCH, TOKENS = 8, 64
#: Seeds that are compared; seed 0 chooses.
SEEDS = (1, 2)
#: Held-out texts by part, and the number of batches whose gradient and inputs a start has.
HELD_OUT = {"validation": 64, "test": 128}
SEEN = 4
#: Part of the mean eigenvalue of the inputs' second moment that is added to it.
RIDGE = 0.01
#: Falls of the loss, in nats and to first order, of which a start has the best on validation texts.
FALLS = (0.2, 0.4, 0.8, 1.6)
#: Ranks and scales ``α/R``, ``α/√R`` and ``α``, ``α`` = 4, with the first rates of each search.
SCALED = {
    (1, 4.0): (0.004, 0.008, 0.016),
    (16, 0.25): (0.008, 0.016, 0.032),
    (16, 1.0): (0.004, 0.008, 0.016),
    (16, 4.0): (0.0005, 0.001, 0.002),
}
FULL_RATES = (0.00005, 0.0001, 0.0002)


class StartRun(Values):
    """State one training on all linear layers from a ``start``, with an update ``scale · ABᵀ``.

    ``"full"`` tunes the layers in full, whatever rank and scale. Adam's rate falls linearly from
    ``learning_rate`` to 0. The seed draws texts, their order and random factors. Losses are taken
    on ``part`` of the sentences of this ``source``.
    """

    source: str = "tweets"
    model: str = models.LANGUAGE
    start: Literal["random", "gradient", "whitened", "inputs", "full"] = "random"
    rank: int = Field(4, ge=1)
    scale: float = Field(2.0, gt=0)
    learning_rate: float = Field(0.008, gt=0)
    steps: int = Field(20, ge=0)
    part: Literal["validation", "test"] = "validation"
    seed: int = Field(0, ge=0)


class StartResults(Results):
    """Losses in nats per token: of the base, of the start, and after training.

    Of a start by a gradient, ``fall`` is the one chosen of `FALLS`, and ``share`` the part of the
    squared singular values, over all layers, that its rank has; otherwise they are 0 and NaN.
    """

    base: float
    begun: float
    loss: float
    fall: float
    share: float


class Begun(NamedTuple):
    """Factors ``A: [D_out, R]`` and ``B: [D_in, R]`` by layer, with the share they have."""

    factors: dict[str, tuple[Tensor, Tensor]]
    share: float


def batches(setting: StartRun, part: str, number: int, size: int = BATCH) -> list[dict[str, Any]]:
    """Draw texts of a part, or take the first if it is held out, in batches of similar length."""
    tokenizer, texts = models.tokenizer(setting.model), pairs.texts(setting.source, part)
    end = tokenizer.eos_token
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or end, "right"
    draw = np.random.default_rng(randomness.number(setting.seed, "texts"))
    if part == "train":
        texts = [texts[i] for i in draw.permutation(len(texts))]
    texts = [text + end for text in texts[:number]]
    with models.quiet():
        ids = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    ids = sorted(ids, key=len)
    cut = [ids[i : i + size] for i in range(0, len(ids), size)]
    order = draw.permutation(len(cut)) if part == "train" else range(len(cut))
    return [dict(tokenizer.pad({"input_ids": cut[i]}, return_tensors="pt")) for i in order]


def losses(network: Any, batch: dict[str, Any]) -> Tensor:
    """Compute the loss of each next token: [number of tokens]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=models.has_bfloat16("cpu")):
        logits = network(**batch).logits[:, :-1]
    there = batch["attention_mask"][:, 1:].bool()
    return nn.functional.cross_entropy(
        logits[there].float(), batch["input_ids"][:, 1:][there], reduction="none"
    )


def held_out(network: Any, setting: StartRun, part: str) -> float:
    """Compute the mean loss of held-out tokens."""
    with torch.no_grad():
        parts = batches(setting, part, HELD_OUT[part], 16)
        return float(torch.cat([losses(network, batch) for batch in parts]).mean())


@functools.lru_cache(maxsize=2)
def gradients(source: str, model: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Find each layer's gradient at the base, and its inputs, on the first texts of a seed."""
    network = models.decoder(model).requires_grad_(False)
    layers = language.linear_layers(network.base_model)
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        layer.register_forward_pre_hook(
            lambda _, given, seen=inputs[name]: seen.append(given[0].detach().float().flatten(0, 1))
        )
    setting = StartRun(source=source, model=model, seed=seed)
    masks = []
    for batch in batches(setting, "train", SEEN * BATCH):
        (losses(network, batch).mean() / SEEN).backward()
        masks.append(batch["attention_mask"].flatten().bool())
    there = torch.cat(masks)
    slopes: dict[str, Any] = {name: layer.weight.grad for name, layer in layers.items()}
    return {name: (slope, torch.cat(inputs[name])[there]) for name, slope in slopes.items()}


@functools.lru_cache(maxsize=8)
def begin_at(source: str, model: str, seed: int, start: str, rank: int) -> Begun:
    """Find the directions of a start; ``A`` is 0 for one by inputs."""
    factors, kept, total = {}, 0.0, 0.0
    for name, (gradient, inputs) in gradients(source, model, seed).items():
        with randomness.seeded(0, "search for singular vectors"):
            if start == "inputs":
                right = torch.svd_lowrank(inputs, rank + 8, niter=4)[2][:, :rank]
                factors[name] = gradient.new_zeros(len(gradient), rank), right
                continue
            if start == "whitened":
                moment = (inputs.T @ inputs / len(inputs)).double()
                moment.diagonal().add_(RIDGE * moment.diagonal().mean())
                root = torch.linalg.cholesky(moment).float()
                gradient = torch.linalg.solve_triangular(root, gradient.T, upper=False).T
            left, values, right = torch.svd_lowrank(gradient, rank + 8, niter=4)
        left, right = left[:, :rank] * values[:rank], right[:, :rank]
        kept += float(values[:rank].square().sum())
        total += float(gradient.square().sum())
        if start == "whitened":
            back = torch.linalg.solve_triangular(root.T, right, upper=True)
            right, triangle = torch.linalg.qr(back)
            left = left @ triangle.T
        factors[name] = -left, right
    if start == "inputs":
        return Begun(factors, float("nan"))
    # A fall of one nat to first order.
    return Begun({n: (a / kept, b) for n, (a, b) in factors.items()}, kept / total)


@functools.lru_cache(maxsize=1)
def adapted(model: str, rank: int) -> Any:
    """Load the model with adapters of a rank on all linear layers of its blocks."""
    method = language.Lora(rank=rank)
    return language.ready(models.decoder(model), method, 0, half=True).eval()


def adapters(network: Any) -> dict[str, Any]:
    """Find the adapted layers by name, as `language.linear_layers` has them."""
    body = network.base_model.model.base_model
    return {n: layer for n, layer in body.named_modules() if hasattr(layer, "lora_A")}


def put_factors(network: Any, setting: StartRun, begun: Begun | None, fall: float) -> None:
    """Set all factors: columns of ``B`` as long as LoRA's, and what is left in ``A``."""
    for name, layer in adapters(network).items():
        layer.scaling["default"] = setting.scale
        first, last = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if begun is None:
            with randomness.seeded(setting.seed, name):
                nn.init.kaiming_uniform_(first, a=5**0.5)
            nn.init.zeros_(last)
        else:
            left, right = begun.factors[name]
            first.data.copy_(right.T / 3**0.5)
            last.data.copy_(left * (fall * 3**0.5 / setting.scale))


@functools.lru_cache(maxsize=32)
def best_fall(source: str, model: str, start: str, rank: int) -> float:
    """Choose the size of a start with seed 0 on validation texts; it depends on no scale."""
    setting = StartRun(source=source, model=model, rank=rank)
    network, found = adapted(model, rank), {}
    for fall in FALLS:
        put_factors(network, setting, begin_at(source, model, 0, start, rank), fall)
        found[fall] = held_out(network, setting, "validation")
    return min(found, key=found.__getitem__)


@functools.lru_cache(maxsize=8)
def base_loss(source: str, model: str, rank: int, part: str) -> float:
    """Compute the loss of the frozen model."""
    setting, network = StartRun(source=source, model=model, rank=rank), adapted(model, rank)
    put_factors(network, setting, None, 0.0)
    return held_out(network, setting, part)


def train(setting: StartRun) -> StartResults:
    """Run one setting."""
    base = base_loss(setting.source, setting.model, setting.rank, setting.part)
    begun, fall = None, 0.0
    if setting.start == "full":
        network = models.decoder(setting.model).requires_grad_(False).eval()
        for layer in language.linear_layers(network.base_model).values():
            layer.weight.requires_grad_(True)
    else:
        network = adapted(setting.model, setting.rank)
    if setting.start in ("gradient", "whitened", "inputs"):
        about = setting.source, setting.model, setting.seed, setting.start, setting.rank
        begun = begin_at(*about)
        fall = (
            0.0
            if setting.start == "inputs"
            else best_fall(setting.source, setting.model, setting.start, setting.rank)
        )
    if setting.start != "full":
        put_factors(network, setting, begun, fall)
    before = held_out(network, setting, setting.part) if fall else base
    tuned = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(tuned, lr=setting.learning_rate)
    shown = batches(setting, "train", BATCH * setting.steps) if setting.steps else []
    for step, batch in enumerate(shown):
        optimizer.param_groups[0]["lr"] = setting.learning_rate * (1 - step / setting.steps)
        optimizer.zero_grad()
        losses(network, batch).mean().backward()
        optimizer.step()
    after = held_out(network, setting, setting.part) if setting.steps else before
    share = begun.share if begun else float("nan")
    return StartResults(base=base, begun=before, loss=after, fall=fall, share=share)


def work(settings: list[StartRun]) -> list[StartResults]:
    """Run each setting."""
    return [train(setting) for setting in settings]


def chosen(table: pd.DataFrame) -> dict[Any, float]:
    """Take each start's rate with the least loss on validation texts."""
    searched = table[(table.part == "validation") & (table.steps > 0)]
    best = searched.loc[searched.groupby("start").loss.idxmin()]
    return dict(zip(best.start, best.learning_rate, strict=True))


def every() -> pd.DataFrame:
    """Search for rates with seed 0, then train with the others, one after another."""
    asked = grid(StartRun, start=[*STARTS], learning_rate=[*RATES])
    for start, rate in chosen(run(asked, work, "starts", size=1)).items():
        if rate in (RATES[0], RATES[-1]):
            following = rate / 2 if rate == RATES[0] else 2 * rate
            asked.append(StartRun(start=start, learning_rate=following))
    table = run(asked, work, "starts", size=1)
    rates = chosen(table)
    for seed in SEEDS:
        asked += [
            StartRun(start=start, learning_rate=rate, part="test", seed=seed)
            for start, rate in rates.items()
        ]
        table = run(asked, work, "starts", size=1)
        put(table, "starts")  # so far
    return table


def scaled() -> pd.DataFrame:
    """Search for the rate of each rank and scale, and of full tuning, on two seeds."""
    arms = [StartRun(rank=rank, scale=scale) for rank, scale in SCALED]
    rates = dict(zip(arms, SCALED.values(), strict=True)) | {StartRun(start="full"): FULL_RATES}
    asked = grid(StartRun, start=["gradient", "whitened"], rank=[1, 16], steps=[0])
    tried = {arm: [*first] for arm, first in rates.items()}
    for _ in range(3):
        for arm, found in tried.items():
            about = arm.model_dump(exclude={"learning_rate", "seed"})
            asked += grid(StartRun, learning_rate=found, seed=[0, 1], **about)
        table = run([*dict.fromkeys(asked)], work, "scales", size=1)
        put(table, "scales")  # so far
        for arm, found in tried.items():
            rows = table[(table.start == arm.start) & (table["rank"] == arm.rank)]
            rows = rows[(rows.scale == arm.scale) & (rows.steps > 0)]
            best = float(rows.groupby("learning_rate").loss.mean().idxmin())  # type: ignore[arg-type]
            if best in (min(found), max(found)):
                found.append(best / 2 if best == min(found) else 2 * best)
    return table


if __name__ == "__main__":
    scaled() if begin() == ["scales"] else every()
