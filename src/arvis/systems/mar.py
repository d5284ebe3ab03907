"""MAR: images by masked autoregression over real vectors, each drawn by a small diffusion network.

Autoregressive Image Generation without Vector Quantization, arXiv 2406.11838. Weights: MIT.

The tokens are latents of a KL autoencoder. One step draws a random set of them: the encoder sees the known tokens and
the condition (in buffer rows), the decoder adds mask tokens and says a vector z for each token of the set, and a
denoising MLP draws every token from its z, independently. A cosine schedule decides how many tokens a step draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from arvis.denoise import ddpm
from arvis.diffusion import Diffusion, Kind, betas, even, strided
from arvis.dist import Dist, Solved, pinned
from arvis.nn.mae import MaskedDecoder, MaskedEncoder
from arvis.nn.mlp_denoiser import MLPDenoiser
from arvis.nn.request import class_labels, labels_where
from arvis.nn.text import TextConfig, TextEncoder
from arvis.nn.vit import ViTBlock
from arvis.noise import Source
from arvis.orders import cosine_counts, random_sets, sets_around
from arvis.published import File, Preset, Result
from arvis.sampling import cfg, mix, per_item
from arvis.state import Cond, State
from arvis.tokenizers.cnn import CNNConfig
from arvis.tokenizers.kl import KLAutoencoder, KLConfig
from arvis.tokenizers.patch import PatchConfig
from arvis.tokens import NEVER, Layout, Pin, Space, at
from arvis.weights import SAME_NAMES, Fuse, Key

SPACINGS = {"even": even, "strided": strided}
"""Which steps of the diffusion a solve visits."""


@dataclass(frozen=True, kw_only=True)
class MARSampling:
    """Official sampling settings; cfg_scale and temperature may be one number or one per item.

    `num_iter` steps draw all tokens (at most one step per token), and each token takes `diffusion_steps` (at most all)
    of the denoiser: with spacing "even" the noisiest one among them, as is official; "strided" leaves it out, which
    networks that were trained briefly need. With cfg_schedule "linear" the guidance grows with the share of tokens that
    are drawn. The temperature scales the noise of the denoising steps; without guidance the authors use 0.95.
    """

    cfg_scale: float = 2.9
    cfg_schedule: Literal["linear", "constant"] = "linear"
    num_iter: int = 256
    diffusion_steps: int = 100
    spacing: Literal["even", "strided"] = "even"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_iter < 1 or self.diffusion_steps < 1:
            raise ValueError(f"there is at least one step, got {self.num_iter=} and {self.diffusion_steps=}")

    @classmethod
    def plain(cls) -> Self:
        """The unguided law of the model."""
        return cls(cfg_scale=1.0)


@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """Sizes of the transformer and its tokenizer; the decoder has the encoder's sizes where its own are 0.

    The condition is one of `num_classes`, or with `text` a prompt; it fills `buffer` rows. In training `label_drop` of
    the conditions are left out, the share of hidden tokens is drawn from a Gaussian around 1 of deviation 0.25 cut to
    [mask_ratio_min, 1], and each token is denoised `diffusion_batch_mul` times.
    """

    tokenizer: KLConfig
    width: int
    depth: int
    heads: int
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_heads: int = 0
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    num_classes: int = 1000
    text: TextConfig | None = None
    buffer: int = 64
    denoiser_width: int = 1024
    denoiser_depth: int = 6
    diffusion_steps: int = 1000
    noise_schedule: Kind = "cosine"
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    label_drop: float = 0.1
    mask_ratio_min: float = 0.7
    diffusion_batch_mul: int = 4

    def __post_init__(self) -> None:
        if self.text is not None and self.buffer != self.text.words + 1:
            raise ValueError(f"a prompt fills {self.text.words + 1} buffer rows (text.words + 1), got {self.buffer=}")


class Writer(Protocol):
    """An nn.Module that writes a condition into the buffer: rows [B, P, D], or [B, 1, D] to be repeated."""

    conditions: tuple[str, ...]

    def prepare(self, request: dict[str, Any]) -> Cond: ...
    def __call__(self, cond: Cond | None, null_B: Tensor) -> Tensor: ...


class ClassWriter(nn.Module):
    """The row of a class, or the one learned row of "no class"."""

    conditions = ("class_labels",)

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes, width)
        self.null = nn.Parameter(nn.init.normal_(torch.empty(1, width), std=0.02))

    def prepare(self, request: dict[str, Any]) -> Cond:
        return class_labels(request, self.num_classes, self.null.device)

    def forward(self, cond: Cond | None, null_B: Tensor) -> Tensor:
        labels = labels_where(cond, null_B, self.num_classes)
        known = self.embedding(labels.clamp(max=self.num_classes - 1))
        return torch.where((labels == self.num_classes)[:, None], self.null, known)[:, None]


class TextWriter(nn.Module):
    """The rows of a prompt, its summary first; "no prompt" is the empty one."""

    conditions = ("prompt",)

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        self.project = nn.Linear(config.width, width)

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.encoder.prepare(request)

    def forward(self, cond: Cond | None, null_B: Tensor) -> Tensor:
        rows, visible = self.encoder.read(cond, null_B)
        return self.project(rows * visible[..., None])


class MARTransformer(nn.Module):
    """Everything that is learned on latents: condition, encoder, decoder, denoiser."""

    def __init__(
        self, writer: Writer, encoder: MaskedEncoder, decoder: MaskedDecoder, denoiser: MLPDenoiser, layout: Layout
    ) -> None:
        super().__init__()
        self.layout = layout
        self.writer: Writer = writer
        self.encoder, self.decoder, self.denoiser = encoder, decoder, denoiser

    def buffer(self, cond: Cond | None, null_B: Tensor) -> Tensor:
        """The buffer rows [B, P, D] of conditions, those with `null_B` True without one."""
        return self.writer(cond, null_B).expand(-1, self.encoder.buffer, -1)

    def forward(self, tokens_BNS: Tensor, where_Bv: Tensor, wanted_Bn: Tensor, buffer_RPD: Tensor) -> Tensor:
        """z [B*G, n, D] of the tokens `wanted`, seeing those at `where` and the buffer rows of each guidance row."""
        h = self.encoder(at(tokens_BNS, where_Bv), where_Bv, buffer_RPD)
        return self.decoder(h, where_Bv, wanted_Bn)

    def init_weights(self) -> None:
        """MAR's initialisation: Glorot for matrices, 0.02 for what is looked up; the denoiser has its own."""
        for part in (self.encoder, self.decoder, self.writer):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
        decoder = (self.decoder.mask, self.decoder.position, self.decoder.head_position)
        for table in (self.encoder.position, *decoder):
            nn.init.normal_(table, std=0.02)


class MAR(nn.Module):
    """The three verbs over random sets. The state carries no cache: every step sees another set of rows.

    `order` in the state are positions in the order in which they are drawn; tokens that are given are known from the
    start, and the schedule runs over the others.
    """

    Sampling: ClassVar[type] = MARSampling

    def __init__(self, tokenizer: KLAutoencoder, transformer: MARTransformer, config: MARConfig) -> None:
        super().__init__()
        self.tokenizer, self.transformer, self.config = tokenizer, transformer, config
        self.space: Space = tokenizer.space
        self.diffusion = Diffusion(betas(config.noise_schedule, config.diffusion_steps))

    def parts(self) -> dict[str, nn.Module]:
        """The parts that official files hold."""
        return {"tokenizer": self.tokenizer, "transformer": self.transformer}

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names that `prepare` reads in a request."""
        return self.transformer.writer.conditions

    def prepare(self, request: dict[str, Any]) -> Cond:
        return self.transformer.writer.prepare(request)

    # -- the three verbs ------------------------------------------------------------------------------------------

    def start(
        self, cond: Cond | None, sampling: Any, noise: Source, layout: Layout | None = None, given: Pin | None = None
    ) -> State:
        items, layout = len(noise), self._layout(layout)
        own = self.transformer.encoder.position
        device = own.device
        counts = cosine_counts(layout.n, min(sampling.num_iter, layout.n))
        group = random_sets(counts, noise).to(device)
        hidden = layout.n - torch.tensor(counts).cumsum(0)[None]
        if given is not None:
            group = _around(group, given.mask.to(device), sampling.num_iter, noise)
            steps = torch.arange(int(group.max()) + 1, device=device)
            hidden = (group[:, None] > steps[:, None]).sum(2).cpu()
        scale = per_item(sampling.cfg_scale, items)
        guided = bool((scale != 1).any())
        null = torch.zeros(items, dtype=torch.bool, device=device)
        rows = [self.transformer.buffer(cond, null | u) for u in ((False, True) if guided else (False,))]
        s = State(
            tokens=own.new_zeros(items, layout.n, self.space.S),
            group=group,
            k=torch.zeros(items, dtype=torch.int64),
            K=hidden.shape[1],
            noise=noise,
            layout=layout,
            cond=cond or {},
            weights=torch.stack(cfg(ramp(sampling.cfg_schedule, scale, hidden, layout.n)), -1)
            if guided
            else torch.ones(1, 1, 1),
            knobs={"temperature": per_item(sampling.temperature, items)},
            given=given,
            more={"buffer": torch.stack(rows, 1)},
            key=SPACINGS[sampling.spacing](len(self.diffusion), sampling.diffusion_steps),
        )
        if given is not None:
            s.k = s.k + s.given_groups()
            s.tokens = torch.where(s.known[..., None], given.value.to(s.tokens), s.tokens)
        return s

    def predict(self, s: State) -> Solved:
        k, buffer = s.at(), s.more["buffer"]
        if s.given is None:
            counts = cosine_counts(s.layout.n, s.K)
            where, seen = _places(s.group == k, counts[k]), _places(s.known, sum(counts[:k]))
            z = self.transformer(s.tokens, seen, where, buffer.flatten(0, 1)).unflatten(0, buffer.shape[:2])
        else:
            where, z = self._around_given(s, s.given)
        diffusion, weight = self.diffusion.sub(s.key), s.weight(k)  # type: ignore[arg-type]
        denoiser = self.transformer.denoiser
        denoise = denoiser.along(diffusion.times[::-1], denoiser.condition(z))

        def field(x: Tensor, t: float) -> Tensor:
            """The guided noise, and the share of the variance that the condition's own row says."""
            eps, share = denoise(x[:, None], t).chunk(2, -1)  # [B, G, n, S]
            return torch.cat((mix(eps, weight), share[:, 0]), -1)

        solver = ddpm(diffusion, s.knobs["temperature"])
        return Solved(where, field, solver, (where.shape[1], self.space.S), at=k)

    def _around_given(self, s: State, given: Pin) -> tuple[Tensor, Tensor]:
        """Positions [B, n] of the next set and z [B, G, n, D], seeing what is known or given.

        Items may see different numbers of tokens: those that see equally many share a pass. Where they draw different
        numbers, the shorter sets are filled up with positions that `State.put` leaves as they are.
        """
        k, buffer = s.at(), s.more["buffer"]
        drawn, visible = s.group == k, s.known | given.mask.to(s.group.device)
        where = _places(drawn, int(drawn.sum(1).max()))
        tokens, count = pinned(s.tokens, Pin(given.mask.to(visible.device), given.value.to(s.tokens))), visible.sum(1)
        parts, order = [], []
        for n in count.unique().tolist():
            rows = (count == n).nonzero()[:, 0]
            seen = _places(visible[rows], n)
            parts.append(self.transformer(tokens[rows], seen, where[rows], buffer[rows].flatten(0, 1)))
            order.append(rows)
        z = torch.cat(parts).unflatten(0, buffer.shape[:2])
        return where, z[torch.cat(order).argsort()]

    def commit(self, s: State, d: Dist, x_BnS: Tensor) -> None:
        s.put(d.where, x_BnS)
        s.k = s.k + 1

    # -- training -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, image: Tensor) -> dict[str, Tensor]:
        """What training may store of images: "moments", from which every epoch draws other latents."""
        return {"moments": self.tokenizer.features(image)}

    def loss(self, batch: dict[str, Any], noise: Source) -> dict[str, Tensor]:
        """The diffusion loss on the hidden tokens of one random share per batch: squared error of the noise, and bits.

        batch: "tokens" [B, N, S], or "moments" or "image" [B, 3, Y, X] in [-1, 1] to draw them from; and the
        conditions, dropped with `label_drop`.
        """
        tokens, config = self._tokens(batch, noise), self.config
        n, device = tokens.shape[1], tokens.device
        count = hidden_count(n, float(noise.uniform("share", 0, ())[0]), config.mask_ratio_min)
        order = noise.uniform("order", 0, (n,)).to(device).argsort(1)
        where, wanted = (x.sort(1).values for x in order.split((n - count, count), 1))
        null = noise.uniform("drop", 0, ()).to(device) < config.label_drop
        buffer = self.transformer.buffer(self.prepare(batch), null)
        z = self.transformer(tokens, where, wanted, buffer)
        shape = (config.diffusion_batch_mul, count)
        t = (noise.uniform("time", 0, shape) * len(self.diffusion)).long().to(device)  # [B, mul, n]
        eps = noise.normal("eps", 0, (*shape, self.space.S)).to(tokens)
        x0 = at(tokens, wanted)[:, None].expand_as(eps)
        denoiser = self.transformer.denoiser
        out = denoiser(self.diffusion.noisy(x0, eps, t), t, denoiser.condition(z)[:, None])
        error, bits = (term.mean() for term in self.diffusion.terms(out, x0, eps, t))
        return {"loss": error + bits, "error": error.detach(), "bits": bits.detach()}

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Any], noise: Source) -> Tensor:
        if "tokens" in batch:
            return batch["tokens"]
        moments = batch["moments"] if "moments" in batch else self.tokenizer.features(batch["image"])
        return self.tokenizer.sampled(moments, noise)

    def _layout(self, layout: Layout | None) -> Layout:
        own = self.transformer.layout
        if layout is not None and layout != own:
            raise ValueError(f"positions are learned for {own.levels}, got {layout.levels}; train with these")
        return own


def ramp(kind: str, scale_B: Tensor, hidden_BK: Tensor, n: int) -> Tensor:
    """The guidance scale [B, K] of each step: constant, or growing with the share of the n tokens that are drawn.

    Compat: the official code counts one token as hidden after the last step, so that the ramp ends just below `scale`.
    """
    if kind == "constant":
        return scale_B[:, None].expand(-1, hidden_BK.shape[1])
    return 1 + (scale_B[:, None] - 1) * (n - hidden_BK.clamp_min(1)) / n


def hidden_count(n: int, u: float, least: float) -> int:
    """How many of n tokens training hides: a share from the Gaussian around 1 of deviation 0.25, cut to [least, 1], of
    the uniform number u; rounded up."""
    below = torch.special.ndtr(torch.tensor((least - 1) / 0.25, dtype=torch.float64))
    share = 1 + 0.25 * torch.special.ndtri(below + u * (0.5 - below))
    return min(n, max(1, math.ceil(n * float(share))))


def _around(group: Tensor, given: Tensor, steps: int, noise: Source) -> Tensor:
    """The sets when some tokens are given. Those that are the leading sets of an item's own order are just that: a
    generation that goes on. Others are known from the start, -1, and the schedule runs over the rest."""
    first = group.masked_fill(given, NEVER).amin(1, keepdim=True)
    leading = ~(given & (group >= first)).any(1, keepdim=True)
    return torch.where(leading, group, sets_around(given, steps, noise).to(group))


def _places(hit_BN: Tensor, count: int) -> Tensor:
    """The positions of `count` hits of each item, ascending; where it has fewer, then others."""
    return (~hit_BN).long().argsort(dim=1, stable=True)[:, :count]


# -- assembly and presets -----------------------------------------------------------------------------------------


def build(config: MARConfig) -> MAR:
    """A MAR with freshly initialised weights."""
    if config.text is None:
        return assemble(config, ClassWriter(config.num_classes, config.width))
    return assemble(config, TextWriter(config.text, config.width))


def assemble(config: MARConfig, writer: Writer) -> MAR:
    """A freshly initialised MAR with any module that writes the condition into the buffer."""
    tokenizer = KLAutoencoder(config.tokenizer)
    layout, channels = tokenizer.layout(), tokenizer.space.S
    inner = config.decoder_width or config.width

    def blocks(width: int, depth: int, heads: int) -> list[ViTBlock]:
        return [
            ViTBlock(
                width,
                heads,
                config.mlp_ratio,
                eps=config.norm_eps,
                attn_dropout=config.attn_dropout,
                dropout=config.proj_dropout,
            )
            for _ in range(depth)
        ]

    sizes = {"buffer": config.buffer, "tokens": layout.n, "eps": config.norm_eps}
    transformer = MARTransformer(
        writer,
        MaskedEncoder(blocks(config.width, config.depth, config.heads), channels=channels, width=config.width, **sizes),
        MaskedDecoder(
            blocks(inner, config.decoder_depth or config.depth, config.decoder_heads or config.heads),
            inner=config.width,
            width=inner,
            **sizes,
        ),
        MLPDenoiser(channels, 2 * channels, inner, config.denoiser_width, config.denoiser_depth),
        layout,
    )
    transformer.init_weights()
    return MAR(tokenizer, transformer, config)


def kl16() -> KLConfig:
    """The published tokenizer: 16 channels, 16x down, attention in the encoder's lowest level."""
    return KLConfig(cnn=CNNConfig(ch=128, z_channels=16, decoder_sa=False, double_z=True))


def preset(width: int, depth: int, heads: int, denoiser_depth: int, denoiser_width: int) -> MARConfig:
    """A published size; encoder and decoder are equal."""
    return MARConfig(
        tokenizer=kl16(),
        width=width,
        depth=depth,
        heads=heads,
        denoiser_depth=denoiser_depth,
        denoiser_width=denoiser_width,
    )


def mar_emoji_64() -> MARConfig:
    """64x64 pixels, 8x8 tokens of 16 channels, prompts."""
    text = TextConfig(words=15)
    return MARConfig(
        tokenizer=KLConfig(z_channels=16, grid=(8, 8), scale=None, patch=PatchConfig(z_channels=16, double_z=True)),
        width=192,
        depth=3,
        heads=6,
        text=text,
        buffer=text.words + 1,
        denoiser_width=256,
        denoiser_depth=3,
        attn_dropout=0.0,
        proj_dropout=0.0,
        diffusion_batch_mul=2,
    )


_REPO = "jadechoghari/mar"
_TOKENIZER = File(
    repo=_REPO,
    name="kl16.safetensors",
    inside="model|",
    sha256="ae6e66b66cce64248cace5aa6cf8bdb3e834947801cbf7e059028592e2b1de31",
)


def _preset(config: Any, file: File, cfg_scale: float, epochs: int = 800, batch: int = 2048) -> Preset:
    """A published size; `epochs` of ImageNet at lr 1e-4 per 256 rows make its official training schedule."""
    epoch = 1_281_167 // batch
    return Preset(
        config=config,
        files={"tokenizer": _TOKENIZER, "transformer": file},
        licence="MIT",
        sampling={"cfg_scale": cfg_scale, "cfg_schedule": "linear", "num_iter": 256, "diffusion_steps": 100},
        training={
            "generator": {
                "steps": epochs * epoch,
                "batch": batch,
                "lr": 1e-4 * batch / 256,
                "warmup": 100 * epoch,
                "schedule": "constant",
                "weight_decay": 0.02,
                "no_decay": ("denoiser",),
                "clip": 3.0,
                "ema": 0.9999,
            }
        },
    )


def _file(name: str, sha256: str, revision: str = "main") -> File:
    return File(repo=_REPO, name=name, inside="model_ema|model|", sha256=sha256, revision=revision)


CONFIG = MARConfig

_SCHEDULE = {"batch": 32, "lr": 2e-3, "warmup": 30, "schedule": "cosine", "final": 0.02, "ema": 0.995}

PRESETS = {
    "mar-b": _preset(
        lambda: preset(768, 12, 12, 6, 1024),
        _file(
            "checkpoint-last.pth",
            "7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c",
            "773c9bdcd98740c7b876ce0d66f684a0e2468990",  # Compat: later only the weights without averaging are there
        ),
        2.9,
    ),
    "mar-l": _preset(
        lambda: preset(1024, 16, 16, 8, 1280),
        _file("mar-large.safetensors", "558ed22f240aad7a4c6fd1add604a58b30610c8ae62a9d608fa8fefb3846bb45"),
        3.0,
    ),
    "mar-h": _preset(
        lambda: preset(1280, 20, 16, 12, 1536),
        _file("mar-huge.safetensors", "cac36cd25a1bee61c9f0aa705748fd5b17eb8833048dfb6cc3bedb7b6412c08d"),
        3.2,
    ),
    "mar-emoji-64": Preset(
        config=mar_emoji_64,
        licence="Apache-2.0",
        sampling={"cfg_scale": 3.0, "num_iter": 16, "diffusion_steps": 25, "spacing": "strided"},
        training={
            "tokenizer": {"steps": 600, **_SCHEDULE, "clip": 1.0, "weight_decay": 0.01, "muon": ("blocks",)},
            "generator": {"steps": 1400, **_SCHEDULE, "clip": 3.0, "muon": ("trunk", "denoiser.blocks")},
        },
    ),
}

RESULTS = tuple(
    Result(preset=name, metric=metric, value=value, settings=f"cfg {scale}, 256 steps, 50k", source="official README")
    for name, scale, fid, score in (
        ("mar-b", 2.9, 2.31, 281.7),
        ("mar-l", 3.0, 1.78, 296.0),
        ("mar-h", 3.2, 1.55, 303.7),
    )
    for metric, value in (("FID", fid), ("IS", score))
)


# -- official names -----------------------------------------------------------------------------------------------


def _qkv(ours: str) -> tuple[Key, ...]:
    """One 1x1 convolution of ours is three of theirs."""
    return tuple(
        Key(f"{ours}.qkv.{p}", tuple(f"{ours}.{name}.{p}" for name in "qkv"), Fuse(3)) for p in ("weight", "bias")
    )


TOKENIZER_KEYS = (
    Key((), "loss.{rest*}"),
    Key("normal.mean", (), initial=torch.zeros_like),
    Key("normal.square", (), initial=torch.ones_like),
    *_qkv("{part}.mid.attn_1"),
    *_qkv("{part}.{way}.{i}.attn.{j}"),
    *SAME_NAMES,
)


def _blocks(ours: str, official: str) -> tuple[Key, ...]:
    """The names of a timm block."""
    names = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2"}
    names |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    return tuple(
        Key(f"{ours}.trunk.blocks.{{i}}.{a}.{{p}}", f"{official}_blocks.{{i}}.{b}.{{p}}") for a, b in names.items()
    )


_HEAD = {
    "time.up": "time_embed.mlp.0",
    "time.down": "time_embed.mlp.2",
    "embed_condition": "cond_embed",
    "embed": "input_proj",
    "blocks.{i}.norm": "res_blocks.{i}.in_ln",
    "blocks.{i}.up": "res_blocks.{i}.mlp.0",
    "blocks.{i}.down": "res_blocks.{i}.mlp.2",
    "blocks.{i}.modulation": "res_blocks.{i}.adaLN_modulation.1",
    "modulation": "final_layer.adaLN_modulation.1",
    "linear": "final_layer.linear",
}

TRANSFORMER_KEYS = (
    Key("writer.embedding.weight", "class_emb.weight"),
    Key("writer.null", "fake_latent"),
    Key("encoder.embed.{p}", "z_proj.{p}"),
    Key("encoder.embed_norm.{p}", "z_proj_ln.{p}"),
    Key("encoder.position", "encoder_pos_embed_learned"),
    *_blocks("encoder", "encoder"),
    Key("encoder.norm.{p}", "encoder_norm.{p}"),
    Key("decoder.embed.{p}", "decoder_embed.{p}"),
    Key("decoder.mask", "mask_token"),
    Key("decoder.position", "decoder_pos_embed_learned"),
    *_blocks("decoder", "decoder"),
    Key("decoder.norm.{p}", "decoder_norm.{p}"),
    Key("decoder.head_position", "diffusion_pos_embed_learned"),
    *(Key(f"denoiser.{a}.{{p}}", f"diffloss.net.{b}.{{p}}") for a, b in _HEAD.items()),
)


def keys(config: MARConfig) -> dict[str, tuple[Key, ...]]:
    """The official names of every part of a MAR."""
    return {"tokenizer": TOKENIZER_KEYS, "transformer": TRANSFORMER_KEYS}


def tiny() -> MAR:
    """The smallest complete MAR, for the laws: what is zero at first is random."""
    patch = PatchConfig(patch=2, grid=(2, 3), z_channels=2, double_z=True, width=8, heads=2, refine=4)
    config = MARConfig(
        tokenizer=KLConfig(z_channels=2, grid=(2, 3), scale=None, patch=patch),
        width=16,
        depth=2,
        heads=2,
        decoder_width=8,
        decoder_depth=1,
        num_classes=3,
        buffer=2,
        denoiser_width=8,
        denoiser_depth=1,
        diffusion_steps=4,
    )
    system = build(config)
    for parameter in system.transformer.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return system
