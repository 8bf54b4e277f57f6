"""The map-style dataset equals SuperGradients' own transforms, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from portrait_dist.data.map_dataset import AISegmentDataset
from portrait_dist.errors import DamagedDataError, InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


def by_hand(image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """ToTensor and normalisation without torchvision."""
    levels = np.asarray(image).astype(np.float32) / 255
    normalised = (levels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised.transpose(2, 0, 1).copy()), torch.from_numpy(
        np.asarray(mask).astype(np.float32)[None] / 255
    )


def test_train_samples_equal_those_of_supergradients_transforms(split_dir: Path) -> None:
    import portrait_dist.training.sg_adapter  # noqa: F401  # isort: skip  lets SuperGradients be imported without its optional parts
    from super_gradients.training.samples import SegmentationSample  # isort: skip
    from super_gradients.training.transforms import transforms as sg  # isort: skip

    chain = [sg.SegRandomFlip(0.5), sg.SegColorJitter(0.5, 0.5, 0.5), sg.SegResize(h=96, w=80)]
    dataset = AISegmentDataset(split_dir, "train", input_height=96, input_width=80)
    flipped = 0
    for index in range(6):
        pair = dataset.pairs[index]
        sample = SegmentationSample(
            Image.open(Path(pair.image)).convert("RGB"),
            np.asarray(Image.open(Path(pair.matte)))[..., -1],
        )
        seed(index)
        for transform in chain:
            sample = transform.apply_to_sample(sample)
        expected = by_hand(Image.fromarray(sample.image), Image.fromarray(sample.mask))
        seed(index)
        image, mask = dataset[index]
        torch.testing.assert_close(image, expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(mask, expected[1], rtol=0, atol=0)
        random.seed(index)
        flipped += random.random() < 0.5
    assert 0 < flipped < 6


def test_validation_samples_are_only_resized(split_dir: Path) -> None:
    dataset = AISegmentDataset(split_dir, "val")
    assert len(dataset) == 7
    pair = dataset.pairs[0]
    expected = by_hand(
        Image.open(Path(pair.image)).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR),
        Image.open(Path(pair.matte)).getchannel("A").resize((256, 256), Image.Resampling.NEAREST),
    )
    image, mask = dataset[0]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == (
        (3, 256, 256),
        torch.float32,
        (1, 256, 256),
        torch.float32,
    )
    torch.testing.assert_close(image, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mask, expected[1], rtol=0, atol=0)
    assert torch.equal(dataset[0][0], image)
    assert 0 < float(mask.mean()) < 1


def test_a_data_loader_with_worker_processes_gives_every_sample_once(split_dir: Path) -> None:
    dataset = AISegmentDataset(split_dir, "test", 32, 24)
    batches = list(DataLoader(dataset, batch_size=4, num_workers=2))
    images, masks = (torch.cat(column) for column in zip(*batches, strict=True))
    assert images.shape == (7, 3, 32, 24)
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(7)]))
    assert torch.equal(masks, torch.stack([dataset[index][1] for index in range(7)]))


def test_a_tree_arranged_by_other_means_is_read(split_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(split_dir / "val", tmp_path / "val")
    ours, other = (
        AISegmentDataset(split_dir, "val", 16, 16),
        AISegmentDataset(tmp_path, "val", 16, 16),
    )
    assert len(ours) == len(other) == 7
    assert torch.equal(ours[3][0], other[3][0])


def test_a_missing_and_a_cut_off_file_are_named(split_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(split_dir, tmp_path / "data")
    dataset = AISegmentDataset(tmp_path / "data", "val", 16, 16)
    image, matte = Path(dataset.pairs[0].image), Path(dataset.pairs[1].matte)
    image.write_bytes(image.read_bytes()[:30_000])
    matte.unlink()
    with pytest.raises(DamagedDataError, match=str(image)):
        dataset[0]
    with pytest.raises(DamagedDataError, match=str(matte)):
        dataset[1]


def test_a_wrong_split_or_folder_is_refused(split_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'val'"):
        AISegmentDataset(split_dir, "valid")
    with pytest.raises(InputError, match="portrait-dist prepare"):
        AISegmentDataset(tmp_path, "train")
