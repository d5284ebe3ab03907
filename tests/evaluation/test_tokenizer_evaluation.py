"""Measured tokenizers: exact numbers for tokenizers whose tokens are known, every registered one, the command."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from arvis import cli, loading
from arvis.evaluation.tokenizers import measure
from arvis.noise import Noise
from arvis.systems import SYSTEMS
from arvis.tokenizers.kl import Posterior
from arvis.tokens import Layout, Space
from small import built, small


@dataclass
class Known:
    """Codes that are read off the first pixel of a picture: picture i has the i-th row of a table."""

    table: torch.Tensor
    space: Space
    levels: Layout

    def layout(self, shape=None):
        return self.levels

    def encode(self, x, layout=None, noise=None):
        return self.table[((x[:, 0, 0, 0] + 1) * 127.5).round().long()]

    def decode(self, tokens, layout=None, known=None, noise=None):
        return torch.zeros(len(tokens), 3, 12, 16)


def pictures(count, batch=4):
    x = torch.zeros(count, 3, 12, 16)
    x[:, 0, 0, 0] = torch.arange(count) / 127.5 - 1
    return x.split(batch)


def test_codes_are_counted_level_by_level_over_all_batches():
    """Fails for means of per-batch perplexities, levels that are mixed up, and entropies in nats."""
    layout = Layout(((1, 1), (1, 3)))
    coarse = torch.arange(8)[:, None] % 4  # uniform over four of six codes, but each batch of 4 alike
    fine = torch.tensor([[0, 0, 5]]).expand(8, 3)
    known = Known(torch.cat((coarse, fine), 1)[..., None], Space(sizes=(6,)), layout)
    report = measure(known, pictures(8, batch=1), settings={"a": 1})
    first, second, whole = report.codes
    assert (first.part, second.part, whole.part) == ("level 0 (1x1)", "level 1 (1x3)", "all")
    assert (first.seen, first.dead, first.used) == (8, 2, pytest.approx(4 / 6))
    assert first.perplexity == pytest.approx(4) and first.bits == pytest.approx(2)
    assert first.normalised == pytest.approx(4 / 6)
    third = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert second.bits == pytest.approx(third, abs=1e-6) and second.dead == 4 and second.seen == 24
    p = torch.tensor([18.0, 2, 2, 2, 0, 8]) / 32
    assert whole.bits == pytest.approx(-float((p[p > 0] * p[p > 0].log2()).sum()), abs=1e-6) and whole.dead == 1
    bits = 2 + 3 * third
    assert report.totals["bits per picture, by the frequencies of each level"] == pytest.approx(bits, abs=1e-5)
    assert report.totals["bits per pixel"] == pytest.approx(bits / (12 * 16), abs=1e-7)
    assert report.totals["share of positions that never vary"] == pytest.approx(3 / 4)
    x = torch.cat(pictures(8))
    mse = ((x * 127.5 + 127.5).round() - 128).square().flatten(1).mean(1).double()
    assert report.reconstruction["PSNR"] == pytest.approx(float((10 * (255**2 / mse).log10()).mean()), abs=1e-4)
    assert set(report.reconstruction) == {"PSNR", "SSIM"}
    assert (report.pictures, report.pixels) == (8, (12, 16)) and report.settings == {"a": 1}


def test_sub_tokens_are_counted_apart_and_jointly():
    """Fails for a table that sub-tokens share, and for shared information that is not subtracted."""
    a = torch.arange(16)
    tokens = torch.stack((a % 4, a // 4, a % 4 // 2), -1)[:, None]  # the third follows from the first
    report = measure(Known(tokens, Space(sizes=(4, 8, 2)), Layout(((1, 1),))), pictures(16))
    assert [u.part for u in report.codes] == ["sub-token 0", "sub-token 1", "sub-token 2", "all"]
    assert [u.perplexity for u in report.codes] == pytest.approx([4, 4, 2, 32 ** (1 / 3)], rel=1e-5)
    assert [u.dead for u in report.codes] == [0, 4, 0, 4]
    whole = report.codes[-1]
    assert whole.bits == pytest.approx(5) and whole.codes == "4 x 8 x 2" and whole.used == pytest.approx(2.5 / 3)
    assert report.totals["bits per token, sub-tokens jointly"] == pytest.approx(4)
    assert report.totals["bits that two sub-tokens share, on average"] == pytest.approx(1 / 3, abs=1e-5)
    assert report.totals["share of positions that never vary"] == 0


def test_bits_are_codes_like_any_others():
    tokens = torch.randint(2, (200, 3, 40), generator=torch.Generator().manual_seed(0))
    report = measure(Known(tokens, Space(sizes=(2,) * 40), Layout(((1, 1), (1, 2)))), pictures(200))
    assert [u.part for u in report.codes][:3] == ["level 0 (1x1)", "level 1 (1x2)", "sub-token 0"]
    assert report.codes[-1].codes == "40 x 2" and 39.8 < report.codes[-1].bits <= 40
    assert report.totals["bits per token, sub-tokens jointly"] == pytest.approx(math.log2(600))  # all of them differ


class Gaussian:
    """Real tokens whose distribution is known; with `p` > 1 a token holds p x p cells of each channel."""

    def __init__(self, p=1):
        self.p, self.space = p, Space(width=2 * p * p)

    def layout(self, shape=None):
        return Layout(((8, 8),))

    def features(self, x):
        y = 8 * self.p
        mean = torch.stack((torch.full((len(x), y, y), 3.0), torch.zeros(len(x), y, y)), 1)
        return torch.cat((mean, torch.stack((mean[:, 1] + math.log(4), mean[:, 1]), 1)), 1)  # deviations 2 and 1

    def posterior(self, moments):
        return Posterior(*moments.chunk(2, 1))

    def encode(self, x, layout=None, noise=None):
        f = self.posterior(self.features(x))
        z = f.mean if noise is None else f.sample(noise.normal("posterior", 0, f.mean.shape[1:]))
        cells = z.unflatten(2, (8, self.p)).unflatten(4, (8, self.p)).permute(0, 2, 4, 1, 3, 5)
        return cells.flatten(3).flatten(1, 2)

    def decode(self, tokens, layout=None, known=None, noise=None):
        return torch.zeros(len(tokens), 3, 12, 16)


@pytest.mark.parametrize("p", [1, 2])
def test_channels_are_those_of_samples_with_the_divergence_of_each(p):
    """Fails for statistics of the means alone, a KL of the wrong channel, and sums where means over cells are meant."""
    report = measure(Gaussian(p), pictures(60))
    assert report.codes == [] and len(report.channels) == 2 * p * p + 1
    for c, channel in enumerate(report.channels[:-1]):
        mean, deviation = ((3.0, 2.0), (0.0, 1.0))[c // (p * p)]
        assert abs(channel.mean - mean) < 0.1 and abs(channel.deviation / deviation - 1) < 0.05
        assert channel.kl == pytest.approx((0.5 * (9 + 4 - 1 - math.log(4)), 0.0)[c // (p * p)], abs=1e-5)
    whole = report.channels[-1]
    assert whole.channel == "all" and whole.mean == pytest.approx(1.5, abs=0.1)
    assert whole.deviation == pytest.approx(math.sqrt((4 + 1) / 2 + 1.5**2), rel=0.05)
    assert whole.kl == pytest.approx(0.5 * (9 + 4 - 1 - math.log(4)), abs=1e-5)
    assert report.totals == {"numbers per pixel": 64 * 2 * p * p / (12 * 16)}
    again = measure(Gaussian(p), pictures(60))
    assert again.channels == report.channels  # the same noise
    assert measure(Gaussian(p), pictures(60), seed=9).channels != report.channels


def test_a_report_reads_back():
    tokens = torch.arange(8)[:, None, None].expand(8, 4, 1)
    report = measure(Known(tokens, Space(sizes=(8,)), Layout(((2, 2),))), pictures(8), settings={"model": "known"})
    back = json.loads(report.to_json())
    assert back["codes"][0]["perplexity"] == pytest.approx(8) and back["settings"] == {"model": "known"}
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "part" and lines[0].endswith("perplexity  of all codes  bits/token")
    assert lines[1].split() == ["all", "8", "32", "100.0%", "0", "8.0", "100.0%", "3.00"]
    assert len({len(line) for line in lines[:2]}) == 1
    markdown = report.to_markdown()
    assert "| all | 8 | 32 | 100.0% | 0 | 8.0 | 100.0% | 3.00 |" in markdown and "| pictures | 8 of" in markdown


def test_no_picture_is_refused():
    with pytest.raises(ValueError, match="at least one picture, got none"):
        measure(Gaussian(), [])


@pytest.mark.parametrize("slug", [slug for slug, row in SYSTEMS.items() if row.kind != "method"])
def test_every_registered_tokenizer_is_measured(slug):
    """Fails for a tokenizer with another interface than the others."""
    tokenizer = built(slug)[0].tokenizer
    y, x = (side * tokenizer.config.downsample for side in tokenizer.layout().levels[-1])
    images = torch.rand(6, 3, y, x, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = measure(tokenizer, images.split(4), tokenizer.layout())
    layout, space = tokenizer.layout(), tokenizer.space
    if space.sizes:
        tokens = tokenizer.encode(images, layout)
        whole = report.codes[-1]
        assert whole.part == "all" and whole.seen == tokens[..., 0].numel()
        assert whole.dead == sum(space.sizes) - sum(len(part.unique()) for part in tokens.unbind(-1))
        assert report.totals["bits per pixel"] > 0
    else:
        z = tokenizer.encode(images[:4], layout, Noise.of(0, 4))
        z = torch.cat((z, tokenizer.encode(images[4:], layout, Noise.of(4, 2)))).flatten(0, 1)
        assert [c.mean for c in report.channels[:-1]] == pytest.approx(z.mean(0).tolist(), abs=1e-4)
        assert all(c.kl is not None and c.kl >= 0 for c in report.channels)
    assert report.pictures == 6 and report.levels == layout.levels and str(report)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "box")
    small("brush").save_pretrained(tmp_path / "box" / "brush-64")
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        Image.effect_noise((40, 40), 20.0 + i).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


def test_the_command_writes_a_report_and_pairs(place, capsys):
    cli.main(["tokenizer", "brush", "--data", "pictures", "--split", "all", "-n", "5", "-o", "out"])
    told = capsys.readouterr().out
    assert told.startswith("brush-tiny\n") and "level 0 (1x1)" in told and "bits per pixel" in told
    back = json.loads(Path("out/report.json").read_text())
    assert back["pictures"] == 5 and back["settings"]["data"] == "pictures"
    assert "5 of 24x24 pixels" in Path("out/report.md").read_text()
    with Image.open("out/pairs.png") as pairs:
        assert pairs.size == (5 * 26 - 2, 2 * 26 - 2), "five pictures above five reconstructions"
    cli.main(["tokenizer", "brush", "--data", "pictures", "--split", "all", "-n", "500", "-o", "all"])
    assert json.loads(Path("all/report.json").read_text())["pictures"] == 9, "each picture once"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("brush", "-n", "0"), "--pictures 0"),
        (("brsh",), "nearest: brush"),
        (("brush", "--data", "nothing"), "no data set 'nothing'"),
    ],
)
def test_mistakes_are_one_line(place, capsys, args, told):
    with pytest.raises(SystemExit) as end:
        cli.main(["tokenizer", *args])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and told in err and err.count("\n") == 1
