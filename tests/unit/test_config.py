"""Settings: typed, bounded, named in errors with file and line; recipes of any bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from portrait_dist import config, recipes
from portrait_dist.errors import InputError
from tests.cli import assert_one_line, call


def test_the_configuration_reads_back_equal(tmp_path: Path) -> None:
    loaded = config.load("tutorial", ["train.lr=3e-4", "train.ema=true", "run.name=a/b"])
    path = tmp_path / "again.yaml"
    path.write_text(loaded.to_yaml())
    assert config.load(str(path)) == loaded


def test_a_configuration_of_an_older_version_loads_and_a_key_that_is_gone_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("recipe: tutorial\nrun:\n  root: runs\n  name: ''\ntrain:\n  lr: 0.001\n")
    assert config.load(str(path)).run_dir == Path("runs/tutorial")
    path.write_text(path.read_text() + "  epochs: 3\n")
    with pytest.raises(
        InputError,
        match=r"config\.yaml, line 7: there is no key 'train\.epochs'\. "
        r"Did you mean 'train\.max_epochs'",
    ):
        config.load(str(path))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("train.lr=inf", "train.lr is a number, not 'inf'"),
        ("train.lr=nan", "train.lr is a number, not 'nan'"),
        ("train.lr=1e308", "train.lr is at most 1000"),
        ("train.lr=0", "train.lr is above 0"),
        ("loss.bce_weight=1e308", "loss.bce_weight is at most 1000000"),
        ("train.weight_decay=Infinity", "train.weight_decay is a number"),
        ("train.timeout_seconds=1e308", "train.timeout_seconds is at most 2592000"),
        ("data.cache_gigabytes=inf", "data.cache_gigabytes is a number"),
        ("train.seed=9223372036854775808", "train.seed is at most"),
        ("train.seed=-1", "train.seed is at least 0"),
        ("train.threads=2147483648", "train.threads is at most 4096"),
        ("model.init_features=2147483648", "model.init_features is at most 4096"),
        ("train.batch_size=１２", "train.batch_size is a whole number"),
        ("train.batch_size=" + "9" * 5000, "(5,000 characters)"),
        ("train.batch_size=1.5", "train.batch_size is a whole number, not '1.5'"),
        ("train.compile=maybe", "train.compile is true or false, not 'maybe'"),
        ("train.precision=fp8", "one of fp32, bf16, not 'fp8'. Did you mean 'fp32'?"),
        ("train.optimizer=" + "z" * 5000, "(5,000 characters)"),
        ("run.name=../elsewhere", "it leaves run.root"),
        ("run.name=a/../../elsewhere", "it leaves run.root"),
        ("run.name=/elsewhere", "it leaves run.root"),
        ("run.name=.", "it names run.root itself"),
        ("run.name=a\0b", "NUL"),
        ("run.name=\ud800", "a file can be named with"),
        ("run.name=" + "ü" * 128, "longer than 255 bytes"),
        ("run.root=" + "x" * 256, "longer than 255 bytes"),
        ("run.root=" + "x/" * 3000, "longer than 4095 bytes"),
        ("run.root=a\0b", "NUL"),
        ("model.weights=" + "y" * 5000, "longer than 255 bytes"),
        ("model.weights=\ud800.pth", "a file can be named with"),
        ("data.shards=http://[::1", "cannot be read"),
        ("data.shards=" + "x" * 300, "longer than 255 bytes"),
        ("x" * 5000 + "=1", "(5,000 characters)"),
    ],
)
def test_a_value_out_of_bounds_is_one_short_line_with_exit_code_2(
    argument: str, expected: str
) -> None:
    result = call("train", argument)
    assert_one_line(result, 2, expected)
    assert len(result.lines[-1]) < 400


def test_every_number_is_bounded_on_both_sides() -> None:
    for name, setting in config.settings().items():
        if setting.kind in (int, float):
            for text in ("-2", "1e40" if setting.kind is float else "9" * 30):
                with pytest.raises(InputError, match=name.replace(".", r"\.")):
                    config.load(None, [f"{name}={text}"])


BOMB = "a: &a [x, x]\n" + "".join(
    f"{after}: &{after} [*{before}, *{before}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"train:\n  lr: [\n", "line 3: not YAML"),
        (b"train:\n  lr: 0.1\n\ttab: 1\n", "line 3: not YAML"),
        (b"- a\n- b\n", "line 1: a recipe is a mapping"),
        (b"train:\n  lr: [1, 2]\n", "line 2: train.lr is a number, not a list"),
        (b"train:\n  lr: 1\n  lr: 2\n", "line 3: 'train.lr' stands in line 2 already"),
        (b"train:\n  lr: 1\ntrain:\n  seed: 2\n", "line 3: 'train' stands in line 1 already"),
        (b"train.lr: 1\ntrain:\n  lr: 2\n", "line 3: 'train.lr' stands in line 1 already"),
        (b"train:\n  lr: 1\n  \xe4: 2\n", "line 3: not UTF-8"),
        (b'run:\n  name: "a\\0b"\n', "it holds a NUL character"),
        (b"train:\n  lr: \x07\n", r"line 2: a control character ('\x07')"),
        (b"train: &x\n  lr: 1\n", "line 1: anchors"),
        (b"x: *y\n", "line 1: anchors"),
        (BOMB.encode(), "line 1: anchors"),
        (b"train: &t {x: *t}\n", "line 1: anchors"),
        (b"[" * 200_000, "line 1: nested too deeply"),
        (b"{a: " * 200_000, "line 1: nested too deeply"),
        (b"# " + b"x" * 2_000_000, "longer than 1,000,000 bytes"),
        (b"? [a, b]\n: 1\n", "line 1: a key is a word"),
        (b"train:\n  seed: 1\n...\n---\ntrain:\n  seed: 2\n", "line 4: not YAML"),
    ],
)
def test_a_recipe_of_any_bytes_is_refused_in_one_line_with_file_and_line(
    data: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(data)
    result = call("train", "--recipe", path)
    assert_one_line(result, 2, "odd.yaml", expected)
    assert len(result.lines) == 1


def test_a_recipe_that_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for recipe in (tmp_path / "fifo.yaml", Path("/dev/zero"), tmp_path):
        assert_one_line(call("train", "--recipe", recipe), 2, str(recipe))
    assert_one_line(call("train", "--recipe", "x" * 5000), 2, "no recipe 'x", "(5,000 characters)")
    assert_one_line(call("train", "--recipe", "tutoral"), 2, "Did you mean 'tutorial'")


def test_secrets_of_an_address_are_used_but_not_kept_or_shown() -> None:
    address = "http://bob:secret1@127.0.0.1:9/s?X-Amz-Signature=secret2"
    loaded = config.load(None, [f"data.shards={address}"])
    assert loaded.data.shards == address
    assert loaded.to_dict()["data"]["shards"] == "http://127.0.0.1:9/s"
    assert "secret" not in loaded.to_yaml()
    for argument in (f"data.shard={address}", f"train.lr={address}", address):
        with pytest.raises(InputError) as error:
            config.load(None, [argument])
        assert "secret" not in str(error.value)


def test_keys_are_listed_with_default_recipe_values_and_meaning() -> None:
    result = call("train", "--keys", "--recipe", "tutorial")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert lines["key"].split() == ["key", "default", "tutorial", "values", "meaning"]
    assert "full|block" in lines["data.order"]
    assert "0.0001" in lines["train.weight_decay"]
    assert set(lines) == {"key", *config.settings()}
    found = {one["name"]: one for one in call("train", "--keys", "--json").json["keys"]}
    recipe = yaml.safe_load((recipes.FOLDER / "aisegment_unet.yaml").read_text())
    assert found["train.lr"]["value"] == recipe["train"]["lr"]
    assert found["train.lr"]["default"] == 0.001
    assert found["train.lr"]["allowed"] == "number above 0 to 1,000"


def test_only_what_the_user_chose_counts_as_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 0.1\n")
    assert config.load("tutorial").given == frozenset()
    assert config.load(str(path), ["train.seed=1"]).given == {"train.lr", "train.seed"}
