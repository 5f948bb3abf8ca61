"""``tdkit score``: the approximation error of every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tdkit.cli import options

if TYPE_CHECKING:
    from tdkit.planners.candidate import Candidate


def score(
    model: options.Model,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the candidates go; MODEL-scores.json if unset."),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME,...", help="Approximation errors; see tdkit plugins.")
    ] = "relative-weights",
    rule: Annotated[str, typer.Option(help="Ranks for a keep: best or proportional.")] = "best",
    samples: Annotated[int, typer.Option(min=1, help="Images for feature metrics.")] = 256,
    methods: options.Methods = None,
    keeps: options.Keeps = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Score every layer, method and keep; print the errors and save the candidates.

    Example: `tdkit score garipov --methods tucker,tt`
    """
    from tdkit.checkpoint import atomic_write, check_writable
    from tdkit.cli.common import (
        Source,
        feature_batches,
        file_json,
        image_size,
        open_dataset,
        open_model,
        open_registry,
        parse_keeps,
        parse_names,
    )
    from tdkit.cli.display import note, progress_bar, say, stdout
    from tdkit.compression.compress import refuse_closed
    from tdkit.compression.scoring import PAPER_KEEPS, Grid
    from tdkit.compression.scoring import score as score_candidates
    from tdkit.forward.copying import own_copy
    from tdkit.forward.inputs import one_sample
    from tdkit.layers.inventory import find_layers
    from tdkit.planners.candidate import to_json
    from tdkit.registry import resolve_methods, resolve_metrics

    registry = open_registry()
    metrics = resolve_metrics(registry, parse_names(metric, "--metric") or [])
    grid = Grid(
        resolve_methods(
            registry, parse_names(methods, "--methods") or list(registry.decompositions)
        ),
        metrics,
        parse_keeps(keeps, PAPER_KEEPS),
        rule,
        seed,
    )
    source = Source(model, arch, weights, allow_class or (), unsafe_load, input_shape, device, seed)
    size = image_size(source, registry)
    dataset = open_dataset(data, registry, data_root, size, seed) if data else None
    opened = open_model(source, registry, dataset)
    path = output or Path(f"{opened.name}-scores.json")
    check_writable(path, force=force, inputs=[model])
    dense = own_copy(opened.model).eval()
    found = find_layers(
        dense,
        inputs=one_sample(opened.inputs()),
        patterns=layers or (),
        keep_ends=not include_ends,
    )
    refuse_closed(found)
    needs_data = any(m.target == "features" for m in metrics)
    batches = feature_batches(dataset, samples, opened.model) if needs_data else []
    with progress_bar("scoring", then="scoring") as progress:
        candidates = score_candidates(dense, found, grid, batches=batches, progress=progress)
    value = {
        "tdkit_scores": 1,
        "model": model,
        "rule": rule,
        "seed": seed,
        "candidates": [to_json(candidate) for candidate in candidates],
    }
    with atomic_write(path, force=force, inputs=[model]) as temporary:
        temporary.write_text(file_json(value), encoding="utf-8")
    if json:
        stdout().out(file_json(value), end="")
    else:
        for name in grid.metrics:
            _print(candidates, name.name)
        say(f"\nwrote {path}, {len(candidates)} candidates")
    for text in opened.notes:
        note(text)


def _print(candidates: Sequence[Candidate], metric: str) -> None:
    from tdkit.cli.display import show, sizes, table

    view = table(metric, "layer", "method", "rank", "keep", "error", right=("keep", "error"))
    previous = None
    for c in candidates:
        name = c.layer if c.layer != previous else ""
        previous = c.layer
        view.add_row(name, c.method, sizes(c.rank), f"{c.keep:.3f}", f"{c.errors[metric]:.4g}")
    show(view)
