"""What `save_peft` writes for any network, read by peft itself."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lorapower import randomness
from lorapower.checkpoints import save_peft
from lorapower.errors import InputError
from lorapower.lowrank import LowRank

NAMES = ("0", "2.0", "3", "10.1")


def normal(*shape: int, of: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = randomness.generator(0, "adapters for peft", of)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def stack(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Nested, and with names that are ends of others: 0 of 2.0, and 0 and 2.0 of 10.0."""
    layers = [
        nn.Linear(5, 7),
        nn.ReLU(),
        nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.5), nn.ReLU()),
        nn.Linear(4, 6),
        *[nn.Dropout(0.3)] * 6,
        nn.Sequential(nn.ReLU(), nn.Linear(6, 3)),
    ]
    module = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(normal(*parameter.shape, of=name))
    return module.eval()


def updates_of(module: nn.Module, ranks: list[int], dtype: torch.dtype) -> dict[str, LowRank]:
    return {
        name: LowRank(
            normal(layer.out_features, rank, of=f"left of {name}", dtype=dtype),
            normal(layer.in_features, rank, of=f"right of {name}", dtype=dtype),
        )
        for name, rank in zip(NAMES, ranks, strict=True)
        if isinstance(layer := module.get_submodule(name), nn.Linear)
    }


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("ranks", [[2, 1, 3, 2], [0, 1, 0, 2], [3, 0, 2, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peft_computes_what_the_merged_network_does(
    tmp_path: Path, dtype: torch.dtype, ranks: list[int], biases: bool
) -> None:
    module = stack(dtype)
    # Numbers take the type of the module.
    updates = updates_of(module, ranks, torch.float64)
    tuned = copy.deepcopy(module)
    with torch.no_grad():
        for name in NAMES if biases else ():
            bias = tuned.get_submodule(name).bias
            assert isinstance(bias, Tensor)
            bias.add_(normal(*bias.shape, of=f"bias of {name}", dtype=dtype))
    merged = copy.deepcopy(tuned)
    with torch.no_grad():
        for name, update in updates.items():
            merged.get_parameter(f"{name}.weight").add_(update.matrix().to(dtype))
    save_peft(tmp_path / "new" / "folder", tuned, updates, biases=biases, base="org/base")
    x = normal(20, 5, of="inputs", dtype=dtype)
    before, wanted = module(x), merged(x)
    loaded = peft.PeftModel.from_pretrained(module, str(tmp_path / "new" / "folder"))
    assert loaded.peft_config["default"].base_model_name_or_path == "org/base"
    rtol = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(loaded(x), wanted, rtol=rtol, atol=rtol)
    assert (biases or any(ranks)) == (not torch.allclose(loaded(x), before))
    adapted = {
        n for n, layer in loaded.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    written = {name for name, rank in zip(NAMES, ranks, strict=True) if rank}
    assert adapted == {f"base_model.model.{name}" for name in written}
    if any(ranks):
        alone = loaded.merge_and_unload()
        torch.testing.assert_close(alone(x), wanted, rtol=rtol, atol=rtol)


def test_embeddings_have_updates_too(tmp_path: Path) -> None:
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    update = LowRank(normal(4, 2, of="left").float(), normal(9, 2, of="right").float())
    wanted = words.get_parameter("0.weight").detach() + update.matrix().mT
    save_peft(tmp_path, copy.deepcopy(words), {"0": update})
    found = peft.PeftModel.from_pretrained(words, str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(found.get_parameter("0.weight").detach(), wanted)


def test_updates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    thin = LowRank(torch.zeros(7, 1), torch.zeros(4, 1))
    batch = LowRank(torch.zeros(2, 7, 1), torch.zeros(2, 5, 1))
    for updates, said in (
        ({"5.0": thin}, r"updates must be of linear modules and embeddings .* one of '5.0'"),
        ({"1": thin}, r"one of '1'"),
        ({"0": thin}, r"updates must be of the size of their modules, \(7, 5\) for '0'"),
        ({"0": batch}, r"got \[2, 7, 5\]"),
    ):
        with pytest.raises(InputError, match=said):
            save_peft(tmp_path, stack(), updates)
    assert not any(tmp_path.iterdir())
