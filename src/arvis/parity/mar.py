"""MAR and its KL autoencoder against their official code, and full-size checkpoints by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arvis.denoise import ddpm
from arvis.diffusion import sections, strided
from arvis.noise import Recorded
from arvis.parity.harness import Fixture
from arvis.sampling import cfg, mix
from arvis.systems.mar import MAR, TOKENIZER_KEYS, MARConfig, MARSampling, build, keys
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.kl import KLAutoencoder, KLConfig, patchify, unpatchify
from arvis.tokens import at
from arvis.walk import walk
from arvis.weights import Key, load_official

RECORDINGS = ("mar", "mar-kl16")

_SIZES = {
    "encoder_embed_dim": "width",
    "encoder_depth": "depth",
    "encoder_num_heads": "heads",
    "decoder_embed_dim": "decoder_width",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "class_num": "num_classes",
    "buffer_size": "buffer",
    "diffloss_d": "denoiser_depth",
    "diffloss_w": "denoiser_width",
    "diffusion_steps": "diffusion_steps",
    "noise_schedule": "noise_schedule",
    "label_drop_prob": "label_drop",
}


def run(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    """Every output of a recording, whatever its sizes."""
    if fixture.slug == "mar-kl16":
        yield from _autoencoder(fixture)
        return
    config = configured(fixture.model("mar"))
    system = build(config).eval()
    load_official(
        system.transformer, keys(config)["transformer"], fixture.weights("mar"), source=f"{fixture.folder}: mar"
    )
    io, runs = fixture.io, fixture.runs
    yield "tokens", patchify(io["latents"], config.tokenizer.patch_size)
    yield from _masked_pass(system, io, runs["masked_pass"])
    yield from _head(system, io, runs["head_cfg"])
    yield from _tables(system, runs["tables"])
    yield from _head_sampling(system, io, runs["head_sampling"])
    yield from _generated(system, io, runs["gen"])


def skeleton(layout: Mapping[str, Any]) -> tuple[nn.Module, tuple[Key, ...]]:
    """The part that a key layout is of, and its table."""
    values = layout["constructor"]
    if "encoder_depth" not in values:
        return KLAutoencoder(configured_tokenizer(values)), TOKENIZER_KEYS
    config = configured(values)
    return build(config).transformer, keys(config)["transformer"]


def configured(values: Mapping[str, Any]) -> MARConfig:
    """Our configuration from official constructor values; absent ones are the official defaults. No tokenizer belongs
    to these, so it is the smallest that has such latents."""
    if not values.get("learn_sigma", True):
        raise ValueError("the official denoiser always learns variances, got learn_sigma=false")
    side = values["img_size"] // values["vae_stride"] // values["patch_size"]
    channels = values["vae_embed_dim"]
    tokenizer = KLConfig(
        z_channels=channels,
        patch_size=values["patch_size"],
        grid=(side, side),
        cnn=CNNConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=channels, double_z=True),
    )
    return MARConfig(
        tokenizer=tokenizer, **{ours: values[theirs] for theirs, ours in _SIZES.items() if theirs in values}
    )


def configured_tokenizer(values: Mapping[str, Any]) -> KLConfig:
    """The same for the autoencoder; attention is chosen by the resolutions that a picture of the nominal size has."""
    if values.get("norm_groups", 32) != 32 or not values.get("double_z", True):
        raise ValueError(f"norms of 32 groups and double_z are official, got {values}")
    if values.get("in_channels", 3) != values.get("out_ch", 3):
        raise ValueError(f"as many channels go in as come out, got {values['in_channels']} and {values['out_ch']}")
    mult, resolution = tuple(values["ch_mult"]), values.get("resolution", 256)
    sides = [resolution // 2**level for level in range(len(mult))]

    def levels(name: str, default: Sequence[int]) -> tuple[int, ...]:
        return tuple(level for level, side in enumerate(sides) if side in values.get(name, default))

    z = values["embed_dim"]
    cnn = CNNConfig(
        ch=values["ch"],
        ch_mult=mult,
        num_res_blocks=values["num_res_blocks"],
        in_channels=values.get("in_channels", 3),
        z_channels=values.get("z_channels", z),
        using_sa=False,
        sa_levels=levels("attn_resolutions", (16,)),
        decoder_sa_levels=levels("decoder_attn_resolutions", ()),
        double_z=True,
    )
    return KLConfig(z_channels=z, variational=values.get("use_variational", True), cnn=cnn)


def respaced(steps: int, told: str) -> tuple[int, ...]:
    """The steps that an official respacing keeps: "100", "10,20,30" (parts of the schedule), "ddim25" (equal strides),
    or "" for all."""
    if told.startswith("ddim"):
        return strided(steps, int(told.removeprefix("ddim")))
    return sections(steps, [int(count) for count in told.split(",")] if told else (steps,))


def _autoencoder(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    values, io = fixture.model("autoencoder"), fixture.io
    low, high = fixture.runs["posterior"]["logvar_clamp"]
    tokenizer = KLAutoencoder(KLConfig(**{**vars(configured_tokenizer(values)), "logvar_range": (low, high)})).eval()
    load_official(tokenizer, TOKENIZER_KEYS, fixture.weights("autoencoder"), source=str(fixture.folder))
    for image, decoded, end in (("image", "decoded_from_mode", ""), ("image_rect", "decoded_rect", "_rect")):
        moments = tokenizer.features(io[image])
        posterior = tokenizer.posterior(moments)
        yield f"moments{end}", moments
        yield decoded, tokenizer.reconstruct(posterior.mean)
        if not end:
            yield "mode", posterior.mean
            yield "posterior_sample", posterior.sample(io["posterior_noise"])
            yield "kl", posterior.kl()


def _masked_pass(system: MAR, io: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    transformer, orders = system.transformer, io["orders"]
    hidden = torch.zeros_like(orders, dtype=torch.bool).scatter(1, orders[:, : given["num_masked"]], True)
    yield "mask", hidden.float()
    tokens = patchify(io["latents"], system.config.tokenizer.patch_size)
    where = orders[:, given["num_masked"] :].sort(1).values
    everything = torch.arange(orders.shape[1]).expand(len(orders), -1)
    cond = system.prepare({"class_labels": io["labels"]})
    for name, null in (("decoder_out", False), ("decoder_out_null", True)):
        buffer = transformer.buffer(cond, torch.full((len(orders),), null))
        if not null:
            yield "encoder_out", transformer.encoder(at(tokens, where), where, buffer)
        yield name, transformer(tokens, where, everything, buffer)


def _head(system: MAR, io: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    denoiser, x = system.transformer.denoiser, io["head_x"]
    c = denoiser.condition(io["head_c"])
    yield "head_out", denoiser(x, io["head_t"], c)
    half = x[: len(x) // 2].repeat(2, 1)  # the guided call reads the first half alone
    yield "head_cfg_out", _guided(denoiser(half, io["head_cfg_t"], c), given["cfg"])
    x0, noise, t = io["loss_target"], io["loss_noise"], io["head_t"]
    error, bits = system.diffusion.terms(denoiser(system.diffusion.noisy(x0, noise, t), t, c), x0, noise, t)
    yield "loss_mse", error
    yield "loss_vb", bits
    yield "loss_total", error + bits


def _guided(out: Tensor, scale: float) -> Tensor:
    """Answers [2 n, 2 S] of the condition's and the null rows: the guided noise for both, their own variances."""
    eps, share = out.chunk(2, -1)
    mixed = mix(eps.unflatten(0, (2, -1))[None], torch.tensor([cfg(scale)]))[0]
    return torch.cat((mixed.repeat(2, 1), share), -1)


def _tables(system: MAR, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    whole = system.diffusion
    yield "table_betas", whole.betas
    yield "table_alphas_cumprod", whole.abar
    sub = whole.sub(respaced(len(whole), given["timestep_respacing"]))
    yield "spaced_timestep_map", torch.tensor(sub.times)
    yield "spaced_betas", sub.betas
    yield "spaced_posterior_log_variance_clipped", sub.least
    yield "spaced_posterior_mean_coef1", sub.of_clean
    yield "spaced_posterior_mean_coef2", sub.of_noisy


def _head_sampling(system: MAR, io: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """One solve of the head; with guidance the rows are the condition's and then the null ones, which walk along."""
    denoiser, init, steps = system.transformer.denoiser, io["hs_noise_init"], io["hs_noise_steps"]
    c, guided = denoiser.condition(io["hs_z"]), given["cfg"] != 1.0

    def field(x: Tensor, t: float) -> Tensor:
        rows = x[0]
        if not guided:
            return denoiser(rows, t, c)[None]
        return _guided(denoiser(rows[: len(rows) // 2].repeat(2, 1), t, c), given["cfg"])[None]

    if len(init) != len(c):
        init = init.repeat(2, 1)
    noise = _recorded([init[None]], [steps[:, None]])
    sub = system.diffusion.sub(respaced(len(system.diffusion), given["timestep_respacing"]))
    yield "hs_out", ddpm(sub, given["temperature"])(field, noise, 0, tuple(init.shape), None, None)[0]


def _generated(system: MAR, io: Mapping[str, Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    items, steps = given["batch"], given["num_iter"]
    sampling = MARSampling(
        cfg_scale=given["cfg"],
        cfg_schedule=given["cfg_schedule"],
        num_iter=steps,
        temperature=given["temperature"],
    )
    times = respaced(len(system.diffusion), given["timestep_respacing"])
    yield "gen_timestep_map", torch.tensor(times)
    orders = io["orders"][:items]
    rank = torch.zeros_like(orders).scatter(1, orders, torch.arange(orders.shape[1]).flip(0).expand_as(orders))
    noise = _recorded(
        [io[f"gen_noise_init_{k}"].unflatten(0, (items, -1)) for k in range(steps)],
        [io[f"gen_noise_steps_{k}"].unflatten(1, (items, -1)) for k in range(steps)],
        order=rank,  # the official order is hidden from its front on, so it is drawn from its end
    )
    s = system.start(system.prepare({"class_labels": io["labels"][:items]}), sampling, noise)
    s.key = times
    yield "gen_cfg_per_step", s.weights[0, :, 0].expand(steps) if s.weights.shape[-1] == 2 else torch.ones(steps)
    drawn = [int(step.fresh.sum()) for step in walk(system, s)]
    yield "gen_tokens_per_step", torch.tensor(drawn)
    tokenizer = system.config.tokenizer
    yield "gen_latents", unpatchify(s.tokens, tokenizer.grid, tokenizer.patch_size)


def _recorded(start: list[Tensor], steps: list[Tensor], order: Tensor | None = None) -> Recorded:
    """Noise of solves: start [B, n, S] and every reverse step [T, B, n, S], for each solve."""
    count = len(steps[0])
    normal = {"solver": start, **{f"solver/{i}": [s[i] for s in steps] for i in range(count)}}
    uniform = {} if order is None else {"order": [order.double()]}
    return Recorded(uniform, normal, len(start[0]))
