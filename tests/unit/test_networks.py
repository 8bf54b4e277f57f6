"""Any network by name: the contract, the names, and that no code is imported unasked."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from portrait_dist import checkpoints, config
from portrait_dist.errors import InputError
from portrait_dist.inference import PortraitSegmenter
from portrait_dist.models import MaskNetwork, UNet, build, check
from portrait_dist.training import components
from tests.cli import assert_one_line, call
from tests.nets import Classes, Counted, Flat, Halved, Probabilities

torch.set_num_threads(1)
NETS = str(Path(__file__).parent.parent / "nets.py")
HALVED = f"{NETS}:Halved"


# The contract ---


def test_what_a_network_gives_is_measured() -> None:
    assert check(Halved(), (32, 32)).output == "logits"
    assert check(Probabilities(), (32, 32)).output == "probabilities"
    assert check(Halved(), (32, 32)).stride == 16
    assert check(Probabilities(), (32, 32)).stride == 32
    assert check(Halved(), (33, 32)).stride == 0
    assert check(Halved(), (32, 32)).channels_last
    assert not check(Flat(), (32, 32)).channels_last


def test_a_check_changes_neither_the_network_nor_the_random_state() -> None:
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Dropout())
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    check(network, (32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_syncbatchnorm_is_checked_on_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes it on GPUs only as soon as there are ranks."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Conv2d(4, 1, 1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert check(network, (32, 32)).output == "logits"
    assert isinstance(network[1], nn.SyncBatchNorm)


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


class Computes(Returns):
    """What a function makes of a layer's output."""

    def __init__(self, output: Any) -> None:
        super().__init__(output)
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.output(self.layer(x))


class Embeds(Computes):
    def __init__(self) -> None:
        super().__init__(torch.relu)
        self.table = nn.Embedding(2, 1, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.table(torch.zeros(1, dtype=torch.int64))


class Grows(Computes):
    seen: Tensor

    def __init__(self, output: Any) -> None:
        super().__init__(output)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        self.seen = torch.cat([self.seen, x.mean().detach()[None]])
        return super().forward(x)


class Extra(Computes):
    def get_extra_state(self) -> Any:
        return {"steps": 3}


def spoilt(y: Tensor) -> Tensor:
    """Change in place what the gradient is computed from."""
    z = y.sigmoid()
    return z.exp() + z.mul_(2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Classes(), r"Classes: it returns \(1, 2, 32, 32\), not a mask with one channel|2, 2, 32"),
        (Returns(lambda x: "mask"), "it returns str, not a mask"),
        (Returns(lambda x: x[:1, :1]), "1 masks for 2 images"),
        (Returns(lambda x: x @ torch.zeros(5, 5)), r"fails for images 2×3×32×32 \(RuntimeError"),
        (Returns(lambda x: x[:, :1] > 0), r"torch\.bool, not logits or probabilities"),
        (Returns(lambda x: x[:, :1, :0]), r"its mask has no pixels"),
        (Returns(lambda x: x[:, :1].to("meta")), r"its mask is on meta, the images are not"),
        (Returns(lambda x: x[:, :1]), r"its mask depends on no weight that learns"),
        (Computes(lambda y: y.detach()), r"its mask depends on no weight that learns"),
        (Computes(lambda y: y * float("nan")), r"its mask is not finite"),
        (Computes(spoilt), r"has no gradient \(Runtime"),
        (Computes(threading.Lock()), r"cannot be copied \(TypeError"),
        (nn.LazyConv2d(1, 1), r"has lazy layers"),
        (Embeds(), r"sparse gradients"),
        (Grows(torch.relu), r"'seen' has another shape after a step"),
        (Extra(torch.relu), r"'_extra_state' of its state_dict is no tensor"),
    ],
)
def test_a_network_that_breaks_the_contract_is_refused_in_one_line(
    network: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        check(network, (32, 32))
    assert "\n" not in str(error.value)


def test_masks_reach_the_size_of_the_image_and_the_form_that_is_asked_for() -> None:
    images = torch.randn(2, 3, 32, 48)
    for network in (Halved(), Probabilities()):
        wrapped = MaskNetwork(network, check(network, (32, 32))).eval()
        size = images if isinstance(network, Halved) else images[..., :32]
        logits, probabilities = wrapped(size, return_logits=True), wrapped(size)
        assert logits.shape == probabilities.shape == (2, 1, *size.shape[-2:])
        assert torch.allclose(torch.sigmoid(logits), probabilities, atol=1e-6)


def test_auxiliary_outputs_count_in_training_with_their_weight_and_nowhere_else() -> None:
    network, target = Halved(), torch.rand(2, 1, 32, 32)
    contract = check(network, (32, 32))
    raw = network(torch.randn(2, 3, 32, 32))
    masks = contract.read(raw, (32, 32), logits=True, training=True)
    assert len(masks.auxiliary) == 1
    assert torch.equal(
        contract.read(raw["out"], (32, 32), logits=True, training=True).main, masks.main
    )
    assert not contract.read(raw, (32, 32), logits=True, training=False).auxiliary
    loss = components.make_loss(config.load(None, ["loss.aux_weight=0.25"]), contract)
    plain = components.make_loss(config.load(None, []), None)
    assert float(loss(masks, target).detach()) == pytest.approx(
        float((plain(masks.main, target) + 0.25 * plain(masks.auxiliary[0], target)).detach())
    )


# Names ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unnet", r"there is none of this name\. Did you mean 'unet'"),
        ("nowhere.py:Net", "there is no such file"),
        (f"{NETS}:Halfed", "Halfed is not there. Did you mean 'Halved'"),
        ("no_such_package:Net", "there is no module no_such_package"),
        (f"{NETS}:STOP_IN_STEP", "cannot be called"),
        ("sg:pp_light_t_seg", "SuperGradients has none of this name. Did you mean 'pp_lite_t_seg'"),
        ("segmentation_models_pytorch.Unett", "Did you mean 'Unet'"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name)


def test_arguments_reach_the_network_and_wrong_ones_are_named() -> None:
    network = build(HALVED, {"width": 6})
    assert network.state_dict()["first.weight"].shape[0] == 6
    with pytest.raises(InputError, match=r"width='wide'.*arguments are model\.args\.NAME=VALUE"):
        build(HALVED, {"width": "wide"})


def test_a_librarys_network_gives_one_mask_and_fetches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it opens a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    args = {"encoder_name": "mobilenet_v2", "decoder_channels": [16, 8, 8, 4, 4]}
    network = build("segmentation_models_pytorch.Unet", args, trust_code=False)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)


def test_arguments_are_values_of_yaml_from_the_command_line_and_from_recipes(
    tmp_path: Path,
) -> None:
    given = ["width=6", "rate=1e-3", "flag=true", "sizes=[1, 2]", "text='7'", "deep.er=x"]
    loaded = config.load(None, [f"model.args.{one}" for one in given])
    expected = {
        "width": 6,
        "rate": 1e-3,
        "flag": True,
        "sizes": [1, 2],
        "text": "7",
        "deep": {"er": "x"},
    }
    assert loaded.model.args == expected
    path = tmp_path / "again.yaml"
    path.write_text(loaded.to_yaml())
    assert config.load(str(path)) == loaded
    assert config.load(None, []).model.args == {}
    assert_one_line(call("train", "model.args=5"), 2, "write model.args.NAME=VALUE")
    assert_one_line(call("train", "model.args.day=2020-01-01"), 2, "a value is a number")
    assert_one_line(call("train", "model.args.a=[1"), 2, "no value")


# Through the commands ---

COMMON = ("--recipe", str(Path(__file__).parent.parent / "plain.yaml"))
SMALL = (
    "train.batch_size=8",
    "train.max_batches=2",
    "train.average_best=false",
    "train.threads=1",
    "model.args.width=6",
)


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's network, one epoch."""
    root = tmp_path_factory.mktemp("runs")
    arguments = [f"data.shards={tiny_shards}", f"run.root={root}", "run.name=own", *SMALL]
    result = call("train", *COMMON, f"model.name={HALVED}", *arguments, "train.max_epochs=1")
    assert result.exit_code == 0, result
    assert "gives logits" in result.stderr
    return root / "own"


def test_a_checkpoint_says_how_to_build_the_network_and_holds_the_users_names(run: Path) -> None:
    state = checkpoints.read(run / "ckpt_best.pth")
    assert state["portrait_dist"]["build"] == {
        "name": HALVED,
        "args": {"width": 6},
        "output": "logits",
        "stride": 16,
        "channels_last": True,
    }
    network = Halved(6)
    network.load_state_dict(state["net"])
    model, _ = checkpoints.load_model(run / "ckpt_best.pth", trust_code=True)
    images = torch.randn(1, 3, 32, 32)
    raw = network.eval()(images)["out"]
    enlarged = nn.functional.interpolate(raw, (32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(model(images, return_logits=True), enlarged)


def test_a_users_code_is_imported_only_where_somebody_vouches_for_it(
    run: Path, tiny_shards: Path, raw_tree: Path, tmp_path: Path
) -> None:
    state, photo = checkpoints.read(run / "ckpt_best.pth"), str(next(raw_tree.rglob("*.jpg")))
    evil, mark = tmp_path / "evil.py", tmp_path / "executed"
    evil.write_text(f"open({str(mark)!r}, 'w').close()\nclass Net: ...\n")
    for name in (f"{evil}:Net", "os:system", "segmentation_models_pytorch.utils.functional:iou"):
        state["portrait_dist"]["build"]["name"] = name
        checkpoints.save_atomically(tmp_path / "evil.pth", state)
        for command in (
            ("evaluate", "--data", str(tiny_shards)),
            ("predict", photo, "--out", str(tmp_path / "out")),
            ("export", "--format", "pt2", "--out", str(tmp_path / "a.pt2")),
        ):
            result = call(command[0], "--checkpoint", tmp_path / "evil.pth", *command[1:])
            assert result.exit_code == 2, result
            assert "Traceback" not in result.stderr
    assert not mark.exists()
    with pytest.raises(InputError, match="add --trust-code"):
        checkpoints.load_model(run / "ckpt_best.pth")


def test_evaluate_predict_export_and_report_take_a_users_network(
    run: Path, tiny_shards: Path, raw_tree: Path, tmp_path: Path
) -> None:
    checkpoint = ("--checkpoint", str(run / "ckpt_best.pth"), "--trust-code", "--json")
    scores = call("evaluate", *checkpoint, "--data", tiny_shards, "--split", "val")
    assert scores.exit_code == 0, scores
    assert scores.json["samples"] == 7
    saved = checkpoints.read_info(run / "ckpt_best.pth")
    assert scores.json["iou"] == pytest.approx(saved.acc, abs=1e-6)
    photo = sorted(raw_tree.rglob("*.jpg"))[0]
    for fit in ("letterbox", "cover"):
        out = tmp_path / fit
        masks = call("predict", *checkpoint, photo, "--out", out, "--only", "mask", "--fit", fit)
        assert masks.exit_code == 0, masks
        assert len(masks.json["files"]) == 1
    exported = call("export", *checkpoint, "--format", "pt2", "--out", tmp_path / "net.pt2")
    assert exported.exit_code == 0, exported
    assert exported.json["largest_difference"] < 1e-4
    report = call("report", run, "--trust-code", "--json")
    assert report.exit_code == 0, report
    assert report.json["val_iou"] == pytest.approx(saved.acc, abs=1e-6)
    unasked = call("report", run, "--json")
    assert "add --trust-code" in unasked.json["no_pictures"]


def test_a_network_that_takes_no_channels_last_images_gets_none(
    tiny_shards: Path, raw_tree: Path, tmp_path: Path
) -> None:
    """Its ``view`` raises otherwise; channels-last is the default."""
    arguments = (f"model.name={NETS}:Flat", f"data.shards={tiny_shards}", f"run.root={tmp_path}")
    own = (*SMALL[:-1], "train.max_epochs=1", "run.name=flat")
    trained = call("train", *COMMON, *arguments, *own, "train.channels_last=true")
    assert trained.exit_code == 0, trained
    assert "takes no channels-last images" in trained.stderr
    checkpoint = ("--checkpoint", str(tmp_path / "flat" / "ckpt_best.pth"), "--trust-code")
    photo = next(raw_tree.rglob("*.jpg"))
    for command in (
        ("evaluate", *checkpoint, "--data", tiny_shards),
        ("predict", *checkpoint, photo, "--out", tmp_path / "masks"),
        ("export", *checkpoint, "--format", "pt2", "--out", tmp_path / "net.pt2"),
    ):
        done = call(*command)
        assert done.exit_code == 0, done


def test_a_network_that_torch_cannot_export_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    state = {"net": Counted().state_dict(), "epoch": 0, "acc": 0.5}
    build = {"name": f"{NETS}:Counted", "args": {}, "output": "logits", "stride": 16}
    state["portrait_dist"] = {"build": build}
    checkpoint, out = tmp_path / "net.pth", tmp_path / "out"
    checkpoints.save_atomically(checkpoint, state)
    for format in ("onnx", "pt2"):
        done = call(
            "export",
            "--trust-code",
            *("--checkpoint", checkpoint, "--size", "32x32", "--format", format, "--out", out),
        )
        assert_one_line(done, 2, "torch cannot export", "Counted", "see docs/networks.md")
    assert not out.exists()


def test_only_the_unet_is_computed_in_8_bit_integers(run: Path) -> None:
    segmenter = PortraitSegmenter.from_checkpoint(run / "ckpt_best.pth", trust_code=True)
    with pytest.raises(InputError, match=r"8-bit integers"):
        segmenter.calibrate([])


def test_a_run_keeps_its_network(run: Path, tiny_shards: Path) -> None:
    arguments = [f"data.shards={tiny_shards}", f"run.root={run.parent}", "run.name=own", *SMALL]
    result = call("train", *COMMON, *arguments, "train.max_epochs=2", "model.name=unet")
    assert_one_line(result, 2, "model.name was", "now it is unet")
    result = call(
        "train", *COMMON, *arguments, "train.max_epochs=2", f"model.name={HALVED}",
        "model.args.width=8",
    )  # fmt: skip
    assert_one_line(result, 2, "model.args was {'width': 6}")


def test_a_network_that_breaks_the_contract_leaves_no_run_folder(
    tiny_shards: Path, tmp_path: Path
) -> None:
    arguments = [f"data.shards={tiny_shards}", f"run.root={tmp_path}", *SMALL[:-1]]
    result = call("train", *COMMON, *arguments, f"model.name={NETS}:Classes", "run.name=none")
    assert_one_line(result, 2, "Classes", "one channel")
    assert not list((tmp_path / "none").glob("*.pth"))
    assert not (tmp_path / "none" / "config.yaml").exists()
    result = call("train", *COMMON, *arguments, "model.name=sg:unknown", "model.init_features=2")
    assert_one_line(result, 2, "model.init_features is the U-Net's")


def test_weights_that_fit_are_taken_and_the_others_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = Halved(6).state_dict()
    given["main.weight"] = torch.zeros(5, 5)
    given["head"] = given.pop("main.bias")
    checkpoints.save_atomically(tmp_path / "given.pth", {"net": given})
    keys = [f"model.name={HALVED}", "model.args.width=6", f"model.weights={tmp_path / 'given.pth'}"]
    with pytest.raises(InputError, match=r"another form.*1 missing: main\.bias; 1 unknown: head"):
        components.make_network(config.load(None, keys), (32, 32), 2, new=True)
    loose = config.load(None, [*keys, "model.strict=false"])
    network = components.make_network(loose, (32, 32), 2, new=True).module
    assert torch.equal(network.state_dict()["first.weight"], given["first.weight"])
    said = capfd.readouterr().err
    assert (
        "6 of 8 taken; 1 missing: main.bias; 1 unknown: head; 1 of another shape: main.weight"
        in said
    )


def test_old_checkpoints_are_the_unet(tmp_path: Path) -> None:
    checkpoints.save_atomically(tmp_path / "old.pth", {"net": UNet(init_features=2).state_dict()})
    model, info = checkpoints.load_model(tmp_path / "old.pth")
    assert isinstance(model, UNet)
    assert info.build is None
