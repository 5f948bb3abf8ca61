"""The options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model file (.pt, .pth, .safetensors) or the name of a registered model.",
    ),
]
Arch = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time on 3.10
    typer.Option(
        help="Architecture of a state_dict: a registered name or package.module:callable."
    ),
]
Weights = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Weights of a named model; 'none' for random ones."),
]
AllowClass = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="PACKAGE.MODULE:CLASS", help="A class of yours that the file may hold; repeatable."
    ),
]
UnsafeLoad = Annotated[
    bool,
    typer.Option("--unsafe-load", help="Run whatever code the file holds. Trusted files only."),
]
InputShape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="C,H,W", help="Shape of one input, such as 3,224,224."),
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="NAME[:PATH]", help="Data set, such as fashion-mnist or image-folder:PATH."
    ),
]
DataRoot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder to look for data sets in first."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seeds every random start; recorded in the plan."),
]
Methods = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME,...", help="Decompositions to consider; see tdkit plugins."),
]
Layers = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="PATTERN", help="Only layers of this name, such as 'layer4.*'; repeatable."
    ),
]
IncludeEnds = Annotated[
    bool, typer.Option("--include-ends", help="Consider the first and the last layer too.")
]
Keeps = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="K,...", help="Fractions of a layer's parameters to consider."),
]
Bound = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="COST=FRACTION",
        help="What else may remain, held beside the budget: macs=0.5; repeatable.",
    ),
]
Format = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="module, state-dict, safetensors, onnx or pt2; as the input if unset."),
]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set", metavar="METHOD.SETTING=VALUE", help="A setting of a method; repeatable."
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="What to fit the compressed layers to: data (training images of --data, no labels),"
        " synthetic (inputs made from the model), noise (BatchNorm only), none; auto is data where"
        " there are training images.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch of the latency runs.")]
Samples = Annotated[
    int, typer.Option(min=1, help="Images for feature metrics and for calibrating.")
]
Finetune = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--finetune",
        metavar="EPOCHS",
        min=1,
        help="Fine-tune all layers afterwards, on the training images of --data.",
    ),
]
Distill = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="EPOCHS|TIME",
        help="Learn the dense model's outputs on the images of --data, no labels: 20, 60s, 2m;"
        " 0 for not at all.",
    ),
]
LearningRate = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="Of the fine-tuning; the last one of the training if unset."),
]
Resume = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        metavar="FILE",
        help="Written now and then; where it exists, training goes on from it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
