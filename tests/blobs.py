"""Small networks: one trained within seconds to find a bright ellipse, one of random weights."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from portrait_dist.inference.placement import fit_photo, shrink
from portrait_dist.losses import SoftIoULoss
from portrait_dist.models import UNet
from portrait_dist.preprocessing import DEFAULT_ASPECT, MEAN, STD

SIZE = (64, 64)


def photo(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a reddish ellipse before a bluish ground.

    Returns:
        RGB uint8 [H, W, 3] and its alpha, float32 [H, W].
    """
    random = np.random.default_rng(seed)
    alpha = np.zeros((height, width), np.float32)
    side = min(height, width)
    centre = (int(width * random.uniform(0.4, 0.6)), int(height * random.uniform(0.4, 0.6)))
    axes = (int(side * random.uniform(0.2, 0.35)), int(side * random.uniform(0.25, 0.45)))
    cv2.ellipse(alpha, centre, axes, 0, 0, 360, 1.0, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), side / 100)
    person, ground = (
        random.uniform((0.6, 0.3, 0.1), (0.9, 0.5, 0.3)),
        random.uniform((0.1, 0.3, 0.5), (0.3, 0.5, 0.8)),
    )
    image = (
        ground + alpha[..., None] * (person - ground) + random.normal(0, 0.03, (height, width, 1))
    )
    return (image.clip(0, 1) * 255).round().astype(np.uint8), alpha


def framed(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Letterbox such an image of any shape to the network's size: ellipses of many sizes."""
    image, alpha = photo(height, width, seed)
    placement = fit_photo(height, width, SIZE, "letterbox", DEFAULT_ASPECT)
    layer = shrink(np.repeat((alpha * 255).astype(np.uint8)[..., None], 3, axis=2), placement)[
        ..., 0
    ]
    return shrink(image, placement), layer / np.float32(255)


def train(steps: int = 100) -> UNet:
    """Train on one thread: sums in another order would make another network of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(steps)
    finally:
        torch.set_num_threads(threads)


def _train(steps: int) -> UNet:
    torch.manual_seed(0)
    model, loss = UNet(init_features=4), SoftIoULoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    random = np.random.default_rng(0)
    sizes = random.integers(60, 240, (32, 2)).tolist()
    pairs = [framed(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    images = (
        torch.from_numpy(np.stack([image for image, _ in pairs])).float() / 255 - torch.tensor(MEAN)
    ) / torch.tensor(STD)
    images = images.permute(0, 3, 1, 2).contiguous()
    alphas = torch.from_numpy(np.stack([alpha for _, alpha in pairs])).unsqueeze(1)
    for step in range(steps):
        part = slice(step % 4 * 8, step % 4 * 8 + 8)
        value = loss(model(images[part], return_logits=True), alphas[part])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model.eval()


def random_network(norm: str = "batch", features: int = 4) -> UNet:
    """Return a network with random weights, biases and statistics, none zero or one by chance."""
    torch.manual_seed(3)
    model = UNet(init_features=features, norm=norm).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


def save(
    model: UNet, path: Path, size: tuple[int, int] = SIZE, aspect: float = DEFAULT_ASPECT
) -> Path:
    """A checkpoint with the content that training writes."""
    torch.save(
        {
            "net": model.state_dict(),
            "portrait_dist": {
                "model": model.settings,
                "size": list(size),
                "aspect": aspect,
                "config": {},
            },
        },
        path,
    )
    return path
