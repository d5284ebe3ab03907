"""Published quantisers by their official names: into ours and exactly back, and what they then compute."""

import pytest
import torch
from torch import nn

from arvis.quant import (
    BSQ,
    EMAVQ,
    FSQ,
    LFQ,
    VQ,
    BSQConfig,
    CosineVQ,
    EMAVQConfig,
    FSQConfig,
    LFQConfig,
    MultiScaleVQ,
    MultiScaleVQConfig,
    Projected,
    Residual,
    SimVQ,
    SimVQConfig,
    VQConfig,
)
from arvis.weights import WeightsError, load_official, map_shapes, to_official
from arvis.weights.quantizers import (
    EMA,
    LEARNED,
    MULTISCALE,
    SIMVQ,
    TABLE,
    beneath,
    binary,
    projected,
    residual,
)


def codebook(prefix="", d=6):
    return {
        f"{prefix}_codebook.initted": torch.tensor(True),
        f"{prefix}_codebook.cluster_size": torch.rand(1, 24),
        f"{prefix}_codebook.embed_avg": torch.randn(1, 24, d),
        f"{prefix}_codebook.embed": torch.randn(1, 24, d),
    }


def maps(width, inner):
    return {
        "project_in.weight": torch.randn(inner, width),
        "project_in.bias": torch.randn(inner),
        "project_out.weight": torch.randn(width, inner),
        "project_out.bias": torch.randn(width),
    }


def ema(d=6):
    return EMAVQ(EMAVQConfig(size=24, width=d))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


def hidden(prefix):
    return {f"{prefix}{name}": tensor for name, tensor in mlp().state_dict().items()}


MASK = torch.tensor([32, 16, 8, 4, 2, 1])
PYRAMID = MultiScaleVQConfig(size=24, width=5, levels=4)
CASES = {
    "table": (lambda: VQ(VQConfig(size=24, width=6)), TABLE, lambda: {"embedding.weight": torch.randn(24, 6)}),
    "ema": (ema, EMA, codebook),
    "ema, projected": (lambda: Projected(ema(4), 6, 4), projected(EMA), lambda: codebook(d=4) | maps(6, 4)),
    "residual": (
        lambda: Residual([ema(), ema()]),
        residual(),
        lambda: codebook("layers.0.") | codebook("layers.1."),
    ),
    "residual, projected": (
        lambda: Projected(Residual([ema(4), ema(4)]), 6, 4),
        projected(residual()),
        lambda: codebook("layers.0.", 4) | codebook("layers.1.", 4) | maps(6, 4),
    ),
    "simvq": (
        lambda: SimVQ(SimVQConfig(size=24, width=6)),
        SIMVQ,
        lambda: {"frozen_codebook": torch.randn(24, 6), "code_transform.weight": torch.randn(6, 6)},
    ),
    "simvq, mlp": (
        lambda: SimVQ(SimVQConfig(size=24, width=6), mlp()),
        SIMVQ,
        lambda: {"frozen_codebook": torch.randn(24, 6)} | hidden("code_transform."),
    ),
    "lfq": (lambda: LFQ(LFQConfig(bits=6)), binary(6), lambda: {"mask": MASK}),
    "lfq, projected": (
        lambda: Projected(LFQ(LFQConfig(bits=6)), 8, 6),
        projected(binary(6)),
        lambda: {"mask": MASK} | maps(8, 6),
    ),
    "bsq": (lambda: BSQ(BSQConfig(bits=6)), binary(6), lambda: {"mask": MASK}),
    "fsq, projected": (
        lambda: Projected(FSQ(FSQConfig(levels=(8, 5, 5))), 7, 3),
        projected(()),
        lambda: maps(7, 3),
    ),
    "multi-scale": (
        lambda: MultiScaleVQ(PYRAMID),
        MULTISCALE,
        lambda: {
            "embedding.weight": torch.randn(24, 5),
            "ema_vocab_hit_SV": torch.rand(4, 24),
            **{f"quant_resi.qresi_ls.{i}.weight": torch.randn(5, 5, 3, 3) for i in range(4)},
            **{f"quant_resi.qresi_ls.{i}.bias": torch.randn(5) for i in range(4)},
        },
    ),
}


@pytest.mark.parametrize("prefix", ["", "encoder.quantizer."])
@pytest.mark.parametrize("name", CASES)
def test_official_names_map_both_ways(name, prefix):
    """Fails for a tensor that is dropped, transposed, or named otherwise on the way back."""
    torch.manual_seed(0)
    make, keys, official = CASES[name]
    official = {prefix + n: tensor for n, tensor in official().items()}
    keys, module = beneath(keys, "quantize.", prefix), nn.ModuleDict({"quantize": make()})
    report = map_shapes(module, keys, {n: tuple(tensor.shape) for n, tensor in official.items()})
    assert report.ok and not report.left_out and not report.kept, str(report)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    load_official(module, keys, official)
    back = to_official(module, keys)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[n], official[n]) and back[n].dtype == official[n].dtype for n in official)


def test_a_loaded_table_finds_the_codes_of_the_file():
    torch.manual_seed(0)
    file, z = codebook("layers.0.") | codebook("layers.1."), torch.randn(30, 6)
    quantizer = Residual([ema(), ema()])
    load_official(quantizer, residual(), file)
    first = torch.cdist(z, file["layers.0._codebook.embed"][0]).argmin(1)
    rest = z - file["layers.0._codebook.embed"][0, first]
    second = torch.cdist(rest, file["layers.1._codebook.embed"][0]).argmin(1)
    assert torch.equal(quantizer.encode(z), torch.stack((first, second), 1))


def test_what_is_only_kept_for_training_is_left_out_by_name():
    quantizer, table = CosineVQ(VQConfig(size=24, width=6)), torch.randn(24, 6)
    file = {"quantize.embedding.weight": table, "quantize.codebook_used": torch.zeros(65536)}
    report = load_official(nn.ModuleDict({"quantize": quantizer}), beneath(TABLE, "quantize.", "quantize."), file)
    assert report.left_out == ("quantize.codebook_used",) and torch.equal(quantizer.embedding.weight, table)
    file = codebook()
    report = load_official(quantizer, LEARNED, file)
    assert len(report.left_out) == 3 and torch.equal(quantizer.embedding.weight, file["_codebook.embed"][0])


def test_flags_of_all_ages_are_taken_and_unset_ones_refused():
    quantizer, file = ema(), codebook()
    for flag in (torch.ones(1), torch.tensor([True]), torch.tensor(1.0)):
        load_official(quantizer, EMA, {**file, "_codebook.initted": flag})
    load_official(quantizer, EMA, {n: t for n, t in file.items() if "initted" not in n})
    with pytest.raises(WeightsError, match="never initialised"):
        load_official(quantizer, EMA, {**file, "_codebook.initted": torch.tensor(False)})
    with pytest.raises(WeightsError, match="initted"):
        load_official(quantizer, EMA, {**file, "_codebook.initted": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("ema", {"_codebook.embed": torch.randn(2, 24, 6)}, "_codebook.embed"),  # two heads
        ("lfq", {"mask": MASK.flip(0)}, "mask"),  # the other end first
        ("simvq", {"code_transform.weight": torch.randn(6, 5)}, "code_transform.weight"),
    ],
)
def test_what_does_not_fit_is_refused(name, change, told):
    make, keys, official = CASES[name]
    with pytest.raises(WeightsError, match=told):
        load_official(make(), keys, official() | change)
