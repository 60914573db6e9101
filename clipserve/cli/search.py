"""The command that asks a collection: search."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from clipserve.cli.options import CollectionDir, Device, Dtype, Field, Json, load_for, pick
from clipserve.console import note, print_json, print_line
from clipserve.errors import ConfigError

if TYPE_CHECKING:
    from index.query import Query
    from index.rerank import Reranked
    from index.search import Hit


def search(
    collection: CollectionDir,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT...]", help="What to look for; several are added up."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model directory, needed for texts and pictures.")
    ] = "",
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to look for; may be repeated.")
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="An item to find more like; may be repeated."),
    ] = None,
    minus_text: Annotated[
        list[str] | None, typer.Option(help="A text to look away from; may be repeated.")
    ] = None,
    text_weight: Annotated[
        float, typer.Option(min=0, help="Of each TEXT, where a picture or an item counts 1.")
    ] = 1.0,
    minus_weight: Annotated[
        float, typer.Option(min=0, help="Of each --minus-text, where a picture or item counts 1.")
    ] = 1.0,
    queries: Annotated[
        Path | None, typer.Option(help="File with a text in each line, each a search of its own.")
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='Only items like this: {"color": "red", "price": {"lt": 10}}.'
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10000, help="Number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="Hits to pass over first.")] = 0,
    min_score: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Least cosine of a hit.")
    ] = None,
    unique: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Leave out what is as near as this to a better hit."),
    ] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="First hits that ALBEF's matching orders again.")
    ] = 0,
    rerank_score: Annotated[
        str | None,
        typer.Option(help="--rerank: matching+contrastive, or else matching or matching+cosine."),
    ] = None,
    field: Field = "image",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Search a collection with texts, pictures and items of it, one or weighted together."""
    wanted = _Wanted(text or [], image or [], like or [], minus_text or [])
    lines = _read_queries(queries) if queries else []
    _check(wanted, lines, model, rerank)
    if rerank_score is not None and not rerank:
        raise ConfigError("--rerank-score needs --rerank K, the number of hits to order again")
    from index.filters import parse_text
    from index.query import Query, answer
    from index.search import Searcher

    how = {
        "filter": None if filter is None else parse_text(filter),
        "min_score": min_score,
        "unique": unique,
    }
    again = _rerank_with(rerank, rerank_score or "matching+contrastive") if rerank else None
    loaded = load_for(collection, model, device, dtype) if model else None
    asked = [Query(texts=[(line, 1.0)]) for line in lines]
    asked = asked or [wanted.query(text_weight, minus_weight)]
    with Searcher(collection, device=device, field=field) as searcher:
        if again is None:
            found = answer(searcher, loaded, asked, k, offset=offset, **how)
        else:
            # An offset into the order that there will be.
            found = answer(searcher, loaded, asked, max(rerank, offset + k), **how)
            found = again(loaded, lines or wanted.texts, found, searcher.collection).hits
            found = [hits[offset : offset + k] for hits in found]
    _print(lines, found, offset, as_json)


@dataclass(frozen=True)
class _Wanted:
    """What to look for, as it was typed."""

    texts: list[str]
    images: list[Path]
    ids: list[str]
    away: list[str]
    """texts to look away from"""

    def query(self, text_weight: float, minus_weight: float) -> "Query":
        from index.query import Query

        return Query(
            texts=[
                *((text, text_weight) for text in self.texts),
                *((text, -minus_weight) for text in self.away),
            ],
            images=[(picture, 1.0) for picture in self.images],
            ids=[(id, 1.0) for id in self.ids],
        )


def _check(wanted: _Wanted, lines: list[str], model: str, rerank: int) -> None:
    """ConfigError for what cannot be meant, before anything slow."""
    toward = [*wanted.texts, *wanted.images, *wanted.ids]
    if lines and (toward or wanted.away):
        raise ConfigError("--queries is a search for each of its lines; give it, or a search here")
    if not (lines or toward):
        raise ConfigError("give a TEXT to search for, --image FILE, --like ID or --queries FILE")
    is_one_text = len(wanted.texts) == len(toward) == 1 and not wanted.away
    if rerank and not (lines or is_one_text):
        raise ConfigError(
            "--rerank orders by how one text fits a picture; give one TEXT and nothing else, or"
            " --queries"
        )
    if not model and (lines or wanted.texts or wanted.images or wanted.away):
        raise ConfigError("--model MODEL is required: the model that filled the collection")
    for picture in wanted.images:
        if not picture.is_file():
            raise ConfigError(f"picture {picture} does not exist")


def _rerank_with(k_test: int, score: str) -> "Callable[..., Reranked]":
    from clipserve.config import RerankScore
    from index.rerank import rerank

    known = pick(score, get_args(RerankScore), "--rerank-score")

    def again(*what: Any) -> "Reranked":
        done = rerank(*what, k_test=k_test, score=known)
        note(f"matched at {done.pairs_per_second:.0f} pairs/s")
        return done

    return again


def _print(lines: list[str], found: "list[list[Hit]]", offset: int, as_json: bool) -> None:
    if as_json and not lines:
        print_json([asdict(hit) for hit in found[0]])
    elif as_json:
        pairs = zip(lines, found, strict=True)
        print_json([{"query": line, "hits": [asdict(hit) for hit in hits]} for line, hits in pairs])
    for number, hits in enumerate([] if as_json else found):
        if lines:
            print_line(lines[number])
        for rank, hit in enumerate(hits, start=offset + 1):
            matching = "" if hit.matching is None else f"  {hit.matching:.3f}"
            print_line(f"{rank:>3}  {hit.score:.4f}{matching}  {hit.id}  {hit.caption}")


def _read_queries(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--queries {file} is not UTF-8 text: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"--queries {file} has no text in it; write one in each line")
    return found
