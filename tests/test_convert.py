"""`convert` and published files: the original's numbers, presets, hints, errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import exactflow
import macow_export
from exactflow.cli.arguments import Convert
from exactflow.cli.convert import run as run_convert
from exactflow.models import registry
from exactflow.models.diffusion.model import DiscreteDiffusion
from exactflow.models.diffusion.openai import to_published
from exactflow.models.hdit.model import HDiT
from exactflow.paths.ode import Euler
from exactflow.sampling.path_solvers import Ancestral
from originals import close, golden_folder, recorded
from processes import call

UNETS = ["iddpm_uncond", "iddpm_cond", "adm_uncond", "adm_cond_new_attention_order"]
HDITS = ["hdit_neighborhood_global", "hdit_shifted_window_cond"]


def case(name: str) -> tuple[Path, dict, dict]:
    """A published file, its authors' settings, and the outputs of the original."""
    family, suffix = ("hdit", "pth") if name in HDITS else ("openai", "pt")
    told, _, expected = recorded(family, name, suffix)
    return golden_folder(family, name) / f"{name}.{suffix}", told, expected


def chain_hints(told: dict[str, Any]) -> dict[str, Any]:
    """The hints that OpenAI's file does not contain."""
    heads = "num_head_channels" not in told
    return {
        "height": told["image_size"],
        "num_heads": told["num_heads"] if heads else None,
        "head_channels": None if heads else told["num_head_channels"],
        "attention_order": "new" if told.get("use_new_attention_order") else "legacy",
        "dropout": 0.0,
        "schedule": told["noise_schedule"],
        "diffusion_steps": told["diffusion_steps"],
        "rescale_timesteps": told["rescale_timesteps"],
    }


def hourglass_hints(told: dict[str, Any]) -> dict[str, Any]:
    """The hints that bare weights of k-diffusion do not contain."""
    attention = [level["self_attn"] for level in told["levels"]]
    sizes = {k: v for kind in attention for k, v in kind.items() if k.endswith("_size")}
    names = [kind["type"] for kind in attention]
    return {"height": told["image_size"], "attention": names, **sizes}


def run_config(told: dict[str, Any]) -> dict[str, Any]:
    """The configuration that k-diffusion writes beside the weights."""
    levels, side = told["levels"], told["image_size"]
    model = {
        "type": "image_transformer_v2",
        "input_channels": told["in_channels"],
        "input_size": [side, side],
        "patch_size": [told["patch_size"]] * 2,
        "depths": [level["depth"] for level in levels],
        "widths": [level["width"] for level in levels],
        "self_attns": [level["self_attn"] for level in levels],
        "sigma_data": told["sigma_data"],
        "loss_weighting": told["weighting"],
    }
    return {"model": model}


def is_the_original_unet(model: Any, told: dict[str, Any], e: dict[str, Tensor]) -> None:
    """Network, strided chain, reverse step and training loss."""
    assert isinstance(model, DiscreteDiffusion)
    assert model.num_parameters == told["parameters"]
    close(model.network(e["x"], e["t"].float(), e.get("y")), e["out"])
    chain = model.chain.respaced(told["timestep_respacing"])
    d = {k.removeprefix("diffusion."): v for k, v in e.items() if k.startswith("diffusion.")}
    torch.testing.assert_close(chain.betas, d["betas"], rtol=1e-9, atol=1e-12)
    kernel = chain.reverse_kernel(model.predict_noise, d["x_t"], d["t"], d.get("y"), clip=True)
    close(kernel.mean, d["mean"])
    close(model.objective(chain, d["x_start"], d["t"], d["noise"], d.get("y")), d["loss"])


def is_the_original_hdit(model: Any, told: dict[str, Any], e: dict[str, Tensor]) -> None:
    """Network, denoised images and training loss."""
    assert isinstance(model, HDiT)
    assert model.num_parameters == told["parameters"]
    log_sigma, label = e["sigma"].log(), e.get("y")
    close(model.network(e["x"], log_sigma, label, e["aug_cond"]), e["network_output"])
    t = model.path.time_of(-2 * e["sigma"].double().log())
    x_t = e["x"] * (e["sigma"] * model.path.at(t).alpha).view(-1, 1, 1, 1)
    close(model.denoise(x_t.float(), t, label).mean, e["denoised"])
    close(model.denoising_loss(e["x"].clamp(-1, 1), e["noise"], log_sigma, label), e["loss"])


@pytest.mark.parametrize("name", [*UNETS, *HDITS])
def test_original_numbers_through_the_front_door_and_back_from_disk(
    name: str, tmp_path: Path
) -> None:
    file, told, expected = case(name)
    check = is_the_original_hdit if name in HDITS else is_the_original_unet
    hints = (hourglass_hints if name in HDITS else chain_hints)(told)
    model = exactflow.convert(file, **hints)
    assert not model.training
    check(model, told, expected)
    model.save_pretrained(tmp_path / "model")
    again = exactflow.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    check(again, told, expected)
    label = 1 if model.num_classes else None
    solver = Euler(3) if name in HDITS else Ancestral(3)
    drawn = [exactflow.sample(m, 2, label=label, solver=solver).x for m in (model, again)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", HDITS)
def test_a_configuration_in_the_file_needs_no_hints(name: str, tmp_path: Path) -> None:
    file, told, expected = case(name)
    weights, config = torch.load(file, weights_only=True), run_config(told)
    raw = {name: torch.zeros_like(value) for name, value in weights.items()}
    whole = {"config": config, "model": raw, "model_ema": weights, "step": 7}
    torch.save(whole, tmp_path / "run.pth")
    metadata = {"config": json.dumps(config, indent=4)}
    save_file(weights, tmp_path / "slim.safetensors", metadata=metadata)
    for found in ("run.pth", "slim.safetensors"):
        model = exactflow.convert(tmp_path / found)
        is_the_original_hdit(model, told, expected)
        assert model.config.sigma_data == told["sigma_data"]
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, tmp_path / "half.safetensors", metadata=metadata)
    slim = exactflow.convert(tmp_path / "half.safetensors")
    assert slim.dtype == torch.float32
    got = slim.get_parameter("network.patch_in.proj.weight")
    assert torch.equal(got, half["patch_in.proj.weight"].float())
    with pytest.raises(ValueError, match=r"image_shape: the file says .*16.*, not .*32"):
        exactflow.convert(tmp_path / "run.pth", height=32)
    with pytest.raises(ValueError, match=r"attention: the file says"):
        exactflow.convert(tmp_path / "run.pth", attention=["global", "global"])
    torch.save({**whole, "config": {"model": {**config["model"], "type": "v1"}}}, tmp_path / "v1")
    with pytest.raises(ValueError, match=r"image_transformer_v2.*got 'v1'"):
        exactflow.convert(tmp_path / "v1")


def saved(name: str, folder: Path) -> Path:
    """A preset with random weights, saved in its authors' format."""
    torch.manual_seed(0)
    model: Any = registry.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    match model.kind:
        case "macow":
            state: Any = macow_export.to_published(model)
        case "diffusion":
            state = to_published(model.network)
        case _:
            state = model.network.state_dict()
    torch.save(state, folder / f"{name}.pt")
    return folder / f"{name}.pt"


@pytest.mark.parametrize("name", ["iddpm-tiny", "iddpm-digits", "hdit-tiny", "macow-tiny"])
def test_a_preset_says_all_hints_and_is_kept_whole(name: str, tmp_path: Path) -> None:
    file = saved(name, tmp_path)
    model = exactflow.convert(file, preset=name)
    assert model.config == registry.preset(name).config
    assert not model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    model.save_pretrained(tmp_path / "model")
    again = exactflow.from_pretrained(tmp_path / "model")
    images = torch.randint(0, model.levels, (2, *model.event_shape), dtype=torch.uint8)
    losses = [m.loss(images, generator=torch.Generator().manual_seed(0)) for m in (model, again)]
    assert torch.equal(*losses)
    assert bool(losses[0].isfinite().all())


def test_hints_come_before_the_preset(tmp_path: Path) -> None:
    file = saved("iddpm-tiny", tmp_path)
    model = exactflow.convert(
        file, preset="iddpm-tiny", height=16, schedule="linear", diffusion_steps=30
    )
    fields = {"image_shape": (3, 16, 16), "schedule": "linear", "diffusion_steps": 30}
    assert model.config == dataclasses.replace(registry.preset("iddpm-tiny").config, **fields)
    scored = exactflow.log_likelihood(model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert scored.kind == "bound"


def test_an_upsampler_and_steps_drawn_by_importance(tmp_path: Path) -> None:
    config = {"low_size": 4, "objective": "vlb", "timestep_law": "importance"}
    source: Any = registry.build("iddpm-tiny", **config)
    torch.save(to_published(source.network), tmp_path / "up.pt")
    with pytest.raises(
        ValueError, match=r"not iddpm-tiny: .*not tell low_size: .*\n  low_size: 64 for 64 -> 256"
    ):
        exactflow.convert(tmp_path / "up.pt", preset="iddpm-tiny")
    model = exactflow.convert(tmp_path / "up.pt", preset="iddpm-tiny", **config)
    assert model.config == source.config
    assert model.get_buffer("importance.seen").tolist() == [0] * 20
    with pytest.raises(ValueError, match=r"iddpm-tiny.* low_size means nothing"):
        exactflow.convert(saved("iddpm-tiny", tmp_path), preset="iddpm-tiny", low_size=4)
    with pytest.raises(ValueError, match=r"6 channels in and 6 out are not .*images of 4"):
        exactflow.convert(tmp_path / "up.pt", preset="iddpm-tiny", channels=4)


@pytest.mark.parametrize(
    "missing",
    [
        "height",
        "num_heads",
        "attention_order",
        "dropout",
        "schedule",
        "diffusion_steps",
        "rescale_timesteps",
    ],
)
def test_every_missing_hint_is_named_with_what_is_published(missing: str) -> None:
    file, told, _ = case("iddpm_uncond")
    hints = {**chain_hints(told), missing: None}
    with pytest.raises(ValueError, match=rf"do not tell {missing}.*--height.*model.*\n  {missing}"):
        exactflow.convert(file, **hints)


@pytest.mark.parametrize("rescaled", [True, False])
def test_the_weight_of_the_bound_follows_the_time(rescaled: bool) -> None:
    """Published models have both flags or neither."""
    file, told, _ = case("iddpm_uncond")
    model = exactflow.convert(file, **{**chain_hints(told), "rescale_timesteps": rescaled})
    assert model.config.rescale_timesteps is rescaled
    assert model.config.rescale_learned_sigmas is rescaled


def test_presets_with_such_weights_are_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        published: Any = registry.build("iddpm-cifar10-hybrid")
    empty = {
        name: torch.zeros(1).expand(v.shape) for name, v in to_published(published.network).items()
    }
    torch.save(empty, tmp_path / "net.pt")  # one number each
    with pytest.raises(ValueError, match="iddpm-cifar10-hybrid or iddpm-cifar10-vlb has such"):
        exactflow.convert(tmp_path / "net.pt")
    model = exactflow.convert(tmp_path / "net.pt", preset="iddpm-cifar10-hybrid")
    assert model.num_parameters == 52_546_438
    with pytest.raises(ValueError, match="is not iddpm-imagenet64-hybrid, by its weights: channel"):
        exactflow.convert(tmp_path / "net.pt", preset="iddpm-imagenet64-hybrid")


@pytest.mark.parametrize(
    ("file", "hints", "message"),
    [
        ("openai/iddpm_uncond.pt", {"noise_std": 0.1}, "noise_std means nothing for iDDPM/ADM"),
        ("openai/iddpm_uncond.pt", {"model_channels": 32}, "model_channels means nothing"),
        ("openai/iddpm_uncond.pt", {"preset": "hdit-tiny"}, "holds iDDPM/ADM, not hdit-tiny"),
        ("openai/iddpm_uncond.pt", {"preset": "iddpm-tiny"}, r"not iddpm-tiny.*channel_mult is"),
        ("openai/iddpm_uncond.pt", {"preset": "adm-imagenet64"}, "resample is conv, not resblock"),
        ("openai/iddpm_uncond.pt", {"schedule": "cosin"}, "schedule: expected 'linear' | 'cosine'"),
        ("hdit/hdit_neighborhood_global.pth", {}, "does not tell height"),
        ("hdit/hdit_neighborhood_global.pth", {"height": 16}, "does not tell attention"),
        ("hdit/hdit_neighborhood_global.pth", {"schedule": "linear"}, "schedule means nothing"),
        ("hdit/hdit_neighborhood_global.pth", {"preset": "hdit-ffhq1024"}, "is not hdit-ffhq1024"),
        ("hdit/hdit_neighborhood_global.pth", {"preset": "hdit-tiny"}, "is not hdit-tiny"),
        ("tarflow/uncond.pth", {"preset": "tarflow-tiny"}, "is not tarflow-tiny"),
        ("tarflow/uncond.pth", {"schedule": "linear"}, "schedule means nothing for TarFlow"),
        ("flows/macow_uniform.pt", {"preset": "macow-cifar10-uniform"}, "is not macow-cifar10-un"),
        ("flows/macow_uniform.pt", {"height": 8}, "do not tell levels"),
        ("flows/denseflow_whole.pt", {}, "DenseFlow do not tell height: give it, .* --height"),
        ("flows/denseflow_whole.pt", {"height": 8, "levels": 2}, "levels means nothing"),
    ],
)  # fmt: skip
def test_hints_and_presets_that_do_not_fit(
    file: str, hints: dict[str, Any], message: str, golden: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        exactflow.convert(golden / file, **hints)
    assert str(golden / file) in str(caught.value)


def test_a_classifier_is_no_generative_model() -> None:
    with pytest.raises(ValueError, match=r"by exactflow\.load_classifier"):
        exactflow.convert(golden_folder("openai", "adm_classifier") / "adm_classifier.pt")


def test_incomplete_and_corrupt_files(golden: Path, tmp_path: Path) -> None:
    for part, drop in (
        ("emb_layers", "input_blocks.1.0.emb_layers.1.weight"),
        ("stem", "out.0.bias"),
    ):
        state = torch.load(golden / "openai" / "iddpm_uncond.pt", weights_only=True)
        del state[drop]
        torch.save(state, tmp_path / f"{part}.pt")
        with pytest.raises(ValueError, match=rf"{part}\.pt.*{drop}"):
            exactflow.convert(tmp_path / f"{part}.pt", preset="iddpm-tiny", num_heads=2)
    state = torch.load(golden / "hdit" / "hdit_neighborhood_global.pth", weights_only=True)
    del state["mid_level.1.ff.down_proj.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"(?s)part\.pth.*mid_level\.1\.ff\.down_proj"):
        exactflow.convert(tmp_path / "part.pth", height=16, attention=["neighborhood", "global"])
    whole = (golden / "openai" / "iddpm_uncond.pt").read_bytes()
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            exactflow.convert(tmp_path / name)
    broken = {"config": "not JSON"}
    save_file({"patch_in.proj.weight": torch.zeros(1)}, tmp_path / "c.safetensors", broken)
    with pytest.raises(ValueError, match=r"c\.safetensors is not a whole file"):
        exactflow.convert(tmp_path / "c.safetensors")
    torch.save(
        {"model": state, "config": {"model": {"type": "image_transformer_v2"}}},
        tmp_path / "config.pth",
    )
    with pytest.raises(ValueError, match=r"config\.pth.*'widths'"):
        exactflow.convert(tmp_path / "config.pth")


def command(file: Path, out: Path, *words: str, **options: Any) -> None:
    run_convert(Convert(checkpoint=file, out=out, settings=words, **options))


def test_command_line(tmp_path: Path) -> None:
    file, told, expected = case("iddpm_uncond")
    hints = {k: v for k, v in chain_hints(told).items() if v is not None and k != "height"}
    words = [f"model.{name}={value}" for name, value in hints.items()]
    said = call("convert", file, "net", "--height", 16, *words, cwd=tmp_path)
    assert "757,030 parameters" in said.stdout
    is_the_original_unet(exactflow.from_pretrained(tmp_path / "net"), told, expected)
    command(saved("iddpm-tiny", tmp_path), tmp_path / "tiny", preset="iddpm-tiny")
    found = exactflow.from_pretrained(tmp_path / "tiny").config
    assert found == registry.preset("iddpm-tiny").config
    with pytest.raises(ValueError, match="height is given twice"):
        command(file, tmp_path / "bad", "model.height=8", height=16)
    with pytest.raises(ValueError, match=r"expected SECTION\.FIELD=VALUE"):
        command(file, tmp_path / "bad", "data.source=x")
    with pytest.raises(ValueError, match="did you mean 'iddpm-tiny'"):
        command(file, tmp_path / "bad", preset="iddpm-tinny")
    assert not (tmp_path / "bad").exists()
