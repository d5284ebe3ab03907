"""The model card of converted weights: what they are, where they come from, whose licence they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LICENCES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "openrail")
"""Identifiers that the hub knows, of those that weights here have."""


def card(
    name: str, title: str, source: Mapping[str, Any], dtype: str, conditions: Sequence[str], version: str, folder: str
) -> str:
    """A README.md with the hub's header. `source` is that of `Official.source`, `dtype` the stored number format."""
    licence = str(source.get("licence") or "")
    known = licence.lower() if licence.lower() in LICENCES else "other"
    task = "text-to-image" if "prompt" in conditions else "unconditional-image-generation"
    repos = [repo for repo in str(source.get("repo", "")).split(", ") if repo]
    head = [f"license: {known}"]
    if known == "other":
        head.append(f"license_name: {licence or 'unknown'}")
    head += ["library_name: arvis", f"pipeline_tag: {task}"]
    if repos:
        head += ["base_model:", *(f"- {repo}" for repo in repos)]
    head += ["tags:", "- autoregressive"]
    rows = ["| part | file | revision | SHA-256 |", "|---|---|---|---|"]
    rows += [
        f"| {row['part']} | {row['file']} | {row.get('revision', '')} | {row.get('sha256', '')} |"
        for row in source.get("files", ())
    ]
    example = 'model.generate("a red apple")' if "prompt" in conditions else "model.generate(class_labels=0)"
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {name}",
            "",
            f"{title}. The official weights under other names, in {dtype}; converted by arvis {version}.",
            "",
            "```python",
            "import arvis",
            "",
            f'model = arvis.load("{folder}")',
            example,
            "```",
            "",
            f"Licence of the weights: {licence or 'none is stated'}"
            + (f", by {', '.join(repos)}; it holds for this copy as well." if repos else "."),
            "",
            *rows,
            "",
            "`arvis convert FOLDER OUT --official` writes the official names again.",
            "",
        ]
    )
