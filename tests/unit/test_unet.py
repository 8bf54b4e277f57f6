"""The U-Net is the PyTorch Hub one: names, shapes, values."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from portrait_dist.errors import InputError
from portrait_dist.models import UNet


def hub_shapes(features: int = 32) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hub model's state dict, by rule."""
    shapes: dict[str, tuple[int, ...]] = {}

    def block(module: str, name: str, fan_in: int, width: int) -> None:
        for i, channels in ((1, fan_in), (2, width)):
            shapes[f"{module}.{name}conv{i}.weight"] = (width, channels, 3, 3)
            for entry in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{module}.{name}norm{i}.{entry}"] = (width,)
            shapes[f"{module}.{name}norm{i}.num_batches_tracked"] = ()

    for level, fan_in in ((1, 3), (2, features), (3, 2 * features), (4, 4 * features)):
        block(f"encoder{level}", f"enc{level}", fan_in, features * 2 ** (level - 1))
    block("bottleneck", "bottleneck", 8 * features, 16 * features)
    for level in (4, 3, 2, 1):
        width = features * 2 ** (level - 1)
        shapes[f"upconv{level}.weight"] = (2 * width, width, 2, 2)
        shapes[f"upconv{level}.bias"] = (width,)
        block(f"decoder{level}", f"dec{level}", 2 * width, width)
    return {**shapes, "conv.weight": (1, features, 1, 1), "conv.bias": (1,)}


def hub_forward(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The Hub model in eval mode, written out with functions of its state dict."""

    def block(module: str, name: str, x: torch.Tensor) -> torch.Tensor:
        for i in (1, 2):
            x = F.conv2d(x, state[f"{module}.{name}conv{i}.weight"], padding=1)
            mean, var, weight, bias = (
                state[f"{module}.{name}norm{i}.{entry}"]
                for entry in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5).relu()
        return x

    def up(level: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = F.conv_transpose2d(
            x, state[f"upconv{level}.weight"], state[f"upconv{level}.bias"], stride=2
        )
        return block(f"decoder{level}", f"dec{level}", torch.cat((x, skip), dim=1))

    one = block("encoder1", "enc1", x)
    two = block("encoder2", "enc2", F.max_pool2d(one, 2))
    three = block("encoder3", "enc3", F.max_pool2d(two, 2))
    four = block("encoder4", "enc4", F.max_pool2d(three, 2))
    x = block("bottleneck", "bottleneck", F.max_pool2d(four, 2))
    for level, skip in ((4, four), (3, three), (2, two), (1, one)):
        x = up(level, x, skip)
    return torch.sigmoid(F.conv2d(x, state["conv.weight"], state["conv.bias"]))


def hub_state(features: int = 32) -> dict[str, torch.Tensor]:
    """A state dict as the Hub model would save it, with statistics as after training."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in hub_shapes(features).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        else:
            state[name] = torch.rand(shape, generator=generator) + (
                0.0 if name.endswith(("bias", "mean")) else 0.5
            )
    return state


def test_it_has_the_hub_models_parameters_by_name_and_shape() -> None:
    model = UNet(in_channels=3, out_channels=1, init_features=32)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == hub_shapes()
    assert list(model.state_dict()) == list(hub_shapes())
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_763_041


def test_a_hub_state_dict_loads_strictly_and_gives_the_hub_models_output(tmp_path: Path) -> None:
    torch.save(hub_state(), tmp_path / "hub.pt")
    model = UNet()
    model.load_state_dict(torch.load(tmp_path / "hub.pt", weights_only=True), strict=True)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = model.eval()(image), hub_forward(hub_state(), image)
    assert ours.shape == (2, 1, 64, 96)
    assert theirs.std() > 0.05  # not a constant that anything would match
    assert (ours - theirs).abs().max() <= 1e-6


def test_forward_is_the_sigmoid_of_the_logits() -> None:
    model = UNet(init_features=4).eval()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(image), torch.sigmoid(model(image, return_logits=True)))
    torch.testing.assert_close(model(image, return_logits=True), model.logits(image))


def test_group_norm_shares_nothing_across_samples() -> None:
    model = UNet(init_features=4, norm="group").train()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))
    assert set(model.state_dict()) == {
        name
        for name in hub_shapes()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("channels", [(3, 1), (4, 1), (3, 2)])
def test_settings_build_the_same_network_again(norm: str, channels: tuple[int, int]) -> None:
    model = UNet(*channels, init_features=6, norm=norm)
    settings: dict[str, Any] = model.settings
    UNet(**settings).load_state_dict(model.state_dict())


def test_settings_are_what_checkpoints_always_held() -> None:
    assert UNet(init_features=6, norm="group").settings == {"init_features": 6, "norm": "group"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, "norm=layer: it is batch or group"),
        ({"init_features": 0}, "at least 1 channel"),
        ({"in_channels": -3}, "at least 1 channel"),
    ],
)
def test_a_network_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UNet(**arguments)


def test_a_size_that_does_not_halve_four_times_is_named() -> None:
    with pytest.raises(InputError, match="multiples of 16, not 40×32"):
        UNet(init_features=2)(torch.zeros(1, 3, 40, 32))
