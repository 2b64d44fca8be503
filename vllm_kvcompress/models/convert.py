"""``vllm-kvcompress convert``: which family's files these are, and that family's converter."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(help="LlamaGen's c2i_*.pt, or a folder with one; or Lumina-mGPT-7B's folder.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write, for vllm serve.")],
    vq: Annotated[
        Path | None,
        typer.Option(
            help="Its VQ model: vq_ds16_c2i.pt, by default beside the source; Chameleon's vqgan.ckpt."
        ),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(min=1, max=128, help="LlamaGen: tokens a line, if no name tells: 16, 24 or 32."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="LlamaGen: attention heads, of an unpublished size.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Lumina-mGPT: 7B-768's folder, or Chameleon's text_tokenizer.json.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Lumina-mGPT: 512, 768 or 1024, if the folder's name does not tell."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a converted model that is there.")
    ] = False,
) -> None:
    """Turn published files that vllm serve can't take into one folder that it takes.

    LlamaGen's class-conditional .pt files, or Lumina-mGPT's weights, VQ model and tokenizer.
    """
    of_llamagen: dict[str, Any] = {"grid": grid, "heads": heads}
    of_lumina: dict[str, Any] = {"tokenizer": tokenizer, "size": size}
    if not source.exists():
        raise ValueError(
            f"{source} is not there: download it first, for instance with "
            f"`hf download {source} --local-dir FOLDER`, and name the folder or file"
        )
    converter: Callable[..., bool]
    if (source / "config.json").is_file():
        from vllm_kvcompress.models.lumina.convert import convert as converter

        own, foreign = of_lumina, of_llamagen
    else:
        from vllm_kvcompress.models.llamagen.convert import convert as converter

        own, foreign = of_llamagen, of_lumina
    if said := [option for option, value in foreign.items() if value is not None]:
        name = "a Lumina-mGPT" if own is of_lumina else "a LlamaGen"
        raise typer.BadParameter(f"{source} is {name} by its files: leave it out", param_hint=f"--{said[0]}")
    written = converter(source, output, vq=vq, overwrite=overwrite, **own)
    typer.echo(f"{output}: vllm serve {output}" if written else f"{output} is there already: left as it is")
