"""Key tables: exact inverses, one clear error, shapes alone. A renaming that forgets the transform fails here."""

import pytest
import torch
from torch import nn

from arvis.weights import (
    SAME_NAMES,
    Chain,
    Constant,
    Either,
    Fuse,
    Key,
    Rearrange,
    Split,
    Tied,
    WeightsError,
    load_official,
    map_shapes,
    to_official,
)

WIDTH, HEADS = 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.scale = nn.Parameter(torch.randn(HEADS))
        self.q_bias = nn.Parameter(torch.randn(WIDTH))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embedding = nn.Embedding(5, WIDTH)
        self.register_buffer("hits", torch.rand(3))
        self.register_buffer("own", torch.rand(2))


LEVELS = torch.tensor([[0, 1, 1, 2]])
KEYS = (
    Key("blocks.{i}.qkv.{p}", tuple(f"layers.{{i}}.att.{x}.{{p}}" for x in "qkv"), Fuse(3)),
    Key(("blocks.{i}.up.weight", "blocks.{i}.gate.weight"), "layers.{i}.ffn.w12", Split((16, 16))),
    Key("blocks.{i}.scale", "layers.{i}.scale_1H11", Rearrange("1 h 1 1 -> h")),
    Key("blocks.{i}.q_bias", "layers.{i}.q_bias", Rearrange("(h d) -> (d h)", {"h": HEADS, "d": WIDTH // HEADS})),
    Key((), "layers.{i}.zero_k_bias", Constant(torch.zeros_like), like="blocks.{i}.q_bias"),
    Key("embedding.weight", ("in.weight", "out.weight"), Chain((Tied(2), Rearrange("v c -> v c")))),
    Key((), "levels", Constant(lambda: LEVELS)),
    Key((), "loss.{rest*}"),
    Key("hits", "stats.hits", optional=True),
    Key("own", ()),
)


def official(extra: bool = True) -> dict[str, torch.Tensor]:
    """A file written by hand, not by `to_official`."""
    out = {}
    for i in range(2):
        for x in "qkv":
            out[f"layers.{i}.att.{x}.weight"] = torch.randn(WIDTH, WIDTH)
            out[f"layers.{i}.att.{x}.bias"] = torch.randn(WIDTH)
        out[f"layers.{i}.ffn.w12"] = torch.randn(4 * WIDTH, WIDTH)
        out[f"layers.{i}.scale_1H11"] = torch.randn(1, HEADS, 1, 1)
        out[f"layers.{i}.q_bias"] = torch.randn(WIDTH)
        out[f"layers.{i}.zero_k_bias"] = torch.zeros(WIDTH)
    out["in.weight"] = out["out.weight"] = torch.randn(5, WIDTH)
    out["levels"] = LEVELS.clone()
    out["stats.hits"] = torch.rand(3)
    if extra:
        out["loss.vgg.0.weight"] = torch.randn(2)
    return out


def test_loads_every_value_to_its_place():
    net, file = Net(), official()
    own = net.own.clone()
    report = load_official(net, KEYS, file)
    first = net.blocks[1]
    assert torch.equal(first.qkv.weight[WIDTH : 2 * WIDTH], file["layers.1.att.k.weight"])
    assert torch.equal(first.gate.weight, file["layers.1.ffn.w12"][2 * WIDTH :])
    assert torch.equal(first.scale, file["layers.1.scale_1H11"][0, :, 0, 0])
    assert torch.equal(first.q_bias.view(4, 2), file["layers.1.q_bias"].view(2, 4).T)
    assert torch.equal(net.embedding.weight, file["out.weight"])
    assert torch.equal(net.hits, file["stats.hits"]) and torch.equal(net.own, own)
    assert report.left_out == ("loss.vgg.0.weight",) and report.kept == ("own",)


def test_is_inverted_exactly():
    net, file = Net(), official(extra=False)
    load_official(net, KEYS, file)
    back = to_official(net, KEYS)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) and back[name].dtype == file[name].dtype for name in file)
    other = Net()
    load_official(other, KEYS, to_official(net, KEYS))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


def test_casts_to_the_modules_number_format():
    net, file = Net(), {n: t.half() if t.is_floating_point() else t for n, t in official().items()}
    load_official(net, KEYS, file)
    assert net.embedding.weight.dtype == torch.float32
    assert torch.equal(net.embedding.weight, file["in.weight"].float())


def test_a_module_on_meta_gets_its_storage():
    with torch.device("meta"):
        net = Net()
    file = official()
    with pytest.raises(WeightsError, match="no values for own"):
        load_official(net, KEYS, file)
    with torch.device("meta"):
        other = Net()
    assert load_official(other, (*KEYS[:-1], Key("own", (), initial=torch.ones_like)), file).kept == ("own",)
    assert other.own.tolist() == [1, 1]
    keys = (*KEYS[:-1], Key("own", "own"))
    load_official(net, keys, {**file, "own": torch.ones(2).half()})
    assert net.own.dtype == torch.float32 and net.blocks[0].scale.requires_grad
    assert torch.equal(net.embedding.weight, file["in.weight"])


def test_the_first_misfit_is_named_with_both_names_and_shapes():
    net, file = Net(), official()
    before = net.embedding.weight.clone()
    file["layers.1.scale_1H11"] = torch.randn(1, 3, 1, 1)
    file["in.weight"] = torch.randn(6, WIDTH)
    with pytest.raises(WeightsError) as error:
        load_official(net, KEYS, file, source="net.pth")
    text = str(error.value)
    assert text.startswith("net.pth does not fit the model: layers.1.scale_1H11 is (1, 3, 1, 1)")
    assert "blocks.1.scale" in text and "(1, 2, 1, 1)" in text and "1 more do not fit" in text
    assert torch.equal(net.embedding.weight, before), "a refused file must change nothing"


def test_absurd_shapes_are_refused_before_anything_is_made_of_them():
    seen = []

    class Seen(Fuse):
        def to_ours(self, official, own):
            seen.append(official[0].is_meta)
            return super().to_ours(official, own)

    net = nn.Linear(4, 6, bias=False)
    keys = (Key("weight", ("a", "b"), Seen(2)),)
    file = dict.fromkeys(("a", "b"), torch.zeros(1, 1).expand(10**6, 10**6))  # four bytes on disk; fused, terabytes
    with pytest.raises(WeightsError, match=r"a is \(1000000, 1000000\) and weight needs \(3, 4\)"):
        load_official(net, keys, file)
    assert seen == [True]


def test_a_module_on_meta_is_filled_without_a_second_copy():
    with torch.device("meta"):
        net = nn.Linear(4, 3)
    file = {"weight": torch.randn(3, 4), "bias": torch.randn(3).half()}
    load_official(net, SAME_NAMES, file)
    assert net.weight.data_ptr() == file["weight"].data_ptr(), "the same number format is not copied"
    assert net.bias.dtype == torch.float32 and torch.equal(net.bias, file["bias"].float())


def test_unequal_parts_are_not_fused():
    file = official()
    file["layers.0.att.q.bias"], file["layers.0.att.k.bias"] = torch.randn(WIDTH + 2), torch.randn(WIDTH - 2)
    with pytest.raises(WeightsError, match=r"layers\.0\.att\.q\.bias is \(10,\) and blocks\.0\.qkv\.bias needs \(8,\)"):
        load_official(Net(), KEYS, file)


def test_missing_and_unexpected_tensors_are_named_with_the_nearest():
    file = official()
    file["layers.1.q_biass"] = file.pop("layers.1.q_bias")
    with pytest.raises(WeightsError) as error:
        load_official(Net(), KEYS, file)
    assert "missing from the file: layers.1.q_bias (nearest: layers.1.q_biass)" in str(error.value)
    assert "unexpected in the file: layers.1.q_biass (nearest: layers.1.q_bias)" in str(error.value)


def test_not_strict_tolerates_the_unknown_and_nothing_else():
    file = {**official(), "surprise": torch.zeros(1)}
    with pytest.raises(WeightsError, match="surprise"):
        load_official(Net(), KEYS, file)
    assert load_official(Net(), KEYS, file, strict=False).left_out == ("loss.vgg.0.weight", "surprise")
    del file["levels"], file["stats.hits"], file["layers.0.zero_k_bias"]  # constants and statistics may be absent
    assert load_official(Net(), KEYS, file, strict=False).kept == ("hits", "own")
    del file["layers.0.q_bias"]
    with pytest.raises(WeightsError, match=r"missing from the file: layers\.0\.q_bias"):
        load_official(Net(), KEYS, file, strict=False)


def test_constants_and_ties_are_checked():
    for name, value in (("layers.0.zero_k_bias", torch.ones(WIDTH)), ("levels", LEVELS + 1)):
        with pytest.raises(WeightsError, match=f"{name}.*constant"):
            load_official(Net(), KEYS, {**official(), name: value})
    with pytest.raises(WeightsError, match=r"in\.weight.*tied differ"):
        load_official(Net(), KEYS, {**official(), "out.weight": torch.randn(5, WIDTH)})


def test_a_statistic_of_another_shape_is_kept():
    net = Net()
    hits = net.hits.clone()
    assert "hits" in load_official(net, KEYS, {**official(), "stats.hits": torch.rand(4)}).kept
    assert torch.equal(net.hits, hits)


def test_shapes_alone_map_in_both_directions():
    with torch.device("meta"):
        net = Net()
    shapes = {name: tuple(t.shape) for name, t in official().items()}
    report = map_shapes(net, KEYS, shapes)
    assert report.ok and report.left_out == ("loss.vgg.0.weight",)
    assert report.parameters == sum(p.numel() for p in Net().parameters())
    assert report.mapped["layers.0.att.v.bias"] == "blocks.0.qkv.bias"
    wrong = map_shapes(net, KEYS, {**shapes, "layers.0.ffn.w12": (30, WIDTH)})
    assert [m.official for m in wrong.misfits] == ["layers.0.ffn.w12"] and wrong.misfits[0].needed == (32, WIDTH)


def test_the_way_back_must_give_the_table_again():
    with torch.device("meta"):
        net = Net()
    shapes = {name: tuple(t.shape) for name, t in official().items()}
    del shapes["levels"]
    report = map_shapes(net, KEYS, shapes)
    assert [(m.official, m.reason) for m in report.misfits] == [("levels", "the way back differs")]
    lossy = (Key("embedding.weight", ("in.weight", "out.weight"), Chain((Tied(2), Widen()))), *KEYS)
    shapes = {name: tuple(t.shape) for name, t in official().items()}
    assert "in.weight" in [m.official for m in map_shapes(net, lossy, shapes).misfits]


class Widen:
    """A transform that is no inverse of itself."""

    def to_ours(self, official, own):
        return official

    def to_official(self, ours):
        return [torch.cat([ours[0], ours[0]])]


def test_faults_of_a_table_are_told():
    net = Net()
    with pytest.raises(WeightsError, match="no row of the table has our own"):
        to_official(net, KEYS[:-1])
    with pytest.raises(WeightsError, match=r"two rows of the table have the official in\.weight"):
        to_official(net, (Key("own", "in.weight"), *KEYS))
    with pytest.raises(WeightsError, match=r"needs blocks\.0\.gates\.weight.*nearest: blocks\.0\.gate\.weight"):
        to_official(net, (Key(("blocks.{i}.up.weight", "blocks.{i}.gates.weight"), "x.{i}", Split(2)), *KEYS))
    with pytest.raises(WeightsError, match=r"has \{j\}"):
        to_official(net, (Key("blocks.{i}.up.weight", "x.{j}"), *KEYS))


def test_the_first_row_that_fits_wins_and_one_name_spans_one_part():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    keys = (Key("a.bias", "special"), Key("a.{p}", "first.{p}"), *SAME_NAMES)
    assert set(to_official(net, keys)) == {"special", "first.weight", "b.a.weight", "b.a.bias"}


SPELLED = (
    Key("embedding.weight", "in.weight", spellings=("emb.module.weight", "table")),
    Key("blocks.{i}.{name*}", "chunk.{i}.{name*}", spellings=("layers.{i}.{name*}",)),
    Key("hits", (), optional=True),
    Key("own", ()),
)


def test_files_may_spell_names_in_several_ways_and_what_is_written_has_the_first():
    net = Net()
    first = to_official(net, SPELLED)
    assert {"in.weight", "chunk.1.qkv.bias"} <= set(first) and not {"table", "layers.1.qkv.bias"} & set(first)
    other = {name.replace("chunk.", "layers.").replace("in.weight", "table"): x for name, x in first.items()}
    assert set(other) != set(first)
    for tensors in (first, other):
        fresh = Net()
        report = load_official(fresh, SPELLED, tensors)
        assert report.left_out == () and set(report.mapped) == set(tensors)
        assert all(torch.equal(x, first[name]) for name, x in to_official(fresh, SPELLED).items())
    del other["layers.1.qkv.bias"]
    with pytest.raises(WeightsError, match=r"missing from the file: chunk\.1\.qkv\.bias"):
        load_official(Net(), SPELLED, other)


def test_files_may_have_one_of_several_shapes():
    shapes = Either((Rearrange("1 h 1 1 -> h"), Rearrange("1 1 h 1 -> h")))
    own = [torch.zeros(3)]
    for shape in ((1, 3, 1, 1), (1, 1, 3, 1)):
        assert shapes.to_ours([torch.arange(3.0).view(shape)], own)[0].tolist() == [0, 1, 2]
    assert shapes.to_official(own)[0].shape == (1, 3, 1, 1)
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 1\) is none of the 2"):
        shapes.to_ours([torch.zeros(1, 4, 1, 1)], own)
