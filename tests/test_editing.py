"""Masks over pictures as masks over tokens, and one mask argument that paints parts anew in every system."""

import pytest
import torch
from PIL import Image, ImageChops

from arvis import cli
from arvis.data.images import read_image, to_tensor
from arvis.editing import box_mask, box_picture, keep_tokens, outpaint
from arvis.systems import SYSTEMS
from arvis.tokens import Layout, pyramid
from small import halves, picture, request, small

SLUGS = [slug for slug, row in SYSTEMS.items() if row.kind == "system"]

# -- masks ------------------------------------------------------------------------------------------------------------


def test_a_box_covers_the_cells_nearest_to_its_edges():
    inside = box_mask((0.2, 0.1, 0.8, 0.7), (6, 6))
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert rows.tolist() == [1, 2, 3, 4] and columns.tolist() == [1, 2, 3]
    assert box_mask((0, 0, 1, 1), (3, 5)).all() and not box_mask((0.5, 0.5, 0.5, 0.5), (4, 4)).any()


@pytest.mark.parametrize("box", [(0.5, 0, 0.2, 1), (0, 0, 1, 1.2), (-0.1, 0, 1, 1), (0, 0, 1)])
def test_a_box_that_is_none_is_refused(box):
    for use in (lambda: box_mask(box, (4, 4)), lambda: outpaint(picture(), box)):
        with pytest.raises(ValueError, match="a box is"):
            use()


def test_a_box_as_a_picture_is_white_inside():
    white = box_picture((0, 0.5, 1, 1), (48, 24))
    assert white.size == (48, 24)
    assert white.tobytes() == halves(48).resize((48, 24)).convert("RGB").tobytes()


def test_out_painting_shrinks_the_picture_and_marks_its_surroundings():
    original = picture(40)
    canvas, mask = outpaint(original, (0.25, 0.5, 0.75, 1.0))
    assert canvas.size == mask.size == original.size
    inside = original.resize((20, 20), Image.Resampling.LANCZOS)
    assert canvas.crop((20, 10, 40, 30)).tobytes() == inside.tobytes()
    black = (to_tensor(mask) == 0)[0]
    assert torch.equal(black, box_mask((0.25, 0.5, 0.75, 1.0), (40, 40)))
    assert len({tuple(p) for p in to_tensor(canvas)[:, ~black].T.tolist()}) == 1
    framed = Image.new("RGB", (40, 40), (250, 0, 10))
    framed.paste(original.resize((20, 20)), (10, 10))
    assert outpaint(framed, (0.25, 0.25, 0.75, 0.75))[0].getpixel((0, 0)) == (250, 0, 10), "the border's colour"
    with pytest.raises(ValueError, match="holds no pixel of a picture of 40x40"):
        outpaint(original, (0.5, 0.5, 0.5, 1))


def test_a_token_is_kept_where_more_than_half_of_the_resized_mask_is():
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    layout = pyramid((1, 2, 3, 4))
    kept = keep_tokens(keep, layout)
    assert kept.shape == (1, 30) and kept.dtype == torch.bool
    assert kept[0, 0], "one token speaks of the whole picture and is kept"
    assert kept[0, layout.span(1)].view(2, 2).tolist() == [[True, False]] * 2
    # the middle column of three lies on the border: exactly one half, which is not more than a half
    assert kept[0, layout.span(2)].view(3, 3).tolist() == [[True, False, False]] * 3
    assert torch.equal(kept[0, layout.span(3)].view(4, 4), keep)


def test_levels_of_three_tokens_are_kept_and_of_four_are_not():
    nothing = torch.zeros(2, 2, 2, dtype=torch.bool)
    kept = keep_tokens(nothing, Layout(((1, 1), (1, 3), (2, 2))))
    assert kept.tolist() == [[True] * 4 + [False] * 4] * 2


def test_a_single_small_level_is_painted_too():
    assert not keep_tokens(torch.zeros(2, 2), Layout(((1, 2),))).any()
    assert keep_tokens(torch.zeros(2, 2), Layout(((1, 2), (2, 2)))).sum() == 2


def test_pictures_have_their_own_masks():
    keep = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]).bool()
    kept = keep_tokens(keep, Layout(((4, 4),)))
    assert kept[0].all() and not kept[1].any()


def test_a_cell_is_kept_only_if_all_of_its_pixels_are():
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[3, 5] = False
    kept = keep_tokens(keep, Layout(((2, 2),)))
    assert kept.tolist() == [[True, False, True, True]]


def test_masks_and_layouts_that_are_no_pictures_are_refused():
    with pytest.raises(ValueError, match=r"axes \(128,\)"):
        keep_tokens(torch.ones(4, 4), Layout(((128,),)))
    with pytest.raises(ValueError, match="shape"):
        keep_tokens(torch.ones(1, 1, 4, 4), Layout(((4, 4),)))


# -- every system -----------------------------------------------------------------------------------------------------


def kept(m) -> torch.Tensor:
    """The tokens [N] that the left half of a picture keeps."""
    y, x = m.size
    return keep_tokens(torch.arange(x).expand(y, x) < x // 2, m.layout)[0]


def tokens(m, **asked) -> torch.Tensor:
    return list(m.stream(**asked))[-1].tokens()


def pixels(pictures) -> list[bytes]:
    return [p.tobytes() for p in pictures]


@pytest.mark.parametrize("slug", SLUGS)
def test_what_is_black_stays_and_what_is_white_is_painted(slug):
    m, original, keep = small(slug), picture(), kept(small(slug))
    assert 0 < keep[m.layout.span(m.layout.K - 1)].sum() < m.layout.sizes[-1]
    own = m.tokens([original]).expand(6, -1, -1)
    drawn = tokens(m, **request(slug), n=6, image=original, mask=halves())
    assert drawn.dtype == own.dtype and torch.equal(drawn[:, keep], own[:, keep])
    changed = (drawn != own).any(-1)[:, ~keep].any(0)
    assert changed.float().mean() > 0.5, "each of six pictures would have to draw the picture's own tokens"


@pytest.mark.parametrize("slug", SLUGS)
def test_everything_kept_is_the_picture_of_its_own_tokens(slug):
    m, original = small(slug), picture()
    steps = list(m.stream(**request(slug), n=2, image=original, mask=Image.new("L", (8, 8), 0)))
    assert len(steps) == 1 and steps[0].done
    assert torch.equal(steps[0].tokens(), m.tokens([original]).expand(2, -1, -1))
    assert pixels(steps[0].pictures()) == pixels(m.reconstruct([original, original]))


@pytest.mark.parametrize("slug", SLUGS)
def test_nothing_kept_is_plain_generation(slug):
    m, white = small(slug), Image.new("L", (8, 8), 255)
    assert torch.equal(tokens(m, **request(slug), n=2, image=picture(), mask=white), tokens(m, **request(slug), n=2))


@pytest.mark.parametrize("slug", SLUGS)
def test_picture_i_depends_on_its_seed_alone_when_painted_anew_too(slug):
    m, asked = small(slug), {**request(slug), "image": picture(), "mask": halves(), "seed": 5}
    many, one = tokens(m, n=8, **asked), tokens(m, n=1, **asked)
    assert torch.allclose(many[:1].double(), one.double(), atol=1e-4)
    assert len(many.unique(dim=0)) > 1


@pytest.mark.parametrize("slug", SLUGS)
def test_boxes_outside_and_a_larger_canvas(slug):
    m, original = small(slug), picture(48)
    asked = {**request(slug), "image": original, "seed": 3}
    assert torch.equal(tokens(m, mask=(0, 0.5, 1, 1), **asked), tokens(m, mask=halves(), **asked))
    inside_out = tokens(m, mask=ImageChops.invert(halves()), **asked)
    right = keep_tokens(box_mask((0, 0.5, 1, 1), m.size), m.layout)[0]
    assert torch.equal(inside_out[:, right], m.tokens([original])[:, right])
    canvas, mask = outpaint(original, (0, 0, 1, 0.5))
    around = tokens(m, **{**asked, "image": canvas}, mask=mask)
    assert torch.equal(around[:, kept(m)], m.tokens([canvas])[:, kept(m)])


@pytest.mark.parametrize("slug", SLUGS)
def test_previews_show_what_is_kept_from_the_first_step_on(slug, monkeypatch):
    m, keep, seen = small(slug), kept(small(slug)), []
    decode, own = m.system.tokenizer.decode, m.tokens([picture()])[0]

    def noted(x, layout=None, known=None, noise=None):
        seen.append((x, known))
        return decode(x, layout, known, noise)

    monkeypatch.setattr(m.system.tokenizer, "decode", noted)
    sizes = {p.size for step in m.stream(**request(slug), image=picture(), mask=halves()) for p in step.pictures()}
    assert sizes == {(m.size[1], m.size[0])}
    assert all(known[0, keep].all() and torch.equal(x[0, keep], own[keep]) for x, known in seen)
    shares = [float(known.float().mean()) for _, known in seen]
    assert shares == sorted(shares) and shares[-1] == 1 and (len(shares) == 1 or shares[0] < 1)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_mask_of_another_shape_is_refused(slug):
    with pytest.raises(ValueError, match="the mask is 8x16, the image 40x40"):
        small(slug).generate(**request(slug), image=picture(), mask=Image.new("L", (8, 16), 255))


@pytest.mark.parametrize("slug", SLUGS)
def test_tokens_that_lie_on_no_picture_are_told(slug, monkeypatch):
    m = small(slug)
    monkeypatch.setattr(m.system.tokenizer, "layout", lambda shape=None: Layout(((16,),)))
    with pytest.raises(ValueError, match=r"tokens of axes \(16,\): a part can be painted anew where all levels are"):
        m.generate(**request(slug), image=picture(), mask=halves())


@pytest.mark.parametrize("slug", SLUGS)
def test_the_command_paints_a_part_anew(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    m = small(slug)
    m.save_pretrained("model")
    picture(48).save("image.png")
    what = str(next(iter(request(slug).values())))
    asked = [
        "--image",
        "image.png",
        "--mask",
        "0,0.5,1,1",
        "-o",
        "a.png",
        "--device",
        "cpu",
        "--set",
        "load.fast=false",
    ]
    cli.main(["generate", what, "--model", "model", *asked])
    wanted = m.generate(**request(slug), image="image.png", mask=(0, 0.5, 1, 1))[0]
    assert read_image("a.png").tobytes() == wanted.tobytes()
