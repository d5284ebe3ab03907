"""The recorded run of the official tokenizer, tensor by tensor (tests/parity/var)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arvis.tokenizers import CNNConfig, PyramidVQ, PyramidVQConfig

ROOT = Path(__file__).parents[2]


def fixture_folder(slug: str) -> Path | None:
    for base in (ROOT / "tests/parity", Path(os.environ.get("ARVIS_PARITY", ROOT.parent / "shared/parity"))):
        if (base / slug / "config.json").exists():
            return base / slug
    return None


@pytest.fixture(scope="module")
def recorded():
    folder = fixture_folder("var")
    if folder is None:
        pytest.skip("no recording of the official VAR tokenizer in tests/parity/var or $ARVIS_PARITY/var")
    config = json.loads((folder / "config.json").read_text())
    c = config["model"]["tokenizer"]
    shared = {"z_channels": c["z_channels"]}
    tokenizer = PyramidVQ(
        PyramidVQConfig(
            patch_nums=tuple(c["v_patch_nums"]),
            vocab_size=c["vocab_size"],
            beta=c["beta"],
            using_znorm=c["using_znorm"],
            quant_resi=c["quant_resi"],
            share_quant_resi=c["share_quant_resi"],
            quant_conv_ks=c["quant_conv_ks"],
            cnn=CNNConfig(
                ch=c["ch"],
                ch_mult=tuple(c["ch_mult"]),
                num_res_blocks=c["num_res_blocks"],
                in_channels=c["in_channels"],
                using_sa=c["using_sa"],
                using_mid_sa=c["using_mid_sa"],
                **shared,
            ),
            **shared,
        )
    )
    prefix = c["weights_prefix"]
    weights = load_file(folder / "weights.safetensors")
    state = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    tokenizer.load_state_dict(state)  # strict: names are the official ones
    io = {k: v.float() if v.is_floating_point() else v.long() for k, v in load_file(folder / "io.safetensors").items()}
    return tokenizer.eval(), config, io


@torch.no_grad()
def ours(tokenizer, config, io) -> dict[str, torch.Tensor]:
    run = config["runs"]["tokenizer"]
    layout = tokenizer.layout()
    f = tokenizer.features(io["image"])
    quantized = tokenizer.quantize(f, layout)
    tokens = tokenizer.encode(io["image"])
    fhats = tokenizer.fhats(tokens, layout)
    reconstruction, trained = tokenizer(io["image"])
    known = torch.arange(layout.n)[None] < layout.offsets[run["recon_scale"] + 1]
    return {
        "f": f,
        "idx_all_scales": tokens[..., 0],
        "fhat_mse_per_scale": quantized.stats["mse"],
        "var_input": tokenizer.inputs(tokens, layout, 1, layout.K),
        "recon_from_idx": tokenizer.decode(tokens),
        "recon_scale_mid": tokenizer.decode(tokens[:1], known=known),
        "train_forward_rec": reconstruction[:1],
        "train_forward_vq_loss": trained.losses["vq"][None],
    } | {f"fhat_{k}": fhats[k] for k in run["fhat_scales"]}


def test_every_recorded_tensor_of_the_tokenizer(recorded):
    tokenizer, config, io = recorded
    found = ours(tokenizer, config, io)
    wanted = {n: t for n, t in config["tensors"].items() if t["run"] == "tokenizer" and t["role"] == "output"}
    assert set(found) == set(wanted)
    worst = {}
    for name, rule in wanted.items():
        error = (found[name].double() - io[name].double()).abs().max().item()
        worst[name] = (error, rule["atol"] or 0)
    assert all(error <= atol for error, atol in worst.values()), worst
