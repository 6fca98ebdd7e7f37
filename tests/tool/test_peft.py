"""What `Adapters.to_peft` writes, read by peft itself."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lorapower import InputError, ResultsError, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork, as_network


def normal(*shape: int, of: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = randomness.generator(0, "adapters for peft", of)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def filled(module: nn.Sequential) -> nn.Sequential:
    """The module with random numbers, as in evaluation."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(normal(*parameter.shape, of=name))
    return module.eval()


def stack(dtype: torch.dtype, *, bias: bool = True) -> nn.Sequential:
    """Nested, and with names that are ends of others: 0 of 2.0, and 0 and 2.0 of 10.0."""
    layers = [
        nn.Linear(5, 7, bias),
        nn.ReLU(),
        nn.Sequential(nn.Linear(7, 4, bias), nn.Dropout(0.5), nn.ReLU()),
        nn.Linear(4, 6, bias),
        *[nn.Dropout(0.3)] * 6,
        nn.Sequential(nn.ReLU(), nn.Linear(6, 3, bias)),
    ]
    return filled(nn.Sequential(*layers).to(dtype))


def adapters_of(
    module: nn.Sequential, ranks: list[int], dtype: torch.dtype, *, biases: bool
) -> Adapters:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    updates = [
        LowRank(*(normal(n, R, of=f"{side} of {l}", dtype=dtype) for side, n in enumerate(w.shape)))
        for l, (w, R) in enumerate(zip([layer.weight for layer in layers], ranks, strict=True))
    ]
    changes = [normal(len(layer.weight), of=f"bias {l}") for l, layer in enumerate(layers)]
    return Adapters(tuple(updates), tuple(c.to(dtype) for c in changes) if biases else ())


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("ranks", [[2, 1, 3, 2], [0, 1, 0, 2], [3, 0, 2, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peft_computes_what_the_merged_network_does(
    tmp_path: Path, dtype: torch.dtype, ranks: list[int], biases: bool
) -> None:
    module = stack(dtype)
    adapters = adapters_of(module, ranks, dtype, biases=biases)
    merged = adapters.merge(as_network(module))
    adapters.to_peft(tmp_path, module)
    x = normal(20, 5, of="inputs", dtype=dtype)
    before = module(x)
    loaded = peft.PeftModel.from_pretrained(module, str(tmp_path))
    assert not loaded.training
    found, wanted = loaded(x), merged(x.mT).mT
    torch.testing.assert_close(found, wanted, rtol=100 * torch.finfo(dtype).eps, atol=0)
    changed = biases or any(ranks)
    assert changed == (not torch.allclose(found, before))
    adapted = {
        n for n, layer in loaded.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    names = [f"base_model.model.{n}" for n in ("0", "2.0", "3", "10.1")]
    assert adapted == {name for name, rank in zip(names, ranks, strict=True) if rank}
    if any(ranks):
        alone = loaded.merge_and_unload()
        torch.testing.assert_close(alone(x), wanted, rtol=100 * torch.finfo(dtype).eps, atol=0)


def test_a_linear_network_without_biases(tmp_path: Path) -> None:
    module = stack(torch.float64, bias=False)
    linear = nn.Sequential(*[layer for layer in module.modules() if isinstance(layer, nn.Linear)])
    adapters = adapters_of(linear, [1, 0, 2, 3], torch.float64, biases=False)
    wanted = adapters.merge(LinearNetwork.from_sequential(linear))
    adapters.to_peft(tmp_path / "new" / "folder", linear)
    x = normal(20, 5, of="inputs")
    found = peft.PeftModel.from_pretrained(linear, str(tmp_path / "new" / "folder"))(x)
    torch.testing.assert_close(found, wanted(x.mT).mT, rtol=1e-12, atol=0)


def test_numbers_take_the_type_of_the_module(tmp_path: Path) -> None:
    module = stack(torch.float32)
    adapters = adapters_of(module, [2, 1, 3, 2], torch.float64, biases=True)
    wanted = adapters.merge(as_network(module))
    adapters.to_peft(tmp_path, module)
    x = normal(20, 5, of="inputs", dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(module, str(tmp_path))(x)
    torch.testing.assert_close(found, wanted(x.mT).mT, rtol=1e-4, atol=1e-4)


def test_a_tuned_bias_of_a_layer_without_one_is_refused(tmp_path: Path) -> None:
    module = stack(torch.float64, bias=False)
    adapters = adapters_of(module, [1, 1, 1, 1], torch.float64, biases=True)
    said = r"module must be with biases where these are tuned; got none in layer 0: make the layer"
    with pytest.raises(InputError, match=said):
        adapters.to_peft(tmp_path, module)
    assert not any(tmp_path.iterdir())
    # Where it changes nothing it may lack.
    still = Adapters(adapters.updates, tuple(torch.zeros_like(b) for b in adapters.bias_updates))
    still.to_peft(tmp_path, module)
    peft.PeftModel.from_pretrained(module, str(tmp_path))


def test_what_the_adapters_do_not_fit_is_refused(tmp_path: Path) -> None:
    module = stack(torch.float64)
    adapters = adapters_of(module, [1, 1, 1, 1], torch.float64, biases=True)
    for wrong, said in (
        (nn.Linear(5, 7), "module must be the network's torch.nn.Sequential; got Linear"),
        (module[:4], r"module must be of Linear layers \[\(7, 5\), .*as the adapters are; got"),
    ):
        with pytest.raises(InputError, match=said):
            adapters.to_peft(tmp_path, wrong)  # type: ignore[arg-type]
    batch = FNN.random(2, 3, batch_shape=(2,))
    update = LowRank(torch.zeros(2, 3, 1).double(), torch.zeros(2, 3, 1).double())
    with pytest.raises(InputError, match=r"of one network; got batch shape \(2,\): pick one first"):
        Adapters((update, update)).to_peft(tmp_path, batch[0].to_sequential())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = stack(torch.float64)
    adapters = adapters_of(module, [1, 1, 1, 1], torch.float64, biases=False)
    with pytest.raises(ResultsError, match=r"cannot be written \(.*\): make room") as caught:
        adapters.to_peft(tmp_path / "file", module)
    assert "\n" not in str(caught.value)
