"""NFIG is VAR with another target of its tokenizer, and nothing else."""

import pickle

import torch

from arvis.noise import Noise
from arvis.quant.multiscale import area_target
from arvis.systems import nfig, var
from arvis.walk import finish, generate
from small import built


def test_it_is_var_but_for_what_a_scale_codes():
    torch.manual_seed(0)
    mine = nfig.tiny().eval()
    torch.manual_seed(0)
    theirs = var.tiny().eval()
    assert type(mine) is var.VAR and nfig.CONFIG is var.VARConfig
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    noise, request = Noise.of(0, 3), {"class_labels": [0, 1, 2]}
    drawn = [finish(generate(s, s.prepare(request), s.Sampling(), noise)) for s in (mine, theirs)]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    pictures = [s.tokenizer.decode(d.tokens) for s, d in zip((mine, theirs), drawn, strict=True)]
    assert torch.equal(*pictures)
    f = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    a, b = (s.tokenizer.quantize.targets(f, s.tokenizer.layout()) for s in (mine, theirs))
    assert not torch.equal(a, b)
    again = pickle.loads(pickle.dumps(mine)).tokenizer
    assert torch.equal(again.quantize.targets(f, again.layout()), a)
    mine.tokenizer.quantize.target = area_target
    assert torch.equal(mine.tokenizer.quantize.targets(f, mine.tokenizer.layout()), b)


def test_tokens_alone_give_the_sum_bit_for_bit_and_a_prefix_its_part():
    system, _ = built("nfig")
    tokenizer = system.eval().tokenizer
    layout = tokenizer.layout()
    f = tokenizer.features(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    ids, _, parts = tokenizer.quantize._run(f, layout)
    tokens, total = torch.cat(ids, 1)[..., None], torch.zeros_like(f)
    for k, fhat in enumerate(tokenizer.fhats(tokens, layout)):
        total = total + parts[k]
        assert torch.equal(fhat, total)
        known = (torch.arange(layout.n) < layout.offsets[k + 1]).expand(2, -1)
        assert torch.equal(tokenizer.decode(tokens, layout, known), tokenizer.decode_features(fhat))


def test_the_published_sizes_are_vars():
    for name, count in (("nfig-310m", 310_283_520), ("nfig-600m", 600_917_136)):
        with torch.device("meta"):
            transformer = nfig.build(nfig.PRESETS[name].config()).transformer
        assert sum(p.numel() for p in transformer.parameters()) == count
