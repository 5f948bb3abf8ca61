"""``tdkit validate``: how far can the approximation error be trusted?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def validate(
    recipe: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file in TOML, or the name of one in recipes/ or, if that has none, "
            "of one that comes with tdkit; tdkit's quick if unset.",
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A model file or registered name, instead of the recipe's."),
    ] = None,
    data: options.Data = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    layers: options.Layers = None,
    methods: options.Methods = None,
    set: options.Set = None,
    keeps: options.Keeps = None,
    images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Measure the performance error on at most this many images."),
    ] = None,
    runs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Repetitions of whatever is random."),
    ] = None,
    no_finetune: Annotated[
        bool,
        typer.Option(
            "--no-finetune",
            help="Measure before fine-tuning only; the same command without this goes on.",
        ),
    ] = False,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The run folder; runs/RECIPE if unset. A run goes on."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an old run folder aside and start anew.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what has failed.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Measure in so many processes; 0 is this one.")
    ] = 0,
    dask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ADDRESS", help="Measure on a Dask cluster, such as tcp://host:8786."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Images per forward pass; changes memory, not results."),
    ] = None,
    data_root: options.DataRoot = None,
    device: options.Device = defaults.DEVICE,
    json: options.Json = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Print the summary and write no report.")
    ] = False,
) -> None:
    """Measure every candidate's real error, and report how well approximation errors rank them.

    Stop it at any time: the same command goes on.

    Example: `tdkit validate --model my.pt --data image-folder:val/ --input-shape 3,224,224`
    """
    import tdkit
    from tdkit.cli.display import note, say, stdout
    from tdkit.cli.parsing import file_json, parse_keeps, parse_names, parse_settings
    from tdkit.cli.report import print_summary
    from tdkit.cli.stopping import StoppedError
    from tdkit.cli.telling import tell_unused_plugins

    names, fractions = parse_names(methods, "--methods"), parse_keeps(keeps)
    tell_unused_plugins()
    try:
        study = tdkit.validate(
            model,
            data,
            recipe=recipe,
            run=run or "auto",
            layers=layers,
            methods=names,
            settings=parse_settings(set),
            keeps=fractions,
            images=images,
            runs=runs,
            no_finetune=no_finetune,
            fresh=fresh,
            retry_failed=retry_failed,
            workers=workers,
            dask=dask,
            batch_size=batch_size,
            arch=arch,
            weights=weights,
            allow_classes=allow_class or (),
            unsafe_load=unsafe_load,
            input_shape=input_shape,
            data_root=data_root,
            device=device,
            report=not no_report,
            progress=True,
            note=note,
        )
    except StoppedError as stop:
        if measured := getattr(stop, "__notes__", None):
            stop.said = f"{'; '.join(measured)}; the same command goes on"
        raise
    if json:
        stdout().out(file_json(study.to_json()), end="")
    else:
        print_summary(study)
        where = f"wrote {study.report}" if study.report else f"measurements are in {study.folder}"
        say(f"\n{where}")
    if study.failed:
        planned = study.results.planned
        note(f"{study.failed} of {planned} failed; --retry-failed measures them again")
